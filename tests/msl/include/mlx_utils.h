// The part of MLX's own preamble that kernels may use without including anything.
#pragma once
#include <metal_stdlib>
using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;
struct complex64_t {
  float real, imag;
};

template <typename U>
struct Limits {
  static constexpr U max = numeric_limits<U>::max(), min = numeric_limits<U>::min();
  static constexpr U finite_max = max, finite_min = min;
};
#define MSL_FLOAT_LIMITS(T)                                                                          \
  template <>                                                                                        \
  struct Limits<T> {                                                                                 \
    static constexpr T max = numeric_limits<T>::infinity(), min = -numeric_limits<T>::infinity();    \
    static constexpr T finite_max = numeric_limits<T>::max(), finite_min = -numeric_limits<T>::max(); \
  };
MSL_FLOAT_LIMITS(float)
MSL_FLOAT_LIMITS(half)
MSL_FLOAT_LIMITS(bfloat)

template <typename IdxT = int64_t>
inline IdxT elem_to_loc(IdxT elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  IdxT at = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    at += (elem % shape[i]) * IdxT(strides[i]);
    elem /= shape[i];
  }
  return at;
}
inline int64_t elem_to_loc(uint elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  return elem_to_loc<int64_t>(int64_t(elem), shape, strides, ndim);
}
template <typename T, typename U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
