// Arithmetic: each operation rounds to its own type; half and bfloat compute in float and round once.
// precise:: and fast:: are the same functions here: a CPU cannot show how Apple's differ.
#pragma once
extern "C" {
float expf(float), exp2f(float), logf(float), log2f(float), log10f(float), sinf(float), cosf(float), tanf(float),
    tanhf(float), sinhf(float), coshf(float), asinf(float), acosf(float), atanf(float), asinhf(float), acoshf(float),
    atanhf(float), powf(float, float), atan2f(float, float), fmodf(float, float), ldexpf(float, int),
    erff(float);
}
namespace metal {
#define MSL_FLOAT_1(name, EXPR)                                                    \
  inline float name(float x) { return EXPR; }                                      \
  inline half name(half h) { float x = h; return half(EXPR); }                     \
  inline bfloat name(bfloat h) { float x = h; return bfloat(EXPR); }               \
  template <class T, int N>                                                        \
  inline vec<T, N> name(vec<T, N> v) { MSL_COMPONENTS(T, name(v[i])) }
#define MSL_FLOAT_2(name, EXPR)                                                    \
  inline float name(float x, float y) { return EXPR; }                             \
  inline half name(half a, half b) { float x = a, y = b; return half(EXPR); }      \
  inline bfloat name(bfloat a, bfloat b) { float x = a, y = b; return bfloat(EXPR); } \
  template <class T, int N>                                                        \
  inline vec<T, N> name(vec<T, N> v, vec<T, N> w) { MSL_COMPONENTS(T, name(v[i], w[i])) }
#define MSL_MATH                                                                                              \
  MSL_FLOAT_1(exp, ::expf(x)) MSL_FLOAT_1(exp2, ::exp2f(x)) MSL_FLOAT_1(exp10, ::powf(10.0f, x))               \
  MSL_FLOAT_1(log, ::logf(x)) MSL_FLOAT_1(log2, ::log2f(x)) MSL_FLOAT_1(log10, ::log10f(x))                    \
  MSL_FLOAT_1(sqrt, __builtin_sqrtf(x)) MSL_FLOAT_1(rsqrt, 1.0f / __builtin_sqrtf(x))                          \
  MSL_FLOAT_1(sin, ::sinf(x)) MSL_FLOAT_1(cos, ::cosf(x)) MSL_FLOAT_1(tan, ::tanf(x))                          \
  MSL_FLOAT_1(sinh, ::sinhf(x)) MSL_FLOAT_1(cosh, ::coshf(x)) MSL_FLOAT_1(tanh, ::tanhf(x))                    \
  MSL_FLOAT_1(asin, ::asinf(x)) MSL_FLOAT_1(acos, ::acosf(x)) MSL_FLOAT_1(atan, ::atanf(x))                    \
  MSL_FLOAT_1(asinh, ::asinhf(x)) MSL_FLOAT_1(acosh, ::acoshf(x)) MSL_FLOAT_1(atanh, ::atanhf(x))              \
  MSL_FLOAT_1(floor, __builtin_floorf(x)) MSL_FLOAT_1(ceil, __builtin_ceilf(x))                                \
  MSL_FLOAT_1(trunc, __builtin_truncf(x)) MSL_FLOAT_1(rint, __builtin_rintf(x))                                \
  MSL_FLOAT_1(round, __builtin_roundf(x)) MSL_FLOAT_1(fabs, __builtin_fabsf(x))                                \
  MSL_FLOAT_1(fract, x - __builtin_floorf(x))                                                                  \
  MSL_FLOAT_2(pow, ::powf(x, y)) MSL_FLOAT_2(powr, ::powf(x, y)) MSL_FLOAT_2(atan2, ::atan2f(x, y))            \
  MSL_FLOAT_2(fmod, ::fmodf(x, y)) MSL_FLOAT_2(fmin, __builtin_fminf(x, y))                                    \
  MSL_FLOAT_2(fmax, __builtin_fmaxf(x, y)) MSL_FLOAT_2(copysign, __builtin_copysignf(x, y))                    \
  MSL_FLOAT_2(divide, x / y)
MSL_MATH
namespace precise {
MSL_MATH
}
namespace fast {
MSL_MATH
}
inline float ldexp(float x, int e) { return ::ldexpf(x, e); }
inline half ldexp(half x, int e) { return half(::ldexpf(x, e)); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// Exact product in double; the sum is rounded to double first, which may differ from one rounding in the last bit.
inline half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(double(a) * double(b) + double(c)); }
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) { MSL_COMPONENTS(T, fma(a[i], b[i], c[i])) }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

// Metal's min and max of floats return the number where the other is NaN.
template <class T, MSL_NUMBER(T)>
inline T max(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(__builtin_fmaxf(a, b));
  else return a < b ? b : a;
}
template <class T, MSL_NUMBER(T)>
inline T min(T a, T b) {
  if constexpr (is_floating_point_v<T>) return T(__builtin_fminf(a, b));
  else return b < a ? b : a;
}
template <class T, MSL_NUMBER(T)>
inline T abs(T a) { return a < T(0) ? T(-a) : a; }
template <class T, MSL_NUMBER(T)>
inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, MSL_NUMBER(T)>
inline T sign(T a) { return T((a > T(0)) - (a < T(0))); }
inline float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
#define MSL_PAIRWISE(f)                                                                          \
  template <class T, int N>                                                                      \
  inline vec<T, N> f(vec<T, N> a, vec<T, N> b) { MSL_COMPONENTS(T, f(a[i], b[i])) }              \
  template <class T, int N>                                                                      \
  inline vec<T, N> f(vec<T, N> a, T b) { MSL_COMPONENTS(T, f(a[i], b)) }
MSL_PAIRWISE(max) MSL_PAIRWISE(min)
template <class T, int N>
inline vec<T, N> abs(vec<T, N> a) { MSL_COMPONENTS(T, abs(a[i])) }
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) { return min(max(x, low), high); }
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, T low, T high) { return min(max(x, low), high); }
template <class T>
inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) { MSL_COMPONENTS(T, c[i] ? b[i] : a[i]) }
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T s = 0;
  for (int i = 0; i < N; i++) s = T(s + T(a[i] * b[i]));
  return s;
}
template <class T, int N>
inline T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T>
inline T mix(T a, T b, T t) { return a + (b - a) * t; }
}  // namespace metal
