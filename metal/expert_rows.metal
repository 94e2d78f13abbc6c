// The expert products of a MoE layer (26B-A4B): gate + up + GeGLU, down, combine. After skinny.metal, verify_qmm.metal.
//
// A pair is (row of x, one of its chosen experts), numbered row * slots + slot. A run is the pairs of one expert in
// that order (verify_router.metal sorts them). A threadgroup owns a run and a few columns, so that each expert in use
// is read once a round. What a pair adds up, and in which order, does not depend on its run: skinny.metal's order.

constant constexpr int WIDE = 4;   // columns a simdgroup takes against up to SHORT rows
constant constexpr int SHORT = 6;  // SHORT * WIDE and LONG * WIDE / 2 sums a thread: 24
constant constexpr int LONG = 12;  // longer runs go through their columns in several tiles

// Rows of affine weights, one matrix after the other; `load` and `unpack` apart, so that words can be kept as stored.
// Scales: a pointer, to `constant` where there are few.
template <typename Scales, int BITS, int GROUP, int K>
struct AffineRows {
  static_assert(K % GROUP == 0 && GROUP % WORD == 0, "whole groups of whole words");
  enum : int { WORDS = K / WORD, WORDS_A_GROUP = GROUP / WORD, KEPT_A_WORD = 1 };
  typedef typename Packed<BITS>::Raw Raw;
  typedef Raw Kept;
  Packed<BITS> packed;
  Scales scales;
  Scales biases;

  METAL_FUNC Raw load(uint row, uint word) const {
    return packed.raw(long(row) * WORDS + word);
  }
  METAL_FUNC float2 affine(uint row, uint word) const {
    const uint group = row * (WORDS / WORDS_A_GROUP) + word / WORDS_A_GROUP;
    return float2(float(scales[group]), float(biases[group]));
  }
  static METAL_FUNC void keep(Raw raw, threadgroup Kept* to) {
    to[0] = raw;
  }
  static METAL_FUNC Raw again(const threadgroup Kept* from) {
    return from[0];
  }
  static METAL_FUNC void unpack(Raw raw, float2 affine, thread float* w) {
    Packed<BITS>::integers(raw, w);
#pragma clang loop unroll(full)
    for (int k = 0; k < WORD; k++) {
      w[k] = metal::fma(w[k], affine.x, affine.y);
    }
  }
};

template <typename S, int K>
struct DenseRows {
  static_assert(K % WORD == 0, "whole words");
  enum : int { WORDS = K / WORD, WORDS_A_GROUP = WORDS, KEPT_A_WORD = 2 };
  typedef vec<S, 4> Kept;
  struct Raw {
    Kept low;
    Kept high;
  };
  const device S* values;

  METAL_FUNC Raw load(uint row, uint word) const {
    const device Kept* from = (const device Kept*)values + (long(row) * WORDS + word) * 2;
    return {from[0], from[1]};
  }
  METAL_FUNC float2 affine(uint, uint) const {
    return float2(1.0f, 0.0f);
  }
  static METAL_FUNC void keep(Raw raw, threadgroup Kept* to) {
    to[0] = raw.low;
    to[1] = raw.high;
  }
  static METAL_FUNC Raw again(const threadgroup Kept* from) {
    return {from[0], from[1]};
  }
  static METAL_FUNC void unpack(Raw raw, float2, thread float* w) {
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      w[k] = float(raw.low[k]);
      w[k + 4] = float(raw.high[k]);
    }
  }
};

