// Threads of one threadgroup on one core: stacks, switching, and in which order they run.
#include "worker.h"

thread_local Worker* worker __attribute__((tls_model("initial-exec"))) = nullptr;

extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
)");

uint next_random(uint64_t* state) {  // xorshift64
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return uint(*state >> 32);
}

void make_ready(Thread* t) {
  Worker* w = worker;
  t->state = READY;
  w->ready[(w->ready_first + w->ready_count++) % MAX_THREADS] = int(t->index);
}

static Thread* take_ready(Worker* w) {
  int order = w->launch->order, first = w->ready_first % MAX_THREADS;
  if (order == REVERSE) return &w->threads[w->ready[(first + --w->ready_count) % MAX_THREADS]];
  if (order == RANDOM) {
    int chosen = (first + int(next_random(&w->random) % uint(w->ready_count))) % MAX_THREADS, other = w->ready[chosen];
    w->ready[chosen] = w->ready[first];
    w->ready[first] = other;
  }
  w->ready_first = (first + 1) % MAX_THREADS;
  w->ready_count--;
  return &w->threads[w->ready[first]];
}

static void leave(void** save) {
  Worker* w = worker;
  w->counters.switches++;
  if (w->ready_count == 0) {
    w->current = nullptr;
    msl_switch(save, w->scheduler);
    return;
  }
  Thread* next = take_ready(w);
  w->current = next;
  if (save == &next->stack_pointer) return;  // it was its own turn again
  msl_switch(save, next->stack_pointer);
}

// The current thread waits until somebody makes it ready and its turn comes.
void wait_here() { leave(&worker->current->stack_pointer); }

// The current thread cannot go on, and the launch ends: its threads are left where they are.
void stop_launch() {
  Worker* w = worker;
  w->stopped = true;
  w->current = nullptr;
  void* never;
  msl_switch(&never, w->scheduler);
}

static void thread_main() {
  Worker* w = worker;
  Thread* t = w->current;
  w->launch->entries[w->number](w->launch->addresses, &t->position);
  t->state = DONE;
  w->done++;
  w->simdgroups[t->simdgroup].alive &= ~(1u << t->lane);
  void* never;
  leave(&never);
  __builtin_trap();
}

static void prepare_stack(Worker* w, Thread* t) {
  char* top = w->stacks + size_t(t->index + 1) * (STACK + GUARD) - 64;
  top -= (t->index % SIMD) * 320;  // or all stacks would fall into the same lines of the cache
  void** sp = (void**)top;
  *--sp = nullptr;  // alignment as after a call
  *--sp = (void*)thread_main;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  t->stack_pointer = sp;
}

static void place(Thread* t, const Launch* a, Uint3 group, Uint3 groups, Uint3 most, Uint3 size) {
  Position& p = t->position;
  uint i = t->index, x = i % size.x, y = i / size.x % size.y, z = i / size.x / size.y;
  uint all = most.x * most.y * most.z, here = size.x * size.y * size.z;
  p.dispatch_threads_per_threadgroup = most;
  p.grid_origin = {0, 0, 0};
  p.grid_size = p.threads_per_grid = {a->grid[0], a->grid[1], a->grid[2]};
  p.thread_position_in_threadgroup = {x, y, z};
  p.thread_position_in_grid = {group.x * most.x + x, group.y * most.y + y, group.z * most.z + z};
  p.threadgroup_position_in_grid = group;
  p.threadgroups_per_grid = groups;
  p.threads_per_threadgroup = size;
  p.dispatch_quadgroups_per_threadgroup = (all + 3) / 4;
  p.dispatch_simdgroups_per_threadgroup = (all + 31) / 32;
  p.quadgroup_index_in_threadgroup = i / 4;
  p.quadgroups_per_threadgroup = (here + 3) / 4;
  p.simdgroup_index_in_threadgroup = i / 32;
  p.simdgroups_per_threadgroup = (here + 31) / 32;
  p.thread_execution_width = p.threads_per_simdgroup = 32;
  p.thread_index_in_quadgroup = i % 4;
  p.thread_index_in_simdgroup = i % 32;
  p.thread_index_in_threadgroup = i;
}

static uint smaller(uint a, uint b) { return a < b ? a : b; }

static void start_threads(Worker* w, uint index) {
  const Launch* a = w->launch;
  Uint3 most = {smaller(a->threadgroup[0], a->grid[0]), smaller(a->threadgroup[1], a->grid[1]),
                smaller(a->threadgroup[2], a->grid[2])};
  Uint3 groups = {(a->grid[0] + most.x - 1) / most.x, (a->grid[1] + most.y - 1) / most.y,
                  (a->grid[2] + most.z - 1) / most.z};
  Uint3 group = {index % groups.x, index / groups.x % groups.y, index / groups.x / groups.y};
  Uint3 size = {smaller(most.x, a->grid[0] - group.x * most.x), smaller(most.y, a->grid[1] - group.y * most.y),
                smaller(most.z, a->grid[2] - group.z * most.z)};
  w->size = int(size.x * size.y * size.z);
  w->done = w->ready_first = w->ready_count = 0;
  w->threadgroup_index = index;
  w->random = (a->seed * 0x9E3779B97F4A7C15ull + index + 1) * 0xD1342543DE82EF95ull + 0x1234567;
  for (int i = 0; i < 4; i++) next_random(&w->random);
  start_rendezvous();
  for (int i = 0; i < w->size; i++) {
    Thread* t = &w->threads[i];
    t->index = uint(i), t->simdgroup = uint(i / SIMD), t->lane = uint(i % SIMD), t->line = 0;
    place(t, a, group, groups, most, size);
    prepare_stack(w, t);
    make_ready(t);
  }
}

void run_threadgroup(uint index) {
  Worker* w = worker;
  start_threads(w, index);
  start_threadgroup_memory();
  w->counters.threads += uint64_t(w->size);
  w->counters.threadgroups++;
  while (w->done < w->size && !w->stopped) {
    if (w->ready_count == 0 && !release_somebody()) {
      fault(1, "deadlock in threadgroup %u", index);
      w->stopped = true;
      break;
    }
    w->current = take_ready(w);
    msl_switch(&w->scheduler, w->current->stack_pointer);
  }
  w->current = nullptr;
}
