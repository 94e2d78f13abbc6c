// simdgroup_matrix 8x8: each lane holds two neighbours of a row, in the layout MLX's own kernels rely on.
// A product is a chain of fused multiply-adds over k = 0..7 in float. How a chip rounds is for a Mac to show.
#pragma once
MSL_LIBRARY_BEGIN
namespace metal {
struct msl_place {
  uint row, column;
};
inline msl_place msl_place_of(uint lane) {
  uint quad = lane / 4;
  return {(quad & 4) + (lane / 2) % 4, (quad & 2) * 2 + (lane % 2) * 2};
}
template <class T, int ROWS = 8, int COLUMNS = 8>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Metal has 8x8 simdgroup matrices only");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    msl_place at = msl_place_of(msl_lane_index());
    e = vec<T, 2>(at.row == at.column ? diagonal : T(0), at.row == at.column + 1 ? diagonal : T(0));
  }
  vec<T, 2>& thread_elements() { return e; }
  const vec<T, 2>& thread_elements() const { return e; }
};
template <class T, int R = 8, int C = 8>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e = vec<T, 2>(v);
  return m;
}
template <class T, int R = 8, int C = 8>
inline simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T v) { return simdgroup_matrix<T, R, C>(v); }

template <class A, class B, class C>
struct msl_operands {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};
template <class D, class A, class B, class C>
inline void msl_multiply_accumulate(msl_lane* lanes, uint) {
  float a[8][8], b[8][8], c[8][8];
  for (uint l = 0; l < 32; l++) {
    const msl_operands<A, B, C>& in = msl_in<msl_operands<A, B, C>>(lanes[l]);
    msl_place at = msl_place_of(l);
    for (uint i = 0; i < 2; i++) {
      a[at.row][at.column + i] = in.a[i];
      b[at.row][at.column + i] = in.b[i];
      c[at.row][at.column + i] = in.c[i];
    }
  }
  for (uint row = 0; row < 8; row++)
    for (uint k = 0; k < 8; k++)
      for (uint n = 0; n < 8; n++) c[row][n] = __builtin_fmaf(a[row][k], b[k][n], c[row][n]);
  for (uint l = 0; l < 32; l++) {
    msl_place at = msl_place_of(l);
    msl_out<vec<D, 2>>(lanes[l]) = vec<D, 2>(D(c[at.row][at.column]), D(c[at.row][at.column + 1]));
  }
}
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b,
                                          simdgroup_matrix<C> c, MSL_LINE) {
  msl_operands<A, B, C> operands{a.e, b.e, c.e};
  msl_matrix_op(msl_line);
  d.e = msl_do<vec<D, 2>>(&msl_multiply_accumulate<D, A, B, C>, operands, 0, "simdgroup_multiply_accumulate", msl_line);
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D>(D(0)), msl_line);
}
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
}  // namespace metal
MSL_LIBRARY_END

// These touch a kernel's memory: they stay instrumented.
namespace metal {
#define MSL_MATRIX_MEMORY(SPACE)                                                                             \
  template <class T, class P>                                                                                \
  inline void simdgroup_load(simdgroup_matrix<T>& m, const SPACE P* p, ulong row = 8,                        \
                             vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transpose = false, MSL_LINE) {  \
    msl_barrier(0, 1, msl_line);                                                                             \
    msl_place at = msl_place_of(msl_lane_index());                                                           \
    for (uint i = 0; i < 2; i++) {                                                                           \
      uint y = transpose ? at.column + i : at.row, x = transpose ? at.row : at.column + i;                   \
      m.e[i] = T(p[(origin.y + y) * row + origin.x + x]);                                                    \
    }                                                                                                        \
  }                                                                                                          \
  template <class T, class P>                                                                                \
  inline void simdgroup_store(simdgroup_matrix<T> m, SPACE P* p, ulong row = 8,                              \
                              vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transpose = false, MSL_LINE) { \
    msl_barrier(0, 1, msl_line);                                                                             \
    msl_place at = msl_place_of(msl_lane_index());                                                           \
    for (uint i = 0; i < 2; i++) {                                                                           \
      uint y = transpose ? at.column + i : at.row, x = transpose ? at.row : at.column + i;                   \
      p[(origin.y + y) * row + origin.x + x] = P(m.e[i]);                                                    \
    }                                                                                                        \
  }
#ifdef MSL_LINT
MSL_MATRIX_MEMORY(MSL_SPACE(1))
MSL_MATRIX_MEMORY(MSL_SPACE(3))
#else
MSL_MATRIX_MEMORY()
#endif
}  // namespace metal
