// One worker: an OS thread that runs the threads of one threadgroup at a time, each on a stack of its own, taking
// turns. What happens is a function of (order, seed, threadgroup) alone, so two workers give what one gives.
#pragma once
#include "libc.h"

typedef uint32_t uint;
constexpr int MAX_THREADS = 1024, SIMD = 32, MAX_SIMDGROUPS = MAX_THREADS / SIMD, MAX_BUFFERS = 64;
constexpr size_t STACK = 256 * 1024, GUARD = 4096;  // bytes
enum Order { FORWARD, REVERSE, RANDOM };
enum MemFlags { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

struct Uint3 {
  uint x, y, z;
};
struct Position {  // msl_position of include/msl/base.h
  Uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid, threads_per_grid,
      threads_per_threadgroup;
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, quadgroup_index_in_threadgroup,
      quadgroups_per_threadgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      thread_execution_width, thread_index_in_quadgroup, thread_index_in_simdgroup, thread_index_in_threadgroup,
      threads_per_simdgroup;
};
struct Lane {  // msl_lane of include/msl/base.h
  const void* in;
  void* out;
  uint arg;
};
typedef void (*SimdFunction)(Lane*, uint);
typedef void (*Entry)(void** buffers, const Position*);

enum State { READY, IN_SIMD_OP, AT_BARRIER, DONE };
struct Thread {
  void* stack_pointer;
  State state;
  int line;          // of the operation it waits in, or last waited in
  const char* name;  // of that operation
  SimdFunction function;
  uint flags, index, simdgroup, lane;
  Position position;
};
struct Simdgroup {
  uint all, alive, arrived, flags;
  uint device_interval, threadgroup_interval;  // counted up by simdgroup_barrier with the flag
};

struct Counters {  // the same fields in launch.py
  uint64_t switches, simd_ops, matrix_ops, barriers, atomics, threads, threadgroups;
};
struct Launch {  // the same fields in launch.py
  uint grid[3], threadgroup[3];
  int order, check, count, workers;
  uint64_t seed;
  Entry entries[2];          // one copy of the kernel for each worker: threadgroup memory is static in it
  char* threadgroup_memory[2];
  uint64_t threadgroup_bytes;
  int buffers;
  void** addresses;
  uint64_t* sizes;
  int* kinds;
  const char** names;
  char *arena_low, *arena_high;
  uint64_t* traffic;  // [buffers][2][3]: read, written; requested, distinct in a threadgroup, distinct in the launch
  Counters counters;
  char* faults;
  uint64_t faults_size;
};

struct Worker {
  const Launch* launch;
  int number;
  Thread threads[MAX_THREADS];
  Lane lanes[MAX_THREADS];
  Simdgroup simdgroups[MAX_SIMDGROUPS];
  Thread* current;
  void* scheduler;  // stack pointer of run_threadgroup while a thread runs
  char* stacks;
  int ready[MAX_THREADS], ready_first, ready_count;
  int size, done, waiting;  // threads of this threadgroup: all, ended, at a barrier
  uint threadgroup_index, device_interval, threadgroup_interval;
  uint64_t random;
  Counters counters;
  bool stopped;
};
extern thread_local Worker* worker __attribute__((tls_model("initial-exec")));

// scheduler.cpp
void run_threadgroup(uint index);
void make_ready(Thread* t);
void wait_here();
void stop_launch();
uint next_random(uint64_t* state);
// rendezvous.cpp
void start_rendezvous();
bool release_somebody();
// checker.cpp
void start_checking(const Launch*);
void start_threadgroup_memory();
void finish_checking();
// faults.cpp
void start_faults(const Launch*);
void fault(uint64_t once_key, const char* format, ...) __attribute__((format(printf, 2, 3)));
