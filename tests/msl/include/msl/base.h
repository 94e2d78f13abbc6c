// Types, traits, and what the runtime (runtime/*.cpp) provides to kernels.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
constexpr half operator""h(long double x) { return half(x); }
constexpr bfloat operator""bf(long double x) { return bfloat(float(x)); }

#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))
#ifdef MSL_LINT
#define MSL_SPACE(n) __attribute__((address_space(n)))
#define MSL_THREADGROUP_VARIABLE static MSL_SPACE(3)
#else
#define MSL_SPACE(n)
#define MSL_THREADGROUP_VARIABLE static __attribute__((used, section("msl_threadgroup")))
#endif
#define MSL_LINE int msl_line = __builtin_LINE()

// Around what passes pointers to stacks between lanes: instrumenting it would only cost time.
#define MSL_LIBRARY_BEGIN _Pragma("clang attribute push(__attribute__((no_sanitize(\"thread\"))), apply_to = function)")
#define MSL_LIBRARY_END _Pragma("clang attribute pop")

struct msl_uint3 {
  uint x, y, z;
};
struct msl_position {  // what Metal's attributes say of one thread; same layout in runtime/worker.h
  msl_uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid, threads_per_grid,
      threads_per_threadgroup;
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, quadgroup_index_in_threadgroup,
      quadgroups_per_threadgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      thread_execution_width, thread_index_in_quadgroup, thread_index_in_simdgroup, thread_index_in_threadgroup,
      threads_per_simdgroup;
};
struct msl_lane {  // what a lane brings to a simd operation, and where it wants the result
  const void* in;
  void* out;
  uint arg;
};
typedef void (*msl_simd_function)(msl_lane* lanes, uint mask);
extern "C" {
uint msl_lane_index();
void msl_simd(msl_simd_function f, const void* in, void* out, uint arg, const char* name, int line);
void msl_matrix_op(int line);
void msl_barrier(uint flags, int simdgroup_only, int line);
void msl_atomic(const void* p, size_t n, int writes);
}

namespace metal {
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <class A, class B>
struct is_same {
  static constexpr bool value = false;
};
template <class A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
constexpr bool is_number = is_integral_v<T> || is_floating_point_v<T> || is_same_v<T, double> || __is_enum(T);
#define MSL_NUMBER(S) enable_if_t<is_number<S>, int> = 0

template <class T>
struct numeric_limits {  // integers
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr T max() {
    return is_signed ? T(make_unsigned_t<T>(~make_unsigned_t<T>(0)) >> 1) : T(~T(0));
  }
  static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};
#define MSL_LIMITS(T, MAX, MIN, EPSILON)                            \
  template <>                                                       \
  struct numeric_limits<T> {                                        \
    static constexpr T max() { return T(MAX); }                     \
    static constexpr T lowest() { return T(-MAX); }                 \
    static constexpr T min() { return T(MIN); }                     \
    static constexpr T epsilon() { return T(EPSILON); }             \
    static constexpr T infinity() { return T(__builtin_inff()); }   \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
MSL_LIMITS(float, 3.402823466e38f, 1.175494351e-38f, 1.192092896e-7f)
MSL_LIMITS(half, 65504.f, 6.103515625e-05f, 0.0009765625f)
MSL_LIMITS(bfloat, 3.3895313892515355e38f, 1.175494351e-38f, 0.0078125f)
template <>
struct numeric_limits<bool> {
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
};
template <class T, size_t N>
struct array {
  T v[N];
  T& operator[](size_t i) { return v[i]; }
  const T& operator[](size_t i) const { return v[i]; }
};
}  // namespace metal
template <class To, class From>
__attribute__((always_inline)) constexpr To as_type(From x) {
  return __builtin_bit_cast(To, x);
}
namespace metal {
using ::as_type;
}
