// The few functions of the C library that the runtime calls, declared here so that no headers need be installed.
#pragma once
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
extern "C" {
void* calloc(size_t, size_t);
void* realloc(void*, size_t);
void free(void*);
void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);
size_t strlen(const char*);
char* strcat(char*, const char*);
int vsnprintf(char*, size_t, const char*, va_list);
long long llabs(long long);
void* mmap(void*, size_t, int, int, int, long);
int mprotect(void*, size_t, int);
int pthread_create(unsigned long*, const void*, void* (*)(void*), void*);
int pthread_join(unsigned long, void**);
}
constexpr int PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2;                          // Linux
constexpr int MAP_PRIVATE = 0x2, MAP_ANONYMOUS = 0x20, MAP_NORESERVE = 0x4000;
