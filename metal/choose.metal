// Which token: lists of the best logits of a row's parts, merged, and position-keyed noise. The rule and its hash are
// those of mlx_mtp/sampling.py.
//
// An item is a logit and a token id in one number, so that larger is better: NaN first (a row with one is not valid),
// then the greater logit, then the lower id. 0 and -0 are equal.
#pragma METAL fp contract(off)
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_atomic>
using namespace metal;

constant constexpr int BEST = 64;             // candidates of a row that is sampled
constant constexpr int MERGE_THREADS = 512;   // of the threadgroup that merges a row: at most so many lists
constant constexpr int POOL = BEST * (BEST + 1) / 2;
constant constexpr uint NOT_A_NUMBER = 0xffffffffu;

METAL_FUNC uint order_of(float logit) {
  if (isnan(logit)) {
    return NOT_A_NUMBER;
  }
  const uint bits = as_type<uint>(logit == 0.0f ? 0.0f : logit);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

METAL_FUNC ulong item_of(uint order, uint id) {
  return ulong(order) << 32 | ulong(~id);
}

METAL_FUNC uint id_of(ulong item) {
  return ~uint(item);
}

METAL_FUNC float logit_of(ulong item) {
  const uint order = uint(item >> 32);
  if (order == NOT_A_NUMBER) {
    return NAN;
  }
  return as_type<float>(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// What a list ranks by: the logit, rounded and capped in its own type, over the row's temperature. +inf becomes NaN, for
// both make a row invalid; what the temperature makes infinite stays finite, for that is not the logit's fault.
template <typename T, bool CAPPED>
METAL_FUNC float ranked_logit(float sum, float cap, float temperature) {
  T rounded = T(sum);
  if (CAPPED) {
    rounded = T(float(rounded) / cap);
    rounded = T(metal::precise::tanh(float(rounded)));
    rounded = T(float(rounded) * cap);
  }
  const float logit = float(rounded);
  if (isnan(logit) || logit == INFINITY) {
    return NAN;
  }
  if (logit == -INFINITY) {
    return logit;
  }
  return clamp(logit / temperature, -numeric_limits<float>::max(), numeric_limits<float>::max());
}

METAL_FUNC ulong better_of(ulong item, ulong other) {
  return other > item ? other : item;
}

METAL_FUNC ulong best_of_lanes(ulong item) {
#pragma clang loop unroll(full)
  for (ushort apart = 1; apart < 32; apart *= 2) {
    // 64-bit values cannot be shuffled.
    const uint2 halves = uint2(uint(item), uint(item >> 32));
    const ulong other = ulong(simd_shuffle_xor(halves.y, apart)) << 32 | ulong(simd_shuffle_xor(halves.x, apart));
    item = better_of(item, other);
  }
  return item;
}

// pcg3d (Jarzynski and Olano, JCGT 9(3), 2020) of seed, position and token.
METAL_FUNC uint hash_bits(uint seed, uint position, uint token) {
  uint3 v = uint3(seed, position, token) * 1664525u + 1013904223u;
  v.x += v.y * v.z;
  v.y += v.z * v.x;
  v.z += v.x * v.y;
  v ^= v >> 16;
  return v.x + v.y * v.z;
}

// MLX's own log1p on Metal.
METAL_FUNC float log_of_one_plus(float x) {
  const float sum = 1.0f + x;
  return sum == 1.0f ? x : x * (metal::precise::log(sum) / (sum - 1.0f));
}

METAL_FUNC float gumbel(uint seed, uint position, uint token) {
  const float uniform = min((float(hash_bits(seed, position, token)) + 0.5f) * 2.3283064365386963e-10f, 1.0f - 5.9604644775390625e-8f);
  return -metal::precise::log(-log_of_one_plus(-uniform));
}

// How one row chooses: sampling.py's settings of its batch member.
struct Draw {
  uint seed;
  uint position;
  float temperature;
  int top_k;
  float top_p;
  float min_p;
};

// The best of every thread's item, in all threads. One threadgroup of MERGE_THREADS.
METAL_FUNC ulong best_of_threads(ulong item, threadgroup ulong* scratch, uint lane, uint simd) {
  item = best_of_lanes(item);
  if (lane == 0) {
    scratch[simd] = item;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return best_of_lanes(scratch[lane % (MERGE_THREADS / 32)]);
}

// The best 64 of `lists` sorted lists of 64, into best[]. One threadgroup; whoever reads best[] needs a barrier first.
//
// Of a list with a better heads before it only 64 - a items can be among the best 64, and none below the 64th head.
METAL_FUNC void merge_lists(
    const device ulong* items, int lists, threadgroup ulong* heads, threadgroup uint* order, threadgroup ulong* pool,
    threadgroup atomic_uint* filled, threadgroup ulong* best, uint worker) {
  if (int(worker) < lists) {
    heads[worker] = items[worker * BEST];
  }
  if (worker == 0) {
    atomic_store_explicit(filled, 0, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (int(worker) < lists) {
    int before = 0;
    for (int i = 0; i < lists; i++) {
      before += heads[i] > heads[worker];
    }
    if (before < BEST) {
      order[before] = worker;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int used = min(lists, BEST);
  const ulong least = used == BEST ? heads[order[BEST - 1]] : 0;
  for (int i = worker; i < used * BEST; i += MERGE_THREADS) {
    if (i / BEST + i % BEST < BEST) {
      const ulong item = items[order[i / BEST] * BEST + i % BEST];
      if (item >= least) {
        // In whatever order they come: all are different, and each finds its own rank.
        pool[atomic_fetch_add_explicit(filled, 1, memory_order_relaxed)] = item;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int count = atomic_load_explicit(filled, memory_order_relaxed);
  for (int i = worker; i < count; i += MERGE_THREADS) {
    const ulong item = pool[i];
    int better = 0;
    for (int j = 0; j < count; j++) {
      better += pool[j] > item;
    }
    if (better < BEST) {
      best[better] = item;
    }
  }
}

// The drawn item of best[], sorted: top-k, top-p and min-p of the softmax, then the largest logit plus noise. One
// threadgroup of at least 64 threads; the result is thread 0's.
METAL_FUNC ulong drawn_item(
    const threadgroup ulong* best, Draw draw, threadgroup float* weights, threadgroup ulong* scores, uint worker,
    uint lane) {
  const int rank = worker;
  const ulong item = best[rank % BEST];
  const float logit = logit_of(item);
  if (rank < BEST) {
    weights[rank] = rank < draw.top_k ? metal::precise::exp(logit - logit_of(best[0])) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (rank < BEST) {
    float before = 0.0f, total = 0.0f;
    for (int i = 0; i < BEST; i++) {
      before = i == rank ? total : before;
      total += weights[i];
    }
    const bool kept = rank < draw.top_k && (draw.top_p >= 1.0f || before / total < draw.top_p) &&
        weights[rank] / total >= draw.min_p * (weights[0] / total);
    const float score = kept ? logit + gumbel(draw.seed, draw.position, id_of(item)) : -INFINITY;
    scores[rank] = item_of(order_of(score), rank);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const ulong winner = best_of_lanes(better_of(scores[lane], scores[lane + 32]));
  return draw.temperature > 0.0f ? best[id_of(winner)] : best[0];
}

METAL_FUNC bool is_valid(ulong best) {
  return isfinite(logit_of(best));
}
