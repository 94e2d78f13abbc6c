// The norm of a layer's heads and their rotation by position, as mlx_mtp/layers.py has them. A simdgroup does a head: a
// lane holds the dims that are turned together, j and j + DIM / 2, for j = lane, lane + 32, ...
#pragma METAL fp contract(off)
#include <metal_stdlib>
#include <metal_simdgroup>
using namespace metal;

// x / rms(x) in float32, rounded to T; then the gain, if there is one, rounded again.
template <int DIM, bool GAINED, typename T>
struct NormedHead {
  enum : int { HALF = DIM / 2, OWN = (HALF + 31) / 32 };
  T low[OWN];
  T high[OWN];

  METAL_FUNC void load(const device T* head, const device T* gain, float eps, uint lane) {
    float squares = 0.0f;
    float values[2][OWN];
#pragma clang loop unroll(full)
    for (int i = 0; i < OWN; i++) {
      const int at = lane + 32 * i;
      values[0][i] = at < HALF ? float(head[at]) : 0.0f;
      values[1][i] = at < HALF ? float(head[at + HALF]) : 0.0f;
      squares = metal::fma(values[0][i], values[0][i], squares);
      squares = metal::fma(values[1][i], values[1][i], squares);
    }
    const float scale = metal::precise::rsqrt(simd_sum(squares) / DIM + eps);
#pragma clang loop unroll(full)
    for (int i = 0; i < OWN; i++) {
      const int at = lane + 32 * i;
      low[i] = T(values[0][i] * scale);
      high[i] = T(values[1][i] * scale);
      if (GAINED && at < HALF) {
        low[i] = T(float(gain[at]) * float(low[i]));
        high[i] = T(float(gain[at + HALF]) * float(high[i]));
      }
    }
  }
};

// One simdgroup: head -> rotated. `sine` [2][DIM / 2] is negative in its first half.
template <int DIM, typename T>
METAL_FUNC void rotate_head(
    const device T* head, const device T* gain, const device float* cosine, const device float* sine, float eps,
    device T* rotated, uint lane) {
  NormedHead<DIM, true, T> normed;
  normed.load(head, gain, eps, lane);
#pragma clang loop unroll(full)
  for (int i = 0; i < normed.OWN; i++) {
    const int at = lane + 32 * i;
    if (at < DIM / 2) {
      const float low = float(normed.low[i]), high = float(normed.high[i]);
      rotated[at] = T(low * cosine[at] + high * sine[at]);
      rotated[at + DIM / 2] = T(high * cosine[at] + low * sine[at + DIM / 2]);
    }
  }
}

// One simdgroup: head -> normed, without gain and rotation.
template <int DIM, typename T>
METAL_FUNC void norm_head(const device T* head, float eps, device T* to, uint lane) {
  NormedHead<DIM, false, T> normed;
  normed.load(head, head, eps, lane);
#pragma clang loop unroll(full)
  for (int i = 0; i < normed.OWN; i++) {
    const int at = lane + 32 * i;
    if (at < DIM / 2) {
      to[at] = normed.low[i];
      to[at + DIM / 2] = normed.high[i];
    }
  }
}
