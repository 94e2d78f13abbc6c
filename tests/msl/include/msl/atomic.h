// Atomics. Threads take turns on one core here, so plain operations do; the runtime is told of each one.
#pragma once
MSL_LIBRARY_BEGIN
namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v;
};
#define MSL_ATOMICS(SPACE)                                                                                    \
  template <class T>                                                                                          \
  inline T atomic_load_explicit(const volatile SPACE atomic<T>* a, memory_order) {                            \
    msl_atomic((const void*)a, sizeof(T), 0);                                                                 \
    return a->v;                                                                                              \
  }                                                                                                           \
  template <class T, class U>                                                                                 \
  inline void atomic_store_explicit(volatile SPACE atomic<T>* a, U x, memory_order) {                         \
    msl_atomic((const void*)a, sizeof(T), 2);                                                                 \
    a->v = T(x);                                                                                              \
  }                                                                                                           \
  template <class T>                                                                                          \
  inline bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* a, T* expected, T x, memory_order, \
                                                    memory_order) {                                           \
    msl_atomic((const void*)a, sizeof(T), 1);                                                                 \
    T old = a->v;                                                                                             \
    bool same = __builtin_memcmp(&old, expected, sizeof(T)) == 0;                                             \
    if (same) a->v = x;                                                                                       \
    else *expected = old;                                                                                     \
    return same;                                                                                              \
  }                                                                                                           \
  MSL_ATOMIC(SPACE, atomic_exchange_explicit, x) MSL_ATOMIC(SPACE, atomic_fetch_add_explicit, old + x)        \
  MSL_ATOMIC(SPACE, atomic_fetch_sub_explicit, old - x) MSL_ATOMIC(SPACE, atomic_fetch_min_explicit, x < old ? x : old) \
  MSL_ATOMIC(SPACE, atomic_fetch_max_explicit, old < x ? x : old) MSL_ATOMIC(SPACE, atomic_fetch_and_explicit, old & x) \
  MSL_ATOMIC(SPACE, atomic_fetch_or_explicit, old | x) MSL_ATOMIC(SPACE, atomic_fetch_xor_explicit, old ^ x)
#define MSL_ATOMIC(SPACE, name, EXPR)                                        \
  template <class T, class U>                                                \
  inline T name(volatile SPACE atomic<T>* a, U operand, memory_order) {      \
    msl_atomic((const void*)a, sizeof(T), 1);                                \
    T old = a->v, x = T(operand);                                            \
    a->v = T(EXPR);                                                          \
    return old;                                                              \
  }
#ifdef MSL_LINT
MSL_ATOMICS(MSL_SPACE(1))
MSL_ATOMICS(MSL_SPACE(3))
#else
MSL_ATOMICS()
#endif
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
}  // namespace metal
MSL_LIBRARY_END