// ROWS rows of x against COLUMNS columns of weights; lane i has the sum of row i / COLUMNS and column i % COLUMNS.
// `columns.word(c, word, w)` and `rows.word(r, word, x)` give eight numbers; count <= ROWS rows are there.
template <int ROWS, int COLUMNS, int WORDS, typename Columns, typename Rows>
METAL_FUNC float dot_rows(const thread Columns& columns, const thread Rows& rows, uint count, uint lane) {
  float sums[ROWS * COLUMNS];
#pragma clang loop unroll(full)
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    sums[i] = 0.0f;
  }
  for (uint word = lane; word < uint(WORDS); word += CHAINS) {
    float w[COLUMNS][WORD];
#pragma clang loop unroll(full)
    for (int c = 0; c < COLUMNS; c++) {
      columns.word(c, word, w[c]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      if (uint(r) < count) {
        float x[WORD];
        rows.word(r, word, x);
#pragma clang loop unroll(full)
        for (int c = 0; c < COLUMNS; c++) {
#pragma clang loop unroll(full)
          for (int k = 0; k < WORD; k++) {
            sums[r * COLUMNS + c] = metal::fma(x[k], w[c][k], sums[r * COLUMNS + c]);
          }
        }
      }
    }
  }
  LaneSums<ROWS * COLUMNS, 1>::add(sums, lane);
  return sums[0];
}

// Columns `column`, `column` + 1, ... of one matrix.
template <typename W>
struct OneMatrix {
  typedef W Matrix;
  W matrix;
  uint column;

  METAL_FUNC typename W::Raw load(int c, uint word) const {
    return matrix.load(column + c, word);
  }
  METAL_FUNC float2 affine(int c, uint word) const {
    return matrix.affine(column + c, word);
  }
  METAL_FUNC void word(int c, uint word, thread float* w) const {
    W::unpack(load(c, word), affine(c, word), w);
  }
  METAL_FUNC OneMatrix part(int columns) const {
    return {matrix, column + columns};
  }
  METAL_FUNC void next() {}
};

// Column `column` + c / 2 of gate (even c) and of up (odd c).
template <typename W>
struct GateAndUp {
  typedef W Matrix;
  W gate;
  W up;
  uint column;

  METAL_FUNC typename W::Raw load(int c, uint word) const {
    return c % 2 ? up.load(column + c / 2, word) : gate.load(column + c / 2, word);
  }
  METAL_FUNC float2 affine(int c, uint word) const {
    return c % 2 ? up.affine(column + c / 2, word) : gate.affine(column + c / 2, word);
  }
  METAL_FUNC void word(int c, uint word, thread float* w) const {
    W::unpack(load(c, word), affine(c, word), w);
  }
  METAL_FUNC GateAndUp part(int columns) const {
    return {gate, up, column + columns / 2};
  }
  METAL_FUNC void next() {}
};

// Columns that a run of more than LONG pairs goes through again: kept as stored the first time. A lane finds its own
// words again without a barrier; scales and biases are kept once a group, by one of the lanes that share it.
template <typename Columns>
struct KeptColumns {
  typedef typename Columns::Matrix W;
  Columns columns;
  threadgroup typename W::Kept* words;  // [columns, WORDS, KEPT_A_WORD]
  threadgroup float2* affine;           // [columns, groups]
  bool again;

  METAL_FUNC void word(int c, uint word, thread float* w) const {
    const uint at = c * W::WORDS + word;
    if (again) {
      W::unpack(W::again(words + at * W::KEPT_A_WORD), affine[at / W::WORDS_A_GROUP], w);
      return;
    }
    const typename W::Raw own = columns.load(c, word);
    const float2 own_affine = columns.affine(c, word);
    W::keep(own, words + at * W::KEPT_A_WORD);
    if (word % W::WORDS_A_GROUP == 0) {
      affine[at / W::WORDS_A_GROUP] = own_affine;
    }
    W::unpack(own, own_affine, w);
  }
  METAL_FUNC void next() {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    again = true;
  }
};

// Rows of x, `start` in elements.
template <typename T, int ROWS>
struct PickedRows {
  const device T* x;
  uint start[ROWS];

  METAL_FUNC void word(int r, uint word, thread float* to) const {
    load_word(x + start[r] + word * WORD, to);
  }
};
