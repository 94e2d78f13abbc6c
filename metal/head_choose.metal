// A token from a head in two launches, no row of logits in memory. The first makes the best item of each group of eight
// neighbouring tokens, in as many threadgroups as stock MLX has for the product alone; the best item of all is greedy's
// choice. To draw, the second finds the 64 groups with the best items: the 64 best tokens are in them. Where a group's
// second best logit may count too it computes that group's product again: at most 512 columns a row, a 500th of the head.
#pragma METAL fp contract(off)

constant constexpr int NEIGHBOURS = 8;       // tokens
constant constexpr int SIMDGROUPS = 2;  // of the threadgroup that has one
constant constexpr int OWN = NEIGHBOURS / SIMDGROUPS;

// One threadgroup: tokens from group * NEIGHBOURS on, rows from first_row on. items, seconds [row][groups]. `temperature` is
// that of the row whose sum the lane gets.
template <int ROWS, int COLUMNS, bool CAPPED, typename T, typename Weights>
METAL_FUNC void head_group(
    const device T* x, const thread Weights& weights, device ulong* items, device uint* seconds, int rows, int tokens,
    int depth, int first_row, int group, int groups, float cap, float temperature, threadgroup float* logits, uint lane,
    uint simd) {
  static_assert(OWN % COLUMNS == 0, "a simdgroup's tokens are whole tiles");
  static_assert(ROWS <= SIMDGROUPS * 32, "a row's best has a thread");
  for (int own = 0; own < OWN; own += COLUMNS) {
    const int place = simd * OWN + own;
    float sums[ROWS * COLUMNS];
    if (group * NEIGHBOURS + place < tokens) {
      skinny_sums<ROWS, COLUMNS>(x, weights, rows, tokens, depth, first_row, group * NEIGHBOURS + place, lane, sums);
    }
    if (int(lane) < ROWS * COLUMNS) {
      const int at = place + int(lane) % COLUMNS;
      logits[int(lane) / COLUMNS * NEIGHBOURS + at] =
          group * NEIGHBOURS + at < tokens ? ranked_logit<T, CAPPED>(sums[0], cap, temperature) : -INFINITY;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int row = simd * 32 + lane;
  if (row < min(ROWS, rows - first_row)) {
    ulong best = 0;
    uint second = 0;
    for (int i = 0; i < NEIGHBOURS; i++) {
      const ulong item = item_of(order_of(logits[row * NEIGHBOURS + i]), group * NEIGHBOURS + i);
      second = max(second, uint((item > best ? best : item) >> 32));
      best = better_of(best, item);
    }
    const size_t at = size_t(first_row + row) * groups + group;
    items[at] = best;
    seconds[at] = second;
  }
}

// How many of all threads' `own` there are. Two sets of tallies in turn: one barrier a call is enough.
METAL_FUNC int count_of_threads(int own, threadgroup int* tallies, int turn, uint lane, uint simd) {
  constexpr int simdgroups = MERGE_THREADS / 32;
  own = simd_sum(own);
  threadgroup int* set = tallies + turn % 2 * simdgroups;
  if (lane == 0) {
    set[simd] = own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(int(lane) < simdgroups ? set[lane % simdgroups] : 0);
}

// The best min(64, count) of `count` items into picked[], in any order. One threadgroup; count at most
// 64 * MERGE_THREADS. Whoever reads picked[] needs a barrier first.
//
// Each thread finds the best of its own items first: the best 64 belong to the 64 threads with the best of these.
METAL_FUNC void pick_best(
    const device ulong* items, int count, threadgroup ulong* heads, threadgroup uint* order, threadgroup int* tallies,
    threadgroup atomic_uint* filled, threadgroup ulong* picked, uint worker, uint lane, uint simd) {
  constexpr int each = BEST * BEST / MERGE_THREADS;
  ulong head = 0;
  for (int i = worker; i < count; i += MERGE_THREADS) {
    head = better_of(head, items[i]);
  }
  heads[worker] = head;
  if (worker == 0) {
    atomic_store_explicit(filled, 0, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int before = 0;
  for (int i = 0; i < MERGE_THREADS; i++) {
    before += heads[i] > head;
  }
  if (head != 0 && before < BEST) {
    order[before] = worker;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int used = min(count, BEST);
  ulong own[each];
#pragma clang loop unroll(full)
  for (int i = 0; i < each; i++) {
    const int place = worker + i * MERGE_THREADS;
    const int at = int(order[place % used]) + place / used * MERGE_THREADS;
    own[i] = at < count ? items[at] : 0;
  }
  // An edge that so many reach and no more, bit by bit from the top; all items are different.
  ulong edge = 0;
  int reached = 0;
  int turn = 0;
  for (ulong bit = 1ul << 63; bit != 0 && reached != used; bit >>= 1) {
    int reaching = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < each; i++) {
      reaching += own[i] >= (edge | bit);
    }
    const int all = count_of_threads(reaching, tallies, turn++, lane, simd);
    if (all >= used) {
      edge |= bit;
      reached = all;
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < each; i++) {
    if (own[i] >= edge) {
      picked[atomic_fetch_add_explicit(filled, 1, memory_order_relaxed)] = own[i];
    }
  }
}

// A row's best 64 tokens, sorted, from its groups' items and second best logits. One threadgroup of MERGE_THREADS;
// whoever reads best[] needs a barrier first.
template <bool CAPPED, typename T, typename Weights>
METAL_FUNC void best_of_groups(
    const device T* x, const thread Weights& weights, const device ulong* items, const device uint* seconds, int tokens,
    int depth, int groups, float cap, float temperature, threadgroup ulong* found, threadgroup uint* order,
    threadgroup int* tallies, threadgroup atomic_uint* filled, threadgroup ulong* picked, threadgroup ulong* best,
    uint worker, uint lane, uint simd) {
  static_assert(BEST * NEIGHBOURS == MERGE_THREADS, "a token has a thread");
  pick_best(items, groups, found, order, tallies, filled, picked, worker, lane, simd);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // What a group's second best must reach: the least of 64 known tokens, or anything where there are fewer.
  const uint least =
      groups < BEST ? 0 : simd_min(min(uint(picked[lane] >> 32), uint(picked[lane + 32] >> 32)));
  for (int i = simd; i < BEST; i += MERGE_THREADS / 32) {
    const ulong item = i < groups ? picked[i] : 0;
    const int group = i < groups ? int(id_of(item)) / NEIGHBOURS : 0;
    const bool open = i < groups && seconds[group] >= least;
    ulong own = lane == 0 ? item : 0;
    if (open) {
      float sums[NEIGHBOURS];
      skinny_sums<1, NEIGHBOURS>(x, weights, 1, tokens, depth, 0, group * NEIGHBOURS, lane, sums);
      const int token = group * NEIGHBOURS + int(lane);
      own = token < tokens ? item_of(order_of(ranked_logit<T, CAPPED>(sums[0], cap, temperature)), token) : 0;
    }
    if (int(lane) < NEIGHBOURS) {
      found[i * NEIGHBOURS + lane] = own;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const ulong item = found[worker];
  int better = 0;
  for (int i = 0; i < MERGE_THREADS; i++) {
    better += found[i] > item;
  }
  if (item != 0 && better < BEST) {
    best[better] = item;
  }
}
