// Attention of a verify pass's rows, and of the drafter's one row, over the K/V buffers in place (attention.metal).
//
// A threadgroup reads a leaf of keys, or a slice of a partition's values, once for all rows of the query heads that
// share the K/V head: row r is head r % GQA of position r / GQA, up to ROWS of them; a launch's chunks have more.
// With a window a partition is one leaf and `attend_leaf` does all of it. Without, `weigh_leaf` leaves the weights in
// device memory and `sum_values` takes a slice of a partition's values: so no thread needs more than 16 sums, however
// many rows there are. Where keys are few, a leaf is shared out to PIECES threadgroups by `score_keys`, which leaves
// scores, and slices are narrower: how the work is shared out changes no bit. `merge_partitions` ends all three.
// Only keys that some row sees are read, and only partitions that hold one are written.

// Scores of the keys that THREADS threads hold, of which this thread has part of `place` of `leaf`; of row r they go to
// scores[r * row_stride + place * key_stride], -inf for what the row does not see.
template <int D, int GQA, int STAGED, int THREADS, typename Q, typename T, typename To>
METAL_FUNC void score_rows(
    const device Q* queries, const device T* keys, thread const Rows& rows, int leaf, int place, int heads, To scores,
    int row_stride, int key_stride, threadgroup float* staged, uint thread_index) {
  constexpr int lanes = lanes_of(D);
  const int count = rows.count * GQA;
  const int part = thread_index % lanes;
  const int key = leaf * LEAF + place;
  float own[D / lanes];
  load_key<D>(keys, rows.slot(key), rows.live(key), part, own);
  for (int low = 0; low < count; low += STAGED) {
    const int high = min(low + STAGED, count);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_queries<D, GQA, THREADS>(queries, heads * D, low, high, staged, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int row = low; row < high; row++) {
      const float score = score_of<D>(own, staged + (row - low) * D, part);
      if (part == 0) {
        scores[row * row_stride + place * key_stride] = rows.sees(row / GQA, key) ? score : -INFINITY;
      }
    }
  }
}

