// Barriers and simdgroup operations. Sums add in the shape of a butterfly (neighbours first); Apple's tree is unknown.
#pragma once
MSL_LIBRARY_BEGIN
namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
                              mem_device_and_threadgroup = 3 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline void threadgroup_barrier(mem_flags f, MSL_LINE) { msl_barrier(uint(f), 0, msl_line); }
inline void simdgroup_barrier(mem_flags f, MSL_LINE) { msl_barrier(uint(f), 1, msl_line); }

template <class T>
inline const T& msl_in(const msl_lane& lane) { return *(const T*)lane.in; }
template <class T>
inline T& msl_out(const msl_lane& lane) { return *(T*)lane.out; }
#define MSL_EACH_LANE for (uint l = 0; l < 32; l++) if (mask >> l & 1)
template <class R, class T>
inline R msl_do(msl_simd_function f, const T& x, uint arg, const char* name, int line) {
  R result;
  msl_simd(f, &x, &result, arg, name, line);
  return result;
}

template <class T, class Op>
inline void msl_reduce(msl_lane* lanes, uint mask) {
  T v[32];
  bool on[32];
  for (uint l = 0; l < 32; l++)
    if ((on[l] = mask >> l & 1)) v[l] = msl_in<T>(lanes[l]);
  for (uint d = 1; d < 32; d <<= 1)
    for (uint l = 0; l < 32; l += 2 * d) {
      if (on[l] && on[l + d]) v[l] = Op::of(v[l], v[l + d]);
      else if (on[l + d]) v[l] = v[l + d], on[l] = true;
    }
  MSL_EACH_LANE msl_out<T>(lanes[l]) = v[0];
}
template <class T, class Op, bool EXCLUSIVE>
inline void msl_scan(msl_lane* lanes, uint mask) {
  T sum = T(Op::identity);
  MSL_EACH_LANE {
    T x = msl_in<T>(lanes[l]), after = Op::of(sum, x);
    msl_out<T>(lanes[l]) = EXCLUSIVE ? sum : after;
    sum = after;
  }
}
template <class T>
inline void msl_shuffle(msl_lane* lanes, uint mask) {  // from a lane that is not there: all bits set, a NaN
  MSL_EACH_LANE {
    uint from = lanes[l].arg;
    if (from < 32 && (mask >> from & 1)) msl_out<T>(lanes[l]) = msl_in<T>(lanes[from]);
    else __builtin_memset(lanes[l].out, 0xFF, sizeof(T));
  }
}
inline void msl_first(msl_lane* lanes, uint mask) {
  MSL_EACH_LANE msl_out<bool>(lanes[l]) = l == uint(__builtin_ctz(mask));
}
inline void msl_votes(msl_lane* lanes, uint mask) {
  uint64_t votes = 0;
  MSL_EACH_LANE votes |= uint64_t(msl_in<bool>(lanes[l])) << l;
  MSL_EACH_LANE msl_out<uint64_t>(lanes[l]) = votes;
}
struct msl_sum {
  static constexpr int identity = 0;
  template <class T>
  static T of(T a, T b) { return T(a + b); }
};
struct msl_product {
  static constexpr int identity = 1;
  template <class T>
  static T of(T a, T b) { return T(a * b); }
};
#define MSL_OP(name, EXPR) struct name { template <class T> static T of(T a, T b) { return T(EXPR); } };
MSL_OP(msl_max, max(a, b)) MSL_OP(msl_min, min(a, b)) MSL_OP(msl_and, a & b) MSL_OP(msl_or, a | b) MSL_OP(msl_xor, a ^ b)

