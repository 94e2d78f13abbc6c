// Products of a few rows with a large matrix: y[m][n] = sum over k of x[m][k] * w[n][k], in float32, rounded once.
//
// One order of sums, whichever body computes it, for any number of rows, any tile and any place in it:
//   K is cut into words of eight; chain c of 32 takes words c, c + 32, c + 64, ... and within a word k upwards, with
//   one fma each; the 32 chains are added as a binary tree, neighbours 1, 2, 4, 8 and 16 apart, in this order.
// In the scalar body a chain is a lane. In the matrix body it is an element of an accumulator of 8x8, which has the
// same bits where an 8x8x8 multiply-accumulate is eight fma in turn: a chip's self-test says whether it is.
//
// `Weights` gives the numbers: word(column, word, w) eight of them, pairs(column, segment, place, w) the two that lie
// at `place` in each of a segment's four words. K must be a multiple of 32.
#pragma METAL fp contract(off)
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

constant constexpr int CHAINS = 32;
constant constexpr int WORD = 8;
constant constexpr int SEGMENT = 32;                       // k of four words: what a simdgroup of the matrix body takes
constant constexpr int SPLITS = CHAINS * WORD / SEGMENT;  // simdgroups of the matrix body

template <typename T>
METAL_FUNC void load_word(const device T* from, thread float* to) {
  const vec<T, 4> low = ((const device vec<T, 4>*)from)[0];
  const vec<T, 4> high = ((const device vec<T, 4>*)from)[1];
#pragma clang loop unroll(full)
  for (int k = 0; k < 4; k++) {
    to[k] = float(low[k]);
    to[k + 4] = float(high[k]);
  }
}

// Adds each of COUNT values over the lanes; lane n then has the sum of value n in values[0]. While there are two
// values, a lane gives one away and keeps the other: COUNT values cost about COUNT shuffles, and no sum's order changes.
template <int COUNT, int APART>
struct LaneSums {
  static METAL_FUNC void add(thread float* values, uint lane) {
    const bool upper = lane & APART;
#pragma clang loop unroll(full)
    for (int i = 0; i < COUNT / 2; i++) {
      const float kept = upper ? values[2 * i + 1] : values[2 * i];
      const float given = upper ? values[2 * i] : values[2 * i + 1];
      values[i] = kept + simd_shuffle_xor(given, ushort(APART));
    }
    if (COUNT % 2) {
      values[COUNT / 2] = values[COUNT - 1] + simd_shuffle_xor(values[COUNT - 1], ushort(APART));
    }
    LaneSums<(COUNT + 1) / 2, APART * 2>::add(values, lane);
  }
};

template <int COUNT>
struct LaneSums<COUNT, CHAINS> {
  static METAL_FUNC void add(thread float*, uint) {}
};

// One simdgroup: ROWS rows by COLUMNS columns from first_row and first_column on, lanes striding K. Lane n then has
// row n / COLUMNS, column n % COLUMNS of them in sums[0]; beyond the last row or column it is that one's again.
template <int ROWS, int COLUMNS, typename T, typename Weights>
METAL_FUNC void skinny_sums(
    const device T* x, const thread Weights& weights, int rows, int columns, int depth, int first_row,
    int first_column, uint lane, thread float* sums) {
#pragma clang loop unroll(full)
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    sums[i] = 0.0f;
  }
  for (int word = lane; word < depth / WORD; word += CHAINS) {
    float w[COLUMNS][WORD];
#pragma clang loop unroll(full)
    for (int c = 0; c < COLUMNS; c++) {
      weights.word(min(first_column + c, columns - 1), word, w[c]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      float values[WORD];
      load_word(x + long(min(first_row + r, rows - 1)) * depth + word * WORD, values);
#pragma clang loop unroll(full)
      for (int c = 0; c < COLUMNS; c++) {
#pragma clang loop unroll(full)
        for (int k = 0; k < WORD; k++) {
          sums[r * COLUMNS + c] = metal::fma(values[k], w[c][k], sums[r * COLUMNS + c]);
        }
      }
    }
  }
  LaneSums<ROWS * COLUMNS, 1>::add(sums, lane);
}

