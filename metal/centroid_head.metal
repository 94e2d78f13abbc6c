// The head of E2B's and E4B's drafters: clusters of tokens are scored first, then the tokens of the best clusters.
//
// One threadgroup a (cluster, row): each scores all clusters, for that is little work, and takes the one whose rank is
// its own number; so that one launch does both without a threadgroup waiting for another.
#pragma METAL fp contract(off)

constant constexpr int GROUP_THREADS = 512;
constant constexpr int GROUP_SIMDGROUPS = GROUP_THREADS / 32;
constant constexpr int AT_ONCE = 8;  // columns of a simdgroup

// Rows of a table in the order of a list of their numbers.
template <typename I, typename Weights>
struct Listed {
  const device I* ids;
  Weights table;

  METAL_FUNC void word(int column, int word, thread float* w) const {
    table.word(int(ids[column]), word, w);
  }
};

template <typename I, typename Weights>
METAL_FUNC Listed<I, Weights> listed(const device I* ids, Weights table) {
  return {ids, table};
}

// sums[column] of one row for all columns, rounded to the row's type. One threadgroup.
template <typename T, typename Weights>
METAL_FUNC void threadgroup_sums(
    const device T* x, const thread Weights& weights, int columns, int depth, threadgroup float* sums, uint lane,
    uint simd) {
  for (int first = simd * AT_ONCE; first < columns; first += GROUP_SIMDGROUPS * AT_ONCE) {
    float own[AT_ONCE];
    skinny_sums<1, AT_ONCE>(x, weights, 1, columns, depth, 0, first, lane, own);
    if (int(lane) < AT_ONCE && first + int(lane) < columns) {
      sums[first + lane] = float(T(own[0]));
    }
  }
}

// The number of the score with exactly `rank` better ones: greater, or equal and before it. One threadgroup.
template <int COUNT>
METAL_FUNC int number_of_rank(
    const threadgroup float* scores, int rank, threadgroup int* counts, threadgroup int* found, uint worker, uint lane,
    uint simd) {
  constexpr int OWN = (COUNT + GROUP_THREADS - 1) / GROUP_THREADS;
  uint orders[OWN];
  for (int i = 0; i < OWN; i++) {
    const int at = worker + i * GROUP_THREADS;
    orders[i] = at < COUNT ? order_of(scores[at]) : 0;
  }
  uint edge = 0;  // the largest that more than `rank` scores reach: the order of the one that is looked for
  int turn = 0;
  for (uint bit = 0x80000000u; bit != 0; bit >>= 1) {
    int own = 0;
    for (int i = 0; i < OWN; i++) {
      own += orders[i] >= (edge | bit);
    }
    own = simd_sum(own);
    turn ^= GROUP_SIMDGROUPS;  // two sets of counts: one barrier a turn is enough
    if (lane == 0) {
      counts[turn + simd] = own;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int all = simd_sum(int(lane) < GROUP_SIMDGROUPS ? counts[turn + lane % GROUP_SIMDGROUPS] : 0);
    edge |= all > rank ? bit : 0;
  }
  for (int i = 0; i < OWN; i++) {
    const int at = worker + i * GROUP_THREADS;
    if (at < COUNT && orders[i] == edge) {
      int better = 0;
      for (int j = 0; j < COUNT; j++) {
        const uint other = order_of(scores[j]);
        better += other > edge || (other == edge && j < at);
      }
      if (better == rank) {
        *found = at;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return *found;
}

// KEPT items, best first, of the logits of COUNT tokens. One threadgroup.
template <int KEPT, int COUNT, typename I>
METAL_FUNC void write_listed(
    const threadgroup float* logits, float temperature, const device I* ids, threadgroup ulong* items, device ulong* to,
    uint worker) {
  for (int i = worker; i < max(COUNT, KEPT); i += GROUP_THREADS) {
    // Where there are too few tokens the list ends in what is worse than any.
    items[i] = i < COUNT ? item_of(order_of(ranked_logit<float, false>(logits[i], 1.0f, temperature)), uint(ids[i])) : 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = worker; i < max(COUNT, KEPT); i += GROUP_THREADS) {
    int better = i < COUNT ? 0 : i;
    for (int j = 0; i < COUNT && j < COUNT; j++) {
      better += items[j] > items[i];
    }
    if (better < KEPT) {
      to[better] = items[i];
    }
  }
}
