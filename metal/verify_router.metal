// The router of a MoE layer (26B-A4B): scores, the best TOP_K experts and their weights, pairs sorted by expert.
// After expert_rows.metal.

// One simdgroup: 1 / sqrt(mean(x^2) + eps) of a row.
template <typename T, int K>
METAL_FUNC float inverse_rms(const device T* row, float eps, uint lane) {
  float squares = 0.0f;
  for (uint word = lane; word < uint(K / WORD); word += CHAINS) {
    float x[WORD];
    load_word(row + word * WORD, x);
#pragma clang loop unroll(full)
    for (int k = 0; k < WORD; k++) {
      squares = metal::fma(x[k], x[k], squares);
    }
  }
  return precise::rsqrt(simd_sum(squares) / K + eps);
}

// As mx.fast.rms_norm rounds: to T before the gain and after it.
template <typename T>
METAL_FUNC T normed(float x, float gain, float inverse) {
  return T(gain * float(T(x * inverse)));
}

template <typename T, int ROWS, int K>
struct NormedRows {
  const device T* x;
  const device T* gain;
  float inverse[ROWS];

  METAL_FUNC void word(int r, uint word, thread float* to) const {
    float values[WORD];
    float gains[WORD];
    load_word(x + r * K + word * WORD, values);
    load_word(gain + word * WORD, gains);
#pragma clang loop unroll(full)
    for (int k = 0; k < WORD; k++) {
      to[k] = float(normed<T>(values[k], gains[k], inverse[r]));
    }
  }
};

// Simdgroup `simd` of `simds`: the scores of COLUMNS experts for rows first .. first + count, rounded to T, and its
// share of these rows' other norm, which the experts read.
template <typename T, int ROWS, int COLUMNS, int K, int EXPERTS, typename W>
METAL_FUNC void score_rows(
    W router, const device T* x, const device T* router_gain, const device T* experts_gain, float eps, uint first,
    uint count, device T* scores, device T* rows_for_experts, uint simd, uint simds, uint lane) {
  const device T* own = x + first * K;
  NormedRows<T, ROWS, K> rows;
  rows.x = own;
  rows.gain = router_gain;
#pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    rows.inverse[r] = 0.0f;
    if (uint(r) < count) {
      rows.inverse[r] = inverse_rms<T, K>(own + r * K, eps, lane);
      for (uint n = simd * 32 + lane; n < uint(K); n += simds * 32) {
        rows_for_experts[(first + r) * K + n] =
            normed<T>(float(own[r * K + n]), float(experts_gain[n]), rows.inverse[r]);
      }
    }
  }
  const OneMatrix<W> columns = {router, simd * COLUMNS};
  const float score = dot_rows<ROWS, COLUMNS, W::WORDS>(columns, rows, count, lane);
  if (lane / COLUMNS < count) {
    scores[(first + lane / COLUMNS) * EXPERTS + simd * COLUMNS + lane % COLUMNS] = T(score);
  }
}

// float32 as an unsigned number of the same order, never 0; NaN above all, -0 equal to 0.
METAL_FUNC uint sortable(float value) {
  uint bits = as_type<uint>(value + 0.0f);
  return isnan(value) ? 0xFFFFFFFFu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

METAL_FUNC float unsortable(uint key) {
  return as_type<float>(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// One simdgroup, one row: the TOP_K best scores in ascending order, of equal ones the higher ids last, which is what
// mx.argpartition takes; their softmax times the experts' own scales. Integer comparisons, so that NaN picks real ids.
template <typename T, int EXPERTS, int TOP_K, typename Scores, typename Scales>
METAL_FUNC void choose_row(
    Scores scores, Scales scales, uint lane, threadgroup ushort* ids, device uint* chosen, device T* weights) {
  constexpr int OWN = (EXPERTS + 31) / 32;
  uint keys[OWN];
  for (int i = 0; i < OWN; i++) {
    uint id = lane + 32 * i;
    keys[i] = id < uint(EXPERTS) ? sortable(float(scores[id])) : 0;
  }
  float best[TOP_K];
  uint own_id = 0;
  for (int slot = TOP_K - 1; slot >= 0; slot--) {
    uint highest = 0;
    for (int i = 0; i < OWN; i++) {
      highest = max(highest, keys[i]);
    }
    highest = simd_max(highest);
    int id = -1;
    for (int i = 0; i < OWN; i++) {
      id = keys[i] == highest ? int(lane + 32 * i) : id;
    }
    id = simd_max(id);
    for (int i = 0; i < OWN; i++) {
      keys[i] = id == int(lane + 32 * i) ? 0 : keys[i];
    }
    best[slot] = unsortable(highest);
    own_id = lane == uint(slot) ? uint(id) : own_id;
  }
  float total = 0.0f;
  float own = 0.0f;
  for (int slot = 0; slot < TOP_K; slot++) {
    float part = precise::exp(best[slot] - best[TOP_K - 1]);
    total += part;
    own = lane == uint(slot) ? part : own;
  }
  if (lane < uint(TOP_K)) {
    ids[lane] = ushort(own_id);
    chosen[lane] = own_id;
    weights[lane] = T(own / total * float(scales[own_id]));
  }
}

// One threadgroup, at least EXPERTS threads: a stable counting sort. Thread e looks after expert e.
// order: pairs by expert, then by number. runs: how many experts are in use, then (expert, begin, length) of each.
// After a barrier over `ids` [pairs].
METAL_FUNC void sort_pairs(
    const threadgroup ushort* ids,
    uint pairs,
    threadgroup uint* in_use,
    device int* order,
    device int* runs,
    uint expert,
    uint simds,
    uint lane,
    uint simd) {
  uint begin = 0;
  uint length = 0;
  for (uint pair = 0; pair < pairs; pair++) {
    begin += ids[pair] < expert;
    length += ids[pair] == expert;
  }
  uint used = length > 0;
  uint index = simd_prefix_exclusive_sum(used);
  if (lane == 31) {
    in_use[simd] = index + used;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < simd; i++) {
    index += in_use[i];
  }
  if (simd == simds - 1 && lane == 31) {
    runs[0] = index + used;
  }
  if (used) {
    runs[1 + 3 * index] = expert;
    runs[2 + 3 * index] = begin;
    runs[3 + 3 * index] = length;
    for (uint pair = 0; pair < pairs; pair++) {
      if (ids[pair] == expert) {
        order[begin++] = pair;
      }
    }
  }
}
