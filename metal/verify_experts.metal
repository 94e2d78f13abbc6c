// The expert products of a MoE layer (26B-A4B): gate + up + GeGLU, down, combine. After expert_rows.metal.

constant constexpr float GELU_SLOPE = -1.5957691216057308f;  // -2 sqrt(2 / pi)

// gelu(gate) by tanh, written as gate / (1 + exp(-2u)).
METAL_FUNC float gelu(float gate) {
  return gate / (1.0f + precise::exp(GELU_SLOPE * metal::fma(0.044715f * gate * gate, gate, gate)));
}

// The row of x of a pair -> gelu(gate) * up at the pair's number, rounded once.
template <typename T, int N, int SLOTS>
struct GatedPairs {
  const device T* x;
  const device int* order;
  device T* gated;
  uint skipped;  // columns of the experts before this one

  METAL_FUNC uint row(uint at) const {
    return uint(order[at]) / SLOTS;
  }
  template <int COLUMNS>
  METAL_FUNC void write(float sum, uint first, uint count, uint column, uint lane) const {
    const float up = simd_shuffle_xor(sum, ushort(1));
    if (lane % 2 == 0 && lane / COLUMNS < count) {
      const uint pair = order[first + lane / COLUMNS];
      gated[pair * N + column - skipped + lane % COLUMNS / 2] = T(gelu(sum) * up);
    }
  }
};

// The gated row of a pair -> its expert's output, in float32 for `combine_row`.
template <typename T, int N>
struct DownPairs {
  const device T* x;
  const device int* order;
  device float* outputs;
  uint skipped;

  METAL_FUNC uint row(uint at) const {
    return order[at];
  }
  template <int COLUMNS>
  METAL_FUNC void write(float sum, uint first, uint count, uint column, uint lane) const {
    if (lane / COLUMNS < count) {
      const uint pair = order[first + lane / COLUMNS];
      outputs[pair * N + column - skipped + lane % COLUMNS] = sum;
    }
  }
};

// Pairs begin .. end of `order` against COLUMNS columns from `column` on, ROWS at a time.
template <typename T, int ROWS, int COLUMNS, int WORDS, typename Columns, typename Pairs>
METAL_FUNC void run_tiles(
    thread Columns& columns, const thread Pairs& pairs, uint column, uint begin, uint end, uint lane) {
  for (uint first = begin; first < end; first += ROWS) {
    const uint count = min(end - first, uint(ROWS));
    PickedRows<T, ROWS> rows;
    rows.x = pairs.x;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      rows.start[r] = uint(r) < count ? pairs.row(first + r) * (WORDS * WORD) : 0;
    }
    const float sum = dot_rows<ROWS, COLUMNS, WORDS>(columns, rows, count, lane);
    pairs.template write<COLUMNS>(sum, first, count, column, lane);
    columns.next();
  }
}

// A run against a simdgroup's WIDE columns. TILE is the longest run to expect (1, SHORT or LONG; the longer ones' code
// is left out) and KEEP says that there may be longer ones: any run is computed, only weights may be read again.
template <typename T, int TILE, bool KEEP, typename Columns, typename Pairs, typename Kept>
METAL_FUNC void run_pairs(
    thread Columns& columns, const thread Pairs& pairs, uint begin, uint end, threadgroup Kept* words,
    threadgroup float2* affine, uint lane) {
  constexpr int WORDS = Columns::Matrix::WORDS;
  if (TILE == 1 || end - begin == 1) {
    run_tiles<T, 1, WIDE, WORDS>(columns, pairs, columns.column, begin, end, lane);
  } else if (TILE == SHORT || end - begin <= uint(SHORT)) {
    run_tiles<T, SHORT, WIDE, WORDS>(columns, pairs, columns.column, begin, end, lane);
  } else {
    for (int taken = 0; taken < WIDE; taken += WIDE / 2) {
      Columns half_of = columns.part(taken);
      if (KEEP) {
        KeptColumns<Columns> kept = {half_of, words, affine, false};
        run_tiles<T, LONG, WIDE / 2, WORDS>(kept, pairs, half_of.column, begin, end, lane);
      } else {
        run_tiles<T, LONG, WIDE / 2, WORDS>(half_of, pairs, half_of.column, begin, end, lane);
      }
    }
  }
}

struct Run {
  uint expert;
  uint begin;
  uint end;  // begin where there is no such run
};

METAL_FUNC Run find_run(const device int* runs, uint index) {
  if (index >= uint(runs[0])) {
    return {0, 0, 0};
  }
  const device int* run = runs + 1 + 3 * index;
  return {uint(run[0]), uint(run[1]), uint(run[1] + run[2])};
}

// Outputs of a row's pairs times their weights, added in slot order -> combined[N], rounded to T.
template <typename T, int N, int SLOTS, int THREADS, typename Weights>
METAL_FUNC void combine_row(
    const device float* outputs, Weights weights, uint row, uint thread_index, threadgroup T* combined) {
  for (uint n = thread_index; n < uint(N); n += THREADS) {
    float sum = 0.0f;
    for (uint pair = row * SLOTS; pair < (row + 1) * SLOTS; pair++) {
      sum = metal::fma(float(weights[pair]), outputs[pair * N + n], sum);
    }
    combined[n] = T(sum);
  }
}

// RMSNorm of a row in threadgroup memory; each thread reads what it has written itself.
template <typename T, int N, int THREADS>
METAL_FUNC void norm_row(
    const threadgroup T* combined, const device T* gain, float eps, threadgroup float* partial, device T* out,
    uint thread_index, uint lane, uint simd) {
  float squares = 0.0f;
  for (uint n = thread_index; n < uint(N); n += THREADS) {
    squares = metal::fma(float(combined[n]), float(combined[n]), squares);
  }
  squares = simd_sum(squares);
  if (lane == 0) {
    partial[simd] = squares;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (int i = 0; i < THREADS / 32; i++) {
    total += partial[i];
  }
  const float inverse = precise::rsqrt(total / N + eps);
  for (uint n = thread_index; n < uint(N); n += THREADS) {
    out[n] = T(float(gain[n]) * float(T(float(combined[n]) * inverse)));
  }
}
