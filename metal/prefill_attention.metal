// Attention of a prefill chunk, in the order of attention.metal: a row has the bits that a verify pass would give it,
// whatever chunk it is in. A threadgroup has TILE rows of one K/V head and walks their keys a span at a time, with two
// sums a row in each thread: its partition's and the row's. Nothing but the result goes to device memory.

constant constexpr int TILE = 8;
constant constexpr int SPAN = 16;  // leaves

METAL_FUNC constexpr int tile_threads(int dim) { return dim < 32 ? 32 : dim; }

// `rows` are the positions of the tile's `count` rows, of which the first is head `head` of its position.
template <int D, int GQA, int LEAVES, typename Q, typename T>
METAL_FUNC void attend_tile(
    const device Q* queries, const device T* keys, const device T* values, thread const Rows& rows, int head, int count,
    int heads, device Q* out, threadgroup float* staged, threadgroup float* weights, threadgroup float* peaks,
    threadgroup float* totals, threadgroup float* keep, threadgroup float* take, uint lane, uint simd) {
  constexpr int threads = tile_threads(D);
  constexpr int lanes = lanes_of(D);
  constexpr int teams = threads / 32 / simdgroups_of(D);  // leaves scored at a time
  const int thread_index = simd * 32 + lane;
  stage_queries<D, GQA, threads>(queries, heads * D, head, head + count, staged, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float peak = -INFINITY;  // of row thread_index, as its total
  float total = 0;
  float sum[TILE] = {0};
  float part[TILE] = {0};
  for (int span = rows.lowest() / (LEAF * SPAN); span <= rows.highest() / (LEAF * SPAN); span++) {
    const int base = span * SPAN;
    const int low = max(base, rows.lowest() / LEAF);
    const int high = min(base + SPAN - 1, rows.highest() / LEAF);
    const bool edge = !rows.all_see(low * LEAF, high * LEAF + LEAF - 1);
    for (int leaf = low + int(simd) / simdgroups_of(D); leaf <= high; leaf += teams) {
      const int place = thread_index / lanes % LEAF;
      const int key = leaf * LEAF + place;
      float own[D / lanes];
      load_key<D>(keys, rows.slot(key), rows.live(key), lane % lanes, own);
      for (int row = 0; row < TILE; row++) {
        const float score = row < count ? score_of<D>(own, staged + row * D, lane % lanes) : 0.0f;
        if (lane % lanes == 0) {
          const bool seen = row < count && rows.sees((head + row) / GQA, key);
          weights[((leaf - base) * LEAF + place) * TILE + row] = seen ? score : -INFINITY;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < (high - low + 1) * TILE * LEAF; i += threads) {
      const int row = i / LEAF % TILE;
      const int leaf = low - base + i / LEAF / TILE;
      const int at = (leaf * LEAF + i % LEAF) * TILE + row;
      const float leaf_peak = peak_of_leaf(weights[at]);
      const float weight = weight_of(weights[at], leaf_peak);
      const float leaf_total = total_of_leaf(weight);
      weights[at] = weight;
      if (i % LEAF == 0) {
        peaks[leaf * TILE + row] = leaf_peak;
        totals[leaf * TILE + row] = leaf_total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < TILE) {
      for (int first = low / LEAVES * LEAVES; first <= high; first += LEAVES) {
        float part_peak = -INFINITY;
        for (int leaf = max(first, low); leaf <= min(first + LEAVES - 1, high); leaf++) {
          part_peak = max(part_peak, peaks[(leaf - base) * TILE + thread_index]);
        }
        float part_total = 0;
        for (int leaf = max(first, low); leaf <= min(first + LEAVES - 1, high); leaf++) {
          const int at = (leaf - base) * TILE + thread_index;
          peaks[at] = scale_between(peaks[at], part_peak);
          part_total = fma(peaks[at], totals[at], part_total);
        }
        const float after = max(peak, part_peak);
        const int at = (first - base) * TILE + thread_index;
        keep[at] = scale_between(peak, after);
        take[at] = scale_between(part_peak, after);
        total = fma(take[at], part_total, total * keep[at]);
        peak = after;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (LEAVES > 1) {
      for (int i = thread_index; i < (high - low + 1) * TILE * LEAF; i += threads) {
        const int at = (low - base) * TILE * LEAF + i;
        weights[at] *= peaks[at / LEAF / TILE * TILE + at % TILE];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int leaf = low; leaf <= high && thread_index < D; leaf++) {
      for (int i = 0; i < LEAF; i++) {
        const int key = leaf * LEAF + i;
        const float value = rows.live(key) ? float(values[size_t(rows.slot(key)) * D + thread_index]) : 0.0f;
        const threadgroup float* from = weights + ((leaf - base) * LEAF + i) * TILE;
#pragma clang loop unroll(full)
        for (int row = 0; row < TILE; row++) {
          part[row] = with_key(part[row], from[row], value, edge);
        }
      }
      if (leaf == high || (leaf + 1) % LEAVES == 0) {
        const int at = (leaf / LEAVES * LEAVES - base) * TILE;
#pragma clang loop unroll(full)
        for (int row = 0; row < TILE; row++) {
          sum[row] = fma(take[at + row], part[row], sum[row] * keep[at + row]);
          part[row] = 0;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (thread_index < TILE) {
    totals[thread_index] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int row = 0; row < count && thread_index < D; row++) {
    const size_t at = size_t((head + row) / GQA) * heads * D + (head + row) % GQA * D + thread_index;
    out[at] = Q(totals[row] == 0 ? 0.0f : sum[row] / totals[row]);
  }
}