#define MSL_REDUCTION(name, Op) \
  template <class T>            \
  inline T name(T x, MSL_LINE) { return msl_do<T>(&msl_reduce<T, Op>, x, 0, #name, msl_line); }
MSL_REDUCTION(simd_sum, msl_sum) MSL_REDUCTION(simd_product, msl_product) MSL_REDUCTION(simd_max, msl_max)
MSL_REDUCTION(simd_min, msl_min) MSL_REDUCTION(simd_and, msl_and) MSL_REDUCTION(simd_or, msl_or)
MSL_REDUCTION(simd_xor, msl_xor)
#define MSL_PREFIX(name, Op, EXCLUSIVE) \
  template <class T>                    \
  inline T name(T x, MSL_LINE) { return msl_do<T>(&msl_scan<T, Op, EXCLUSIVE>, x, 0, #name, msl_line); }
MSL_PREFIX(simd_prefix_inclusive_sum, msl_sum, false) MSL_PREFIX(simd_prefix_exclusive_sum, msl_sum, true)
MSL_PREFIX(simd_prefix_inclusive_product, msl_product, false)
MSL_PREFIX(simd_prefix_exclusive_product, msl_product, true)

// Past the edge, shuffle_down and _up leave a lane its own value; rotations wrap.
#define MSL_SHUFFLE(name, ARG, FROM) \
  template <class T>                 \
  inline T name(T x, ushort ARG, MSL_LINE) { \
    uint l = msl_lane_index();       \
    (void)l;                         \
    return msl_do<T>(&msl_shuffle<T>, x, FROM, #name, msl_line); \
  }
MSL_SHUFFLE(simd_shuffle, n, n) MSL_SHUFFLE(simd_broadcast, n, n) MSL_SHUFFLE(simd_shuffle_xor, n, l ^ n)
MSL_SHUFFLE(simd_shuffle_down, n, l + n < 32 ? l + n : l) MSL_SHUFFLE(simd_shuffle_up, n, l >= n ? l - n : l)
MSL_SHUFFLE(simd_shuffle_rotate_down, n, (l + n) & 31) MSL_SHUFFLE(simd_shuffle_rotate_up, n, (l - n) & 31)
MSL_SHUFFLE(quad_shuffle, n, (l & ~3u) | (n & 3)) MSL_SHUFFLE(quad_broadcast, n, (l & ~3u) | (n & 3))
MSL_SHUFFLE(quad_shuffle_xor, n, l ^ (n & 3))
MSL_SHUFFLE(quad_shuffle_down, n, (l & 3) + n < 4 ? l + n : l) MSL_SHUFFLE(quad_shuffle_up, n, (l & 3) >= n ? l - n : l)
template <class T>
inline T simd_shuffle_and_fill_down(T x, T fill, ushort n, MSL_LINE) {
  uint l = msl_lane_index();
  T a = simd_shuffle_rotate_down(x, n, msl_line), b = simd_shuffle_rotate_down(fill, n, msl_line);
  return l + n < 32 ? a : b;
}
template <class T>
inline T simd_shuffle_and_fill_up(T x, T fill, ushort n, MSL_LINE) {
  uint l = msl_lane_index();
  T a = simd_shuffle_rotate_up(x, n, msl_line), b = simd_shuffle_rotate_up(fill, n, msl_line);
  return l >= n ? a : b;
}
inline bool simd_is_first(MSL_LINE) { return msl_do<bool>(&msl_first, false, 0, "simd_is_first", msl_line); }
template <class T>
inline T simd_broadcast_first(T x, MSL_LINE) { return simd_shuffle(x, 0, msl_line); }  // all lanes are active here
struct simd_vote {
  uint64_t votes;
  operator uint64_t() const { return votes; }
  bool all() const { return uint(votes) == 0xFFFFFFFFu; }
  bool any() const { return votes; }
};
inline simd_vote simd_ballot(bool p, MSL_LINE) {
  return {msl_do<uint64_t>(&msl_votes, p, 0, "simd_ballot", msl_line)};
}
inline simd_vote simd_active_threads_mask(MSL_LINE) { return simd_ballot(true, msl_line); }
inline bool simd_any(bool p, MSL_LINE) { return msl_do<uint>(&msl_reduce<uint, msl_or>, uint(p), 0, "simd_any", msl_line); }
inline bool simd_all(bool p, MSL_LINE) { return msl_do<uint>(&msl_reduce<uint, msl_and>, uint(p), 0, "simd_all", msl_line); }
#define MSL_QUAD_REDUCTION(name, EXPR) \
  template <class T>                   \
  inline T name(T a, MSL_LINE) {       \
    T b = quad_shuffle_xor(a, 1, msl_line); \
    a = T(EXPR);                       \
    b = quad_shuffle_xor(a, 2, msl_line); \
    return T(EXPR);                    \
  }
MSL_QUAD_REDUCTION(quad_sum, a + b) MSL_QUAD_REDUCTION(quad_product, a * b)
MSL_QUAD_REDUCTION(quad_max, max(a, b)) MSL_QUAD_REDUCTION(quad_min, min(a, b))
MSL_QUAD_REDUCTION(quad_and, a & b) MSL_QUAD_REDUCTION(quad_or, a | b) MSL_QUAD_REDUCTION(quad_xor, a ^ b)
inline bool quad_any(bool p, MSL_LINE) { return quad_or(uint(p), msl_line); }
inline bool quad_all(bool p, MSL_LINE) { return quad_and(uint(p), msl_line); }
}  // namespace metal
MSL_LIBRARY_END