// The scalar body: those sums, each written once.
template <int ROWS, int COLUMNS, typename T, typename Weights>
METAL_FUNC void skinny_scalar(
    const device T* x, const thread Weights& weights, device T* y, int rows, int columns, int depth, int first_row,
    int first_column, uint lane) {
  if (first_column >= columns) {
    return;
  }
  float sums[ROWS * COLUMNS];
  skinny_sums<ROWS, COLUMNS>(x, weights, rows, columns, depth, first_row, first_column, lane, sums);
  const int row = first_row + int(lane) / COLUMNS;
  const int column = first_column + int(lane) % COLUMNS;
  if (int(lane) < ROWS * COLUMNS && row < rows && column < columns) {
    y[long(row) * columns + column] = T(sums[0]);
  }
}

// SPLITS simdgroups: TILES times 8 rows by 8 columns; simdgroup s takes segments s, s + SPLITS, ..., one chain a word.
// Operand A holds weights [column][k], B the rows [k][row]; a lane has two neighbours of a row of each matrix.
template <int TILES, typename T, typename Weights>
METAL_FUNC void skinny_matrix(
    const device T* x, const thread Weights& weights, device T* y, int rows, int columns, int depth, int first_row,
    int first_column, threadgroup float* scratch, uint lane, uint simd) {
  const int across = (lane >> 1 & 3) | (lane >> 2 & 4);  // the lane's row of a matrix
  const int place = (lane & 1) | (lane >> 2 & 2);        // its columns: 2 * place and the one after
  const int column = min(first_column + across, columns - 1);
  const device T* from[TILES][2];  // beyond the last row that one again: what it gives is not written
#pragma clang loop unroll(full)
  for (int t = 0; t < TILES; t++) {
#pragma clang loop unroll(full)
    for (int e = 0; e < 2; e++) {
      from[t][e] = x + long(min(first_row + t * 8 + place * 2 + e, rows - 1)) * depth + across;
    }
  }
  simdgroup_float8x8 sums[4][TILES];
#pragma clang loop unroll(full)
  for (int u = 0; u < 4; u++) {
#pragma clang loop unroll(full)
    for (int t = 0; t < TILES; t++) {
      sums[u][t].thread_elements()[0] = 0.0f;
      sums[u][t].thread_elements()[1] = 0.0f;
    }
  }
  for (int segment = simd; segment < depth / SEGMENT; segment += SPLITS) {
    float2 w[4];
    weights.pairs(column, segment, place, w);
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) {
      simdgroup_float8x8 a;
      a.thread_elements()[0] = w[u].x;
      a.thread_elements()[1] = w[u].y;
#pragma clang loop unroll(full)
      for (int t = 0; t < TILES; t++) {
        simdgroup_float8x8 b;
#pragma clang loop unroll(full)
        for (int e = 0; e < 2; e++) {
          b.thread_elements()[e] = float(from[t][e][segment * SEGMENT + u * WORD]);
        }
        simdgroup_multiply_accumulate(sums[u][t], a, b, sums[u][t]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int t = 0; t < TILES; t++) {
#pragma clang loop unroll(full)
    for (int e = 0; e < 2; e++) {
      const float low = sums[0][t].thread_elements()[e] + sums[1][t].thread_elements()[e];
      const float high = sums[2][t].thread_elements()[e] + sums[3][t].thread_elements()[e];
      scratch[((simd * TILES + t) * 8 + place * 2 + e) * 8 + across] = low + high;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int item = simd * 32 + lane;  // row * 8 + column of the tile
  const int row = first_row + item / 8;
  if (item < TILES * 64 && row < rows && first_column + item % 8 < columns) {
    float parts[SPLITS];
#pragma clang loop unroll(full)
    for (int s = 0; s < SPLITS; s++) {
      parts[s] = scratch[s * TILES * 64 + item];
    }
    const float low = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    const float high = (parts[4] + parts[5]) + (parts[6] + parts[7]);
    y[long(row) * columns + first_column + item % 8] = T(low + high);
  }
}
