// One launch: every threadgroup of the grid, in the order asked for, by one or two workers.
#include "worker.h"

static Worker* workers[2];
static uint* sequence;  // threadgroups in the order they run
static uint sequence_size, next_in_sequence;

static Worker* worker_number(int n) {
  if (workers[n]) return workers[n];
  Worker* w = (Worker*)calloc(1, sizeof(Worker));
  w->number = n;
  w->stacks = (char*)mmap(nullptr, (STACK + GUARD) * MAX_THREADS, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (size_t i = 0; i < MAX_THREADS; i++) mprotect(w->stacks + i * (STACK + GUARD), GUARD, PROT_NONE);
  return workers[n] = w;
}

static void* work(void* of) {
  worker = (Worker*)of;
  while (!worker->stopped) {
    uint i = __atomic_fetch_add(&next_in_sequence, 1, __ATOMIC_RELAXED);
    if (i >= sequence_size) break;
    run_threadgroup(sequence[i]);
  }
  worker = nullptr;
  return nullptr;
}

static uint groups_along(const Launch* a, int axis) {
  uint size = a->threadgroup[axis] < a->grid[axis] ? a->threadgroup[axis] : a->grid[axis];
  return size ? (a->grid[axis] + size - 1) / size : 0;
}

static void make_sequence(const Launch* a) {
  sequence_size = groups_along(a, 0) * groups_along(a, 1) * groups_along(a, 2);
  next_in_sequence = 0;
  sequence = (uint*)realloc(sequence, (sequence_size + 1) * sizeof(uint));
  for (uint i = 0; i < sequence_size; i++) sequence[i] = a->order == REVERSE ? sequence_size - 1 - i : i;
  if (a->order != RANDOM) return;
  uint64_t random = a->seed * 0x9E3779B97F4A7C15ull + 0x7654321;
  for (int i = 0; i < 4; i++) next_random(&random);
  for (uint i = sequence_size; i > 1; i--) {
    uint j = next_random(&random) % i, t = sequence[i - 1];
    sequence[i - 1] = sequence[j];
    sequence[j] = t;
  }
}

static void add(Counters* sum, const Counters& c) {
  sum->switches += c.switches, sum->simd_ops += c.simd_ops, sum->matrix_ops += c.matrix_ops;
  sum->barriers += c.barriers, sum->atomics += c.atomics, sum->threads += c.threads;
  sum->threadgroups += c.threadgroups;
}

extern "C" void msl_launch(Launch* a) {
  start_faults(a);
  start_checking(a);
  make_sequence(a);
  for (int i = 0; i < a->workers; i++) {
    Worker* w = worker_number(i);
    w->launch = a;
    w->stopped = false;
    memset(&w->counters, 0, sizeof w->counters);
  }
  unsigned long second;
  bool two = a->workers == 2 && pthread_create(&second, nullptr, work, workers[1]) == 0;
  work(workers[0]);
  if (two) pthread_join(second, nullptr);
  for (int i = 0; i < a->workers; i++) add(&a->counters, workers[i]->counters);
  finish_checking();
}