// Weights of a leaf, [row][key] in threadgroup memory; peak and total of row r go to tops[r * stride].
template <int D, int GQA, int STAGED, typename Q, typename T>
METAL_FUNC void leaf_weights(
    const device Q* queries, const device T* keys, thread const Rows& rows, int leaf, int heads, device float2* tops,
    int stride, threadgroup float* staged, threadgroup float* weights, uint lane, uint simd) {
  constexpr int threads = simdgroups_of(D) * 32;
  const int thread_index = simd * 32 + lane;
  const int count = rows.count * GQA;
  score_rows<D, GQA, STAGED, threads>(
      queries, keys, rows, leaf, thread_index / lanes_of(D), heads, weights, LEAF, 1, staged, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int low = 0; low < count; low += threads / LEAF) {
    const int row = low + thread_index / LEAF;
    const int at = row * LEAF + thread_index % LEAF;
    const float score = row < count ? weights[at] : -INFINITY;
    const float peak = peak_of_leaf(score);
    const float weight = weight_of(score, peak);
    const float total = total_of_leaf(weight);
    if (row < count) {
      weights[at] = weight;
      if (thread_index % LEAF == 0) {
        tops[row * stride] = float2(peak, total);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// A partition that is one leaf: tops [row][parts] and sums [row][parts][D] at `part`, counted from the lowest seen.
template <int D, int GQA, int STAGED, typename Q, typename T>
METAL_FUNC void attend_leaf(
    const device Q* queries, const device T* keys, const device T* values, thread const Rows& rows, int heads, int part,
    int parts, device float2* tops, device float* sums, threadgroup float* staged, threadgroup float* weights, uint lane,
    uint simd) {
  constexpr int threads = simdgroups_of(D) * 32;
  constexpr int columns = D > threads ? D / threads : 1;
  const int leaf = rows.lowest() / LEAF + part;
  if (leaf * LEAF > rows.highest()) {
    return;
  }
  const int column = (simd * 32 + lane) * columns;
  float own[LEAF][columns];  // asked for before the keys are waited for
  const int slot = rows.slot(leaf * LEAF);
  for (int i = 0; i < LEAF; i++) {
    const bool read = rows.live(leaf * LEAF + i) && column < D;
    const device T* from = values + size_t(rows.slot_behind(slot, i)) * D + column;
    vec<T, 2> two = vec<T, 2>(T(0));
    if (read && columns == 2) {
      two = *(const device vec<T, 2>*)from;
    } else if (read) {
      two[0] = *from;
    }
    own[i][0] = float(two[0]);
    own[i][columns - 1] = float(two[columns - 1]);
  }
  const bool edge = !rows.all_see(leaf * LEAF, leaf * LEAF + LEAF - 1);
  leaf_weights<D, GQA, STAGED>(
      queries, keys, rows, leaf, heads, tops + part, parts, staged, weights, lane, simd);
  for (int row = 0; row < rows.count * GQA && column < D; row++) {
    float sum[columns] = {0};
    for (int i = 0; i < LEAF; i++) {
      for (int c = 0; c < columns; c++) {
        sum[c] = with_key(sum[c], weights[row * LEAF + i], own[i][c], edge);
      }
    }
    for (int c = 0; c < columns; c++) {
      sums[(size_t(row) * parts + part) * D + column + c] = sum[c];
    }
  }
}

// The weights of one leaf of a longer partition: tops [leaf][ROWS], weights [leaf][key][ROWS], leaves counted from the
// first of the lowest partition.
template <int D, int GQA, int ROWS, int STAGED, int LEAVES, typename Q, typename T>
METAL_FUNC void weigh_leaf(
    const device Q* queries, const device T* keys, thread const Rows& rows, int heads, int place, device float2* tops,
    device float* weights, threadgroup float* staged, threadgroup float* shared, uint lane, uint simd) {
  const int leaf = rows.lowest() / (LEAF * LEAVES) * LEAVES + place;
  if (leaf * LEAF > rows.highest() || leaf * LEAF + LEAF <= rows.lowest()) {
    return;
  }
  leaf_weights<D, GQA, STAGED>(
      queries, keys, rows, leaf, heads, tops + size_t(place) * ROWS, 1, staged, shared, lane, simd);
  const int count = rows.count * GQA;
  for (int i = simd * 32 + lane; i < LEAF * count; i += simdgroups_of(D) * 32) {
    weights[(size_t(place) * LEAF + i / count) * ROWS + i % count] = shared[i % count * LEAF + i / count];
  }
}

// The scores of one of PIECES equal parts of a leaf's keys: [leaf][key][ROWS] as `weigh_leaf` has weights.
template <int D, int GQA, int ROWS, int STAGED, int LEAVES, int PIECES, typename Q, typename T>
METAL_FUNC void score_keys(
    const device Q* queries, const device T* keys, thread const Rows& rows, int heads, int place, int piece,
    device float* scores, threadgroup float* staged, uint thread_index) {
  constexpr int threads = simdgroups_of(D) / PIECES * 32;
  const int leaf = rows.lowest() / (LEAF * LEAVES) * LEAVES + place;
  if (leaf * LEAF > rows.highest() || leaf * LEAF + LEAF <= rows.lowest()) {
    return;
  }
  score_rows<D, GQA, STAGED, threads>(
      queries, keys, rows, leaf, piece * (LEAF / PIECES) + int(thread_index) / lanes_of(D), heads,
      scores + size_t(place) * LEAF * ROWS, 1, ROWS, staged, thread_index);
}

// The leaves of a partition that some row sees, counted from position 0; `base` is the partition's first.
struct Leaves {
  int base;
  int low;
  int high;  // below low where there are none
};

template <int LEAVES>
METAL_FUNC Leaves leaves_of(thread const Rows& rows, int part) {
  const int base = (rows.lowest() / (LEAF * LEAVES) + part) * LEAVES;
  const int high = base * LEAF > rows.highest() ? -1 : min(base + LEAVES - 1, rows.highest() / LEAF);
  return {base, max(base, rows.lowest() / LEAF), high};
}

// Peaks and totals [leaf][ROWS] of a partition's leaves, as `weigh_leaf` left them.
template <int GQA, int ROWS, int LEAVES, int THREADS>
METAL_FUNC void take_tops(
    const device float2* leaf_tops, thread const Rows& rows, Leaves leaves, threadgroup float* peaks,
    threadgroup float* totals, uint thread_index) {
  const int count = rows.count * GQA;
  for (int i = thread_index; i < (leaves.high - leaves.low + 1) * count; i += THREADS) {
    const int at = (leaves.low - leaves.base + i / count) * ROWS + i % count;
    const float2 top = leaf_tops[at];
    peaks[at] = top.x;
    totals[at] = top.y;
  }
}

// The same from scores.
template <int GQA, int ROWS, int LEAVES, int THREADS>
METAL_FUNC void find_tops(
    const device float* scores, thread const Rows& rows, Leaves leaves, threadgroup float* peaks,
    threadgroup float* totals, uint thread_index) {
  const int count = rows.count * GQA;
  const int all = (leaves.high - leaves.low + 1) * count;
  for (int from = 0; from < all; from += THREADS / LEAF) {
    const int which = from + int(thread_index) / LEAF;
    const int leaf = leaves.low - leaves.base + which / count;
    const int row = which % count;
    const float score = which < all ? scores[(leaf * LEAF + int(thread_index) % LEAF) * ROWS + row] : -INFINITY;
    const float peak = peak_of_leaf(score);
    const float total = total_of_leaf(weight_of(score, peak));
    if (which < all && thread_index % LEAF == 0) {
      peaks[leaf * ROWS + row] = peak;
      totals[leaf * ROWS + row] = total;
    }
  }
}

// SLICE columns of a partition from its leaves' peaks and totals, which are in `factors` and `weights`, and from weights
// or, RAW, scores [leaf][key][ROWS]; a thread sums one column for OWN rows. `peaks` is for RAW. The first slice also
// writes the partition's tops [row][parts].
template <int D, int GQA, int ROWS, int LEAVES, int SLICE, int OWN, int THREADS, bool RAW, typename T>
METAL_FUNC void sum_values(
    const device T* values, const device float* leaf_weights, thread const Rows& rows, Leaves leaves, int part,
    int parts, int slice, device float2* tops, device float* sums, threadgroup float* peaks,
    threadgroup float* factors, threadgroup float* staged, threadgroup float* weights, uint thread_index) {
  static_assert(LEAVES <= LEAF, "a partition's totals take the place of a leaf's weights");
  const int base = leaves.base, low = leaves.low, high = leaves.high;
  const int count = rows.count * GQA;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int row = thread_index; row < count; row += THREADS) {
    float peak = -INFINITY;
    for (int leaf = low; leaf <= high; leaf++) {
      peak = max(peak, factors[(leaf - base) * ROWS + row]);
    }
    float total = 0;
    for (int leaf = low; leaf <= high; leaf++) {
      const int at = (leaf - base) * ROWS + row;
      const float top = factors[at];
      const float factor = scale_between(top, peak);
      if (RAW) {
        peaks[at] = top;
      }
      factors[at] = factor;
      total = fma(factor, weights[at], total);
    }
    if (slice == 0) {
      tops[size_t(row) * parts + part] = float2(peak, total);
    }
  }
  const bool edge = !rows.all_see(low * LEAF, high * LEAF + LEAF - 1);
  const int column = thread_index % SLICE;
  const int own = thread_index / SLICE * OWN;
  float sum[OWN] = {0};
  for (int leaf = low; leaf <= high; leaf++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < LEAF * SLICE; i += THREADS) {
      const int key = leaf * LEAF + i / SLICE;
      const device T* from = values + size_t(rows.slot(key)) * D + slice * SLICE + i % SLICE;
      staged[i] = rows.live(key) ? float(*from) : 0.0f;
    }
    for (int i = thread_index; i < LEAF * count; i += THREADS) {
      const int row = i % count;
      const int at = i / count * ROWS + row;
      const int of_leaf = (leaf - base) * ROWS + row;
      const float weight = leaf_weights[(leaf - base) * LEAF * ROWS + at];
      weights[at] = (RAW ? weight_of(weight, peaks[of_leaf]) : weight) * factors[of_leaf];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < LEAF; i++) {
      for (int row = 0; row < OWN; row++) {
        if (own + row < count) {
          sum[row] = with_key(sum[row], weights[i * ROWS + own + row], staged[i * SLICE + column], edge);
        }
      }
    }
  }
  for (int row = 0; row < OWN; row++) {
    if (own + row < count) {
      sums[(size_t(own + row) * parts + part) * D + slice * SLICE + column] = sum[row];
    }
  }
}

// One row's partitions from `low` to `high`, in this order: WIDTH columns of out, one a thread. The arrays hold WIDTH.
template <int D, int WIDTH, typename Q>
METAL_FUNC void merge_partitions(
    const device float2* tops, const device float* sums, int low, int high, device Q* out, int slice,
    threadgroup float2* shared, threadgroup float* keep, threadgroup float* take, uint thread_index) {
  const int column = slice * WIDTH + thread_index;
  float peak = -INFINITY;
  float total = 0;
  float sum = 0;
  for (int from = low; from <= high; from += WIDTH) {
    const int count = min(WIDTH, high - from + 1);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (int(thread_index) < count) {
      shared[thread_index] = tops[from + thread_index];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (int(thread_index) < count) {
      float before = peak;
      for (int i = 0; i < int(thread_index); i++) {
        before = max(before, shared[i].x);
      }
      const float after = max(before, shared[thread_index].x);
      keep[thread_index] = scale_between(before, after);
      take[thread_index] = scale_between(shared[thread_index].x, after);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < count; i++) {
      const float next = column < D ? sums[size_t(from + i) * D + column] : 0.0f;
      sum = fma(take[i], next, sum * keep[i]);
      total = fma(take[i], shared[i].y, total * keep[i]);
      peak = max(peak, shared[i].x);
    }
  }
  if (column < D) {
    out[column] = Q(total == 0 ? 0.0f : sum / total);
  }
}
