// Integer and bit functions.
#pragma once
namespace metal {
template <class T>
inline T popcount(T x) { return T(__builtin_popcountll(make_unsigned_t<T>(x))); }
template <class T>
inline T clz(T x) {
  return x == 0 ? T(8 * sizeof(T)) : T(__builtin_clzll(make_unsigned_t<T>(x)) - (64 - 8 * int(sizeof(T))));
}
template <class T>
inline T ctz(T x) { return x == 0 ? T(8 * sizeof(T)) : T(__builtin_ctzll(make_unsigned_t<T>(x))); }
template <class T>
inline T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return 0;
  make_unsigned_t<T> up = make_unsigned_t<T>(make_unsigned_t<T>(x) << (8 * sizeof(T) - offset - bits));
  return T(T(up) >> (8 * sizeof(T) - bits));
}
template <class T>
inline T insert_bits(T base, T insert, uint offset, uint bits) {
  using U = make_unsigned_t<T>;
  U mask = U((bits >= 8 * sizeof(T) ? U(~U(0)) : U((U(1) << bits) - 1)) << offset);
  return T((U(base) & ~mask) | ((U(insert) << offset) & mask));
}
template <class T>
inline T rotate(T x, T n) {
  using U = make_unsigned_t<T>;
  uint bits = 8 * sizeof(T), k = uint(n) % bits;
  return k ? T(U(U(x) << k) | U(U(x) >> (bits - k))) : x;
}
template <class T>
inline T reverse_bits(T x) {
  make_unsigned_t<T> r = 0, u = x;
  for (uint i = 0; i < 8 * sizeof(T); i++, u >>= 1) r = make_unsigned_t<T>((r << 1) | (u & 1));
  return T(r);
}
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline int mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline ulong mulhi(ulong a, ulong b) { return ulong(((unsigned __int128)a * b) >> 64); }
template <class T>
inline T mad24(T a, T b, T c) { return a * b + c; }
template <class T>
inline T mul24(T a, T b) { return a * b; }
}  // namespace metal
