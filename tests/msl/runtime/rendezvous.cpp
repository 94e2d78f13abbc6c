// Where threads wait for each other: simd operations and barriers, and what to do when not all of them come.
#include "worker.h"

constexpr uint64_t DIVERGENT = 0x5000000000ull, PARTIAL = 0x6000000000ull, SMALL = 0x8000000000ull;

void start_rendezvous() {
  Worker* w = worker;
  w->waiting = 0;
  w->device_interval = w->threadgroup_interval = 1;
  for (int s = 0; s * SIMD < w->size; s++) {
    int lanes = w->size - s * SIMD;
    Simdgroup& g = w->simdgroups[s];
    g.all = g.alive = lanes >= SIMD ? 0xFFFFFFFFu : (1u << lanes) - 1;
    g.arrived = g.flags = 0;
    g.device_interval = g.threadgroup_interval = 1;
  }
}

// Performs the operation for the lanes in `mask`, which become ready.
static void release_simdgroup(uint simdgroup, uint mask, SimdFunction f) {
  Worker* w = worker;
  Simdgroup& g = w->simdgroups[simdgroup];
  Thread* threads = &w->threads[simdgroup * SIMD];
  if (f) {
    if (g.all != 0xFFFFFFFFu)  // what lanes that are not there give differs between chips
      fault(SMALL + uint(threads[0].line), "%s at line %d in a simdgroup of %d threads, not 32", threads[0].name,
            threads[0].line, __builtin_popcount(g.all));
    w->counters.simd_ops++;
    f(&w->lanes[simdgroup * SIMD], mask);
  } else {
    uint flags = threads[__builtin_ctz(mask)].flags;
    if (flags & MEM_DEVICE) g.device_interval++;
    if (flags & MEM_THREADGROUP) g.threadgroup_interval++;
  }
  g.arrived &= ~mask;
  for (uint l = 0; l < SIMD; l++)
    if (mask >> l & 1) make_ready(&threads[l]);
}

static bool same_operation(const Thread& a, const Thread& b) {
  return a.line == b.line && a.function == b.function && a.flags == b.flags;
}

// Lanes among the arrived ones that wait in the same operation as lane `of`.
static uint lanes_with(uint simdgroup, uint of) {
  Worker* w = worker;
  const Thread* threads = &w->threads[simdgroup * SIMD];
  uint mask = 0, arrived = w->simdgroups[simdgroup].arrived;
  for (uint l = 0; l < SIMD; l++)
    if (arrived >> l & 1 && same_operation(threads[l], threads[of])) mask |= 1u << l;
  return mask;
}

static void meet_simdgroup(SimdFunction f, uint flags, const char* name, int line) {
  Worker* w = worker;
  Thread* t = w->current;
  Simdgroup& g = w->simdgroups[t->simdgroup];
  t->state = IN_SIMD_OP, t->function = f, t->flags = flags, t->name = name, t->line = line;
  g.arrived |= 1u << t->lane;
  if (g.arrived == g.all && lanes_with(t->simdgroup, t->lane) == g.all) release_simdgroup(t->simdgroup, g.all, f);
  wait_here();
}

static void release_threadgroup() {
  Worker* w = worker;
  uint flags = 0;
  w->counters.barriers++;
  w->waiting = 0;
  for (int i = 0; i < w->size; i++) {
    Thread* t = &w->threads[i];
    if (t->state != AT_BARRIER) continue;
    flags = t->flags;
    make_ready(t);
  }
  if (flags & MEM_DEVICE) w->device_interval++;
  if (flags & MEM_THREADGROUP) w->threadgroup_interval++;
}

// The first waiting thread of whichever kind, and whether the others wait at the same barrier.
static bool at_one_barrier(int* line) {
  Worker* w = worker;
  const Thread* first = nullptr;
  bool same = true;
  for (int i = 0; i < w->size; i++) {
    const Thread& t = w->threads[i];
    if (t.state != AT_BARRIER) continue;
    if (!first) first = &t;
    same = same && same_operation(t, *first);
  }
  *line = first->line;
  return same;
}

static bool release_part_of_simdgroup(uint simdgroup) {
  Worker* w = worker;
  Simdgroup& g = w->simdgroups[simdgroup];
  if (!g.arrived) return false;
  const Thread* threads = &w->threads[simdgroup * SIMD];
  uint first = uint(__builtin_ctz(g.arrived));
  for (uint l = 0; l < SIMD; l++)
    if (g.arrived >> l & 1 && threads[l].line < threads[first].line) first = l;
  uint mask = lanes_with(simdgroup, first);
  fault(DIVERGENT + uint(threads[first].line),
        "divergent %s at line %d: lanes %08x of %08x of simdgroup %u in threadgroup %u", threads[first].name,
        threads[first].line, mask, g.all, simdgroup, w->threadgroup_index);
  release_simdgroup(simdgroup, mask, threads[first].function);
  return true;
}

// Nobody can go on: report, and let a part of those who wait go on, as a GPU might. False if that is impossible.
bool release_somebody() {
  Worker* w = worker;
  for (uint s = 0; int(s) * SIMD < w->size; s++)
    if (release_part_of_simdgroup(s)) return true;
  if (!w->waiting) return false;
  int line;
  bool same = at_one_barrier(&line);
  if (!same || w->done)
    fault(PARTIAL + uint(line), "divergent threadgroup_barrier at line %d: %d of %d threads (%d ended%s) in threadgroup %u",
          line, w->waiting, w->size, w->done, same ? "" : ", others wait at another barrier", w->threadgroup_index);
  if (!same) return false;
  release_threadgroup();
  return true;
}

extern "C" {
uint msl_lane_index() { return worker->current->lane; }

void msl_simd(SimdFunction f, const void* in, void* out, uint arg, const char* name, int line) {
  Worker* w = worker;
  w->lanes[w->current->index] = {in, out, arg};
  meet_simdgroup(f, 0, name, line);
}

void msl_matrix_op(int) {
  if (worker->current->lane == 0) worker->counters.matrix_ops++;
}

void msl_barrier(uint flags, int simdgroup_only, int line) {
  if (simdgroup_only) {
    meet_simdgroup(nullptr, flags, "simdgroup_barrier", line);
    return;
  }
  Worker* w = worker;
  Thread* t = w->current;
  t->state = AT_BARRIER, t->function = nullptr, t->flags = flags, t->name = "threadgroup_barrier", t->line = line;
  if (++w->waiting == w->size && at_one_barrier(&line)) release_threadgroup();
  wait_here();
}
}
