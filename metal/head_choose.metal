// The best logits of a part of the vocabulary, for each row: a product of skinny.metal whose results go no further than
// the threadgroup that made them.
#pragma METAL fp contract(off)

constant constexpr int PART = 512;      // tokens of a threadgroup
constant constexpr int SIMDGROUPS = 16;
constant constexpr int OWN = PART / SIMDGROUPS;

// One threadgroup: tokens from part * PART on, rows from first_row on, KEPT (1 or 64) items each. `temperature` is that
// of the row whose sum the lane gets.
template <int ROWS, int COLUMNS, int KEPT, bool CAPPED, typename T, typename Weights>
METAL_FUNC void head_part(
    const device T* x, const thread Weights& weights, device ulong* items, int rows, int tokens, int depth,
    int first_row, int part, int parts, float cap, float temperature, threadgroup float* logits, uint lane, uint simd) {
  static_assert(OWN % COLUMNS == 0, "a simdgroup's tokens are whole tiles");
  for (int own = 0; own < OWN; own += COLUMNS) {
    const int place = simd * OWN + own;
    float sums[ROWS * COLUMNS];
    if (part * PART + place < tokens) {
      skinny_sums<ROWS, COLUMNS>(x, weights, rows, tokens, depth, first_row, part * PART + place, lane, sums);
    }
    if (int(lane) < ROWS * COLUMNS) {
      const int at = place + int(lane) % COLUMNS;
      logits[int(lane) / COLUMNS * PART + at] =
          part * PART + at < tokens ? ranked_logit<T, CAPPED>(sums[0], cap, temperature) : -INFINITY;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int row = simd; row < min(ROWS, rows - first_row); row += SIMDGROUPS) {
    threadgroup float* own = logits + row * PART;
    device ulong* to = items + (long(first_row + row) * parts + part) * KEPT;
    if (KEPT == BEST) {
      write_best<PART / 32>(own, part * PART, to, lane);
    } else {
      ulong best = 0;
      for (int i = lane; i < PART; i += 32) {
        best = better_of(best, item_of(order_of(own[i]), part * PART + i));
      }
      best = best_of_lanes(best);
      if (lane == 0) {
        *to = best;
      }
    }
  }
}
