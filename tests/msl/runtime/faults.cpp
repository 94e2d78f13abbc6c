// What is reported, one line each, one report for each place in the code, at most 20.
#include "worker.h"

static const Launch* reporting;
static uint64_t seen[64];
static int count;
static int busy;  // one worker reports at a time

void start_faults(const Launch* a) {
  reporting = a;
  count = 0;
  a->faults[0] = 0;
}

void fault(uint64_t once_key, const char* format, ...) {
  while (__atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) {
  }
  bool known = false;
  for (int i = 0; i < count; i++) known = known || seen[i] == once_key;
  size_t used = strlen(reporting->faults);
  if (!known && count < 20 && used + 400 < reporting->faults_size) {
    seen[count++] = once_key;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reporting->faults + used, 399, format, arguments);
    va_end(arguments);
    strcat(reporting->faults, "\n");
  }
  __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
}
