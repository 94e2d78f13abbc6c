// vec<T, 2..4>, packed vectors, element-wise operators. Only the swizzles that a kernel's text names exist:
// MSL_SWIZZLES_2.._4 are defined before this file (lower.py).
#pragma once
#ifndef MSL_SWIZZLES_2
#define MSL_SWIZZLES_2
#define MSL_SWIZZLES_3
#define MSL_SWIZZLES_4
#endif
namespace metal {
#ifdef MSL_LINT
#define MSL_FROM_SPACES vec(const MSL_SPACE(1) vec&); vec(const MSL_SPACE(2) vec&); vec(const MSL_SPACE(3) vec&);
#else
#define MSL_FROM_SPACES
#endif
// Instrumented kernels get their buffers as aligned as on Metal; the others get MLX's own CPU memory.
#ifdef MSL_ALIGNED
#define MSL_ALIGNMENT(n) n
#else
#define MSL_ALIGNMENT(n) ((n) > 8 ? 8 : (n))
#endif
#define MSL_VECTOR_MEMBERS(N)                                                       \
  struct fill {};                                                                   \
  vec() = default;                                                                  \
  vec(const vec&) = default;                                                        \
  vec& operator=(const vec&) = default;                                             \
  MSL_FROM_SPACES                                                                   \
  template <class S, MSL_NUMBER(S)>                                                 \
  constexpr vec(S s) : vec(fill{}, T(s)) {}                                         \
  template <class U, enable_if_t<!is_same_v<U, T>, int> = 0>                        \
  explicit constexpr vec(vec<U, N> o) {                                             \
    for (int i = 0; i < N; i++) (*this)[i] = T(o[i]);                               \
  }                                                                                 \
  T& operator[](long i) { return reinterpret_cast<T*>(this)[i]; }         \
  const T& operator[](long i) const { return reinterpret_cast<const T*>(this)[i]; } \
  MSL_SWIZZLES_##N

template <class T, int N>
struct vec;
template <class T>
struct alignas(MSL_ALIGNMENT(2 * sizeof(T))) vec<T, 2> {
  T x, y;
  MSL_VECTOR_MEMBERS(2)
  constexpr vec(fill, T s) : x(s), y(s) {}
  template <class A, class B, MSL_NUMBER(A), MSL_NUMBER(B)>
  constexpr vec(A a, B b) : x(T(a)), y(T(b)) {}
};
template <class T>
struct alignas(MSL_ALIGNMENT(4 * sizeof(T))) vec<T, 3> {
  T x, y, z, unused;
  MSL_VECTOR_MEMBERS(3)
  constexpr vec(fill, T s) : x(s), y(s), z(s) {}
  template <class A, class B, class C, MSL_NUMBER(A), MSL_NUMBER(B), MSL_NUMBER(C)>
  constexpr vec(A a, B b, C c) : x(T(a)), y(T(b)), z(T(c)) {}
  constexpr vec(vec<T, 2> a, T b) : x(a.x), y(a.y), z(b) {}
  constexpr vec(T a, vec<T, 2> b) : x(a), y(b.x), z(b.y) {}
};
template <class T>
struct alignas(MSL_ALIGNMENT(4 * sizeof(T))) vec<T, 4> {
  T x, y, z, w;
  MSL_VECTOR_MEMBERS(4)
  constexpr vec(fill, T s) : x(s), y(s), z(s), w(s) {}
  template <class A, class B, class C, class D, MSL_NUMBER(A), MSL_NUMBER(B), MSL_NUMBER(C), MSL_NUMBER(D)>
  constexpr vec(A a, B b, C c, D d) : x(T(a)), y(T(b)), z(T(c)), w(T(d)) {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  constexpr vec(vec<T, 3> a, T b) : x(a.x), y(a.y), z(a.z), w(b) {}
  constexpr vec(T a, vec<T, 3> b) : x(a), y(b.x), z(b.y), w(b.z) {}
  constexpr vec(vec<T, 2> a, T b, T c) : x(a.x), y(a.y), z(b), w(c) {}
};
template <class T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N> o) {
    for (int i = 0; i < N; i++) v[i] = o[i];
  }
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = v[i];
    return r;
  }
  T& operator[](long i) { return v[i]; }
  const T& operator[](long i) const { return v[i]; }
};

#define MSL_COMPONENTS(T, EXPR) \
  vec<T, N> r;                  \
  for (int i = 0; i < N; i++) r[i] = EXPR; \
  return r;
#define MSL_OPERATOR(op)                                                                                       \
  template <class T, int N>                                                                                    \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) { MSL_COMPONENTS(T, T(a[i] op b[i])) }                \
  template <class T, int N, class S, MSL_NUMBER(S)>                                                            \
  inline vec<T, N> operator op(vec<T, N> a, S b) { return a op vec<T, N>(b); }                                 \
  template <class T, int N, class S, MSL_NUMBER(S)>                                                            \
  inline vec<T, N> operator op(S a, vec<T, N> b) { return vec<T, N>(a) op b; }                                 \
  template <class T, int N>                                                                                    \
  inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) { return a = a op b; }                           \
  template <class T, int N, class S, MSL_NUMBER(S)>                                                            \
  inline vec<T, N>& operator op##=(vec<T, N>& a, S b) { return a = a op b; }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/) MSL_OPERATOR(%)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(^) MSL_OPERATOR(<<) MSL_OPERATOR(>>)
#define MSL_COMPARISON(op)                                                                                     \
  template <class T, int N>                                                                                    \
  inline vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) { MSL_COMPONENTS(bool, a[i] op b[i]) }             \
  template <class T, int N, class S, MSL_NUMBER(S)>                                                            \
  inline vec<bool, N> operator op(vec<T, N> a, S b) { return a op vec<T, N>(b); }                              \
  template <class T, int N, class S, MSL_NUMBER(S)>                                                            \
  inline vec<bool, N> operator op(S a, vec<T, N> b) { return vec<T, N>(a) op b; }
MSL_COMPARISON(<) MSL_COMPARISON(>) MSL_COMPARISON(<=) MSL_COMPARISON(>=) MSL_COMPARISON(==) MSL_COMPARISON(!=)
MSL_COMPARISON(&&) MSL_COMPARISON(||)
template <class T, int N>
inline vec<T, N> operator-(vec<T, N> a) { MSL_COMPONENTS(T, T(-a[i])) }
template <class T, int N>
inline vec<T, N> operator~(vec<T, N> a) { MSL_COMPONENTS(T, T(~a[i])) }
template <int N>
inline vec<bool, N> operator!(vec<bool, N> a) { MSL_COMPONENTS(bool, !a[i]) }
template <int N>
inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= a[i];
  return r;
}
template <int N>
inline bool all(vec<bool, N> a) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= a[i];
  return r;
}
}  // namespace metal
