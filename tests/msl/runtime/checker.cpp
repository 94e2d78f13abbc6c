// What instrumented kernels read and write: bounds, races, uninitialised memory, and the bytes moved.
//
// Two accesses to a byte by different threads, one a write, are a race unless a threadgroup_barrier of that kind of
// memory lies between (same threadgroup), or a simdgroup_barrier of it (same simdgroup), or both are atomic.
#include "worker.h"

enum Kind { INPUT, OUTPUT, INITIALISED_OUTPUT, THREADGROUP_MEMORY };  // as in launch.py
enum Readers { ONE_THREAD, ONE_SIMDGROUP, ONE_THREADGROUP, SEVERAL_THREADGROUPS };
struct Cell {           // one byte; threads as threadgroup * size + index + 1, 0 = none yet
  uint writer, write_interval, write_simd_interval;
  uint reader, read_interval, read_simd_interval;
  uint readers : 2, atomic_write : 1;
};
struct Range {
  char *low, *high;
  Kind kind;
  const char* name;
  Cell* cells;             // null for inputs
  uint* touched[2];        // last threadgroup + 1 that read, wrote each byte
  uint64_t (*traffic)[3];  // [read, written]
};
static Range ranges[MAX_BUFFERS + 1];
static int range_count;
static const Launch* checked;
static uint group_size;

template <class T>
static T* zeros(size_t n) {
  return (T*)calloc(n + 1, sizeof(T));
}

void start_checking(const Launch* a) {
  checked = a;
  range_count = 0;
  group_size = a->threadgroup[0] * a->threadgroup[1] * a->threadgroup[2];
  if (!a->check && !a->count) return;
  for (int i = 0; i < a->buffers; i++) {
    Range& r = ranges[range_count++];
    char* low = (char*)a->addresses[i];
    size_t n = a->sizes[i];
    r = {low, low + n, Kind(a->kinds[i]), a->names[i], nullptr, {}, (uint64_t(*)[3])(a->traffic + 6 * i)};
    if (a->check && r.kind != INPUT) r.cells = zeros<Cell>(n);
    for (uint*& t : r.touched) t = zeros<uint>(n);
  }
  if (a->threadgroup_bytes) {
    char* low = a->threadgroup_memory[0];
    Cell* cells = a->check ? zeros<Cell>(a->threadgroup_bytes) : nullptr;
    ranges[range_count++] = {low, low + a->threadgroup_bytes, THREADGROUP_MEMORY, "threadgroup memory", cells, {}, nullptr};
  }
}

// Threadgroup memory starts as NaNs, and as never written.
void start_threadgroup_memory() {
  Worker* w = worker;
  size_t n = w->launch->threadgroup_bytes;
  if (!n) return;
  memset(w->launch->threadgroup_memory[w->number], 0xFF, n);
  if (range_count && ranges[range_count - 1].cells) memset(ranges[range_count - 1].cells, 0, n * sizeof(Cell));
}

void finish_checking() {
  for (int i = 0; i < range_count; i++) {
    free(ranges[i].cells);
    for (uint* t : ranges[i].touched) free(t);
  }
  range_count = 0;
}

struct Access {
  char* at;
  size_t bytes;
  bool write, atomic;
  uint64_t where;  // in the kernel's code
};
struct Now {  // who accesses, and when
  uint thread, group, simdgroup, index, interval, simd_interval;
};

static Now now_for(Kind kind) {
  Worker* w = worker;
  Thread* t = w->current;
  Simdgroup& g = w->simdgroups[t->simdgroup];
  bool own = kind == THREADGROUP_MEMORY;
  return {w->threadgroup_index * group_size + t->index + 1, w->threadgroup_index, t->simdgroup, t->index,
          own ? w->threadgroup_interval : w->device_interval, own ? g.threadgroup_interval : g.device_interval};
}
static uint group_of(uint thread) { return (thread - 1) / group_size; }
static uint index_of(uint thread) { return (thread - 1) % group_size; }
static bool same_simdgroup(uint thread, const Now& now) {
  return group_of(thread) == now.group && index_of(thread) / SIMD == now.simdgroup;
}

static void report_race(const Range& r, const Access& a, const Now& now, const char* verb, uint other) {
  fault(a.where ^ 1, "race: %s of %s[byte %ld] by thread %u of threadgroup %u, %s by thread %u of threadgroup %u with no "
        "barrier of this memory between (after line %d)", a.write ? "write" : "read", r.name, long(a.at - r.low),
        now.index, now.group, verb, index_of(other), group_of(other), worker->current->line);
}

static void check_against_writer(const Cell& c, const Range& r, const Access& a, const Now& now) {
  if (!c.writer || c.writer == now.thread || (a.atomic && c.atomic_write)) return;
  bool by_barrier = group_of(c.writer) == now.group && c.write_interval != now.interval;
  bool by_simdgroup = same_simdgroup(c.writer, now) && c.write_simd_interval < now.simd_interval;
  if (!by_barrier && !by_simdgroup) report_race(r, a, now, "written", c.writer);
}

