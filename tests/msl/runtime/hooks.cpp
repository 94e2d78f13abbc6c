// What clang's -fsanitize=array-bounds,shift,alignment,integer-divide-by-zero calls, with a line of the source.
#include "worker.h"

struct Site {
  const char* file;
  uint line, column;
};
static void report(const Site* site, const char* what) {
  if (!worker || !worker->current) return;
  fault(0x7000000000ull + site->line * 4096ull + site->column, "%s at line %u, column %u by thread %u of threadgroup %u",
        what, site->line, site->column, worker->current->index, worker->threadgroup_index);
}
extern "C" {
void __ubsan_handle_out_of_bounds(Site* site, uint64_t) { report(site, "array index out of bounds"); }
void __ubsan_handle_shift_out_of_bounds(Site* site, uint64_t, uint64_t) { report(site, "shift by too many bits"); }
void __ubsan_handle_type_mismatch_v1(Site* site, uint64_t) { report(site, "misaligned access"); }
void __ubsan_handle_divrem_overflow(Site* site, uint64_t, uint64_t) {
  report(site, "division by zero");
  stop_launch();
}
}