static void check_against_readers(const Cell& c, const Range& r, const Access& a, const Now& now) {
  if (!c.reader || (c.reader == now.thread && c.readers == ONE_THREAD)) return;
  bool here = c.readers != SEVERAL_THREADGROUPS && group_of(c.reader) == now.group;
  bool by_barrier = here && c.read_interval != now.interval;
  bool by_simdgroup = c.readers <= ONE_SIMDGROUP && same_simdgroup(c.reader, now) && c.read_simd_interval < now.simd_interval;
  if (!by_barrier && !by_simdgroup) report_race(r, a, now, "read", c.reader);
}

static void note_read(Cell& c, const Now& now) {
  if (c.reader && (c.readers == SEVERAL_THREADGROUPS || group_of(c.reader) != now.group)) {
    c.readers = SEVERAL_THREADGROUPS;
  } else if (!c.reader || c.read_interval != now.interval) {
    c = {c.writer, c.write_interval, c.write_simd_interval, now.thread, now.interval, now.simd_interval, ONE_THREAD,
         c.atomic_write};
  } else if (c.reader != now.thread) {
    uint readers = same_simdgroup(c.reader, now) ? ONE_SIMDGROUP : ONE_THREADGROUP;
    if (readers > c.readers) c.readers = readers;
  }
  if (now.simd_interval > c.read_simd_interval) c.read_simd_interval = now.simd_interval;
}

static void check_cells(const Range& r, Access a) {
  Now now = now_for(r.kind);
  for (size_t i = 0; i < a.bytes; i++, a.at++) {
    Cell& c = r.cells[a.at - r.low];
    check_against_writer(c, r, a, now);
    if (a.write) {
      check_against_readers(c, r, a, now);
      c.writer = now.thread, c.write_interval = now.interval, c.write_simd_interval = now.simd_interval;
      c.atomic_write = a.atomic;
      continue;
    }
    if (!c.writer && r.kind != INITIALISED_OUTPUT)
      fault(a.where ^ 3, "uninitialised read of %s[byte %ld] by thread %u of threadgroup %u (after line %d)", r.name,
            long(a.at - r.low), now.index, now.group, worker->current->line);
    if (!a.atomic) note_read(c, now);
  }
}

static void count_bytes(const Range& r, const Access& a) {
  uint64_t* traffic = r.traffic[a.write];
  uint* touched = r.touched[a.write] + (a.at - r.low);
  uint group = worker->threadgroup_index + 1;
  traffic[0] += a.bytes;
  for (size_t i = 0; i < a.bytes; i++) {
    traffic[1] += touched[i] != group;
    traffic[2] += touched[i] == 0;
    touched[i] = group;
  }
}

static void report_outside(const Access& a) {
  const Range* nearest = nullptr;
  for (int i = 0; i < range_count; i++) {
    const Range& r = ranges[i];
    if (r.kind != THREADGROUP_MEMORY && (!nearest || llabs(a.at - r.low) < llabs(a.at - nearest->low))) nearest = &r;
  }
  fault(a.where, "out of bounds: %s of %zu bytes at %s[byte %ld] of %ld by thread %u of threadgroup %u (after line %d)",
        a.write ? "write" : "read", a.bytes, nearest->name, long(a.at - nearest->low),
        long(nearest->high - nearest->low), worker->current->index, worker->threadgroup_index, worker->current->line);
}

static void note_access(const Access& a) {
  if (!range_count || !worker || !worker->current) return;
  const Range* range = nullptr;
  for (int i = 0; i < range_count && !range; i++)
    if (a.at >= ranges[i].low && a.at < ranges[i].high) range = &ranges[i];
  if (!range || a.at + a.bytes > range->high) {
    if (checked->check && (range || (a.at + a.bytes > checked->arena_low && a.at < checked->arena_high))) report_outside(a);
    return;
  }
  if (range->traffic) count_bytes(*range, a);
  if (!checked->check) return;
  if (range->cells) check_cells(*range, a);
  else if (a.write) fault(a.where ^ 2, "write to input %s[byte %ld] by thread %u of threadgroup %u", range->name,
                          long(a.at - range->low), worker->current->index, worker->threadgroup_index);
}

// The names that clang's -fsanitize=thread calls.
#define HERE uint64_t(__builtin_return_address(0)) << 3
extern "C" {
#define HOOKS(n)                                                                                            \
  void __tsan_read##n(void* p) { note_access({(char*)p, n, false, false, HERE}); }                          \
  void __tsan_write##n(void* p) { note_access({(char*)p, n, true, false, HERE}); }                          \
  void __tsan_unaligned_read##n(void* p) { note_access({(char*)p, n, false, false, HERE}); }                \
  void __tsan_unaligned_write##n(void* p) { note_access({(char*)p, n, true, false, HERE}); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  note_access({(char*)from, n, false, false, HERE});
  note_access({(char*)to, n, true, false, HERE});
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  note_access({(char*)from, n, false, false, HERE});
  note_access({(char*)to, n, true, false, HERE});
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  note_access({(char*)to, n, true, false, HERE});
  return memset(to, value, n);
}

// mode 0: load, 1: read and write, 2: store. Under random order another thread may come first.
void msl_atomic(const void* p, size_t n, int mode) {
  Worker* w = worker;
  w->counters.atomics++;
  if (mode != 2) note_access({(char*)p, n, false, true, HERE});
  if (mode != 0) note_access({(char*)p, n, true, true, HERE});
  if (w->launch->order != RANDOM) return;
  make_ready(w->current);
  wait_here();
}
}
