// One new token of a sequence: heads of the fused product, its scales applied, normed, rotated; queries into shared memory, K
// and V there and into the cache. Macros beside those of strip.cuh: QKV_INT32 (what the product gives, else the model's
// dtype), DEFERRED (its scales are still to be applied), NORMED (heads of q and k have a norm).

struct Token {  // of the fused product
  const void* qkv;  // the row's (HEADS + 2 * KV_HEADS) heads
  const float *row_scale, *column_scales;
  const uint16_t* bias;  // in the model's dtype; null: none
  const float* cos_sin;  // of the token's position
  const uint16_t *q_norm, *k_norm;  // weights [HEAD_DIM] in the model's dtype
  float eps;
};

__device__ __forceinline__ float2 floats(uint32_t pair) {
  return FLOAT16 ? f16_values(pair) : make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ uint32_t rounded(float low, float high) { return FLOAT16 ? f16_pair(low, high) : bf16_pair(low, high); }

__device__ __forceinline__ void load_floats(const float* p, float (&x)[4]) {
  const uint4 w = load_shared_state16(p);
  x[0] = __uint_as_float(w.x), x[1] = __uint_as_float(w.y), x[2] = __uint_as_float(w.z), x[3] = __uint_as_float(w.w);
}

__device__ __forceinline__ void load_floats(const uint16_t* p, float (&x)[4]) {
  const uint2 w = load_shared_state8(p);
  const float2 low = floats(w.x), high = floats(w.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

// Four numbers of the product from column `at` on.
__device__ __forceinline__ void load_product(const Token& token, int at, float row_scale, float (&x)[4]) {
  if constexpr (QKV_INT32) {
    const uint4 w = load_shared_state16((const int*)token.qkv + at);
    x[0] = (float)(int)w.x, x[1] = (float)(int)w.y, x[2] = (float)(int)w.z, x[3] = (float)(int)w.w;
  } else load_floats((const uint16_t*)token.qkv + at, x);
  if constexpr (DEFERRED) {
    float scale[4], bias[4] = {};
    load_floats(token.column_scales + at, scale);
    if (token.bias != nullptr) load_floats(token.bias + at, bias);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = x[i] * row_scale * scale[i] + bias[i];
  }
}

// Four numbers as the cache has them, in one or two words, to two places.
__device__ __forceinline__ void keep_numbers(const float (&x)[4], float inverse_scale, uint8_t* here, uint8_t* there) {
  if constexpr (KV_FP8) {
    const uint32_t word = e4m3_quad(x[0] * inverse_scale, x[1] * inverse_scale, x[2] * inverse_scale, x[3] * inverse_scale);
    *(uint32_t*)here = word;
    if (there != nullptr) *(uint32_t*)there = word;
  } else {
    uint2 words;
    words.x = rounded(x[0], x[1]), words.y = rounded(x[2], x[3]);
    *(uint2*)here = words;
    if (there != nullptr) *(uint2*)there = words;
  }
}

constexpr int kHeadThreads = HEAD_DIM / 8;  // of a head; each has four pairs of dimensions, d and d + HEAD_DIM / 2

// The angles of a thread's pairs. They do not depend on the kernel in front.
struct Rotation {
  float cosine[4], sine[4];

  __device__ __forceinline__ void load(const Token& token) {
    const int d = threadIdx.x % kHeadThreads * 4;
    load_floats(token.cos_sin + d, cosine);
    load_floats(token.cos_sin + HEAD_DIM / 2 + d, sine);
  }

  __device__ __forceinline__ void turn(float (&first)[4], float (&second)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = first[i], y = second[i];
      first[i] = x * cosine[i] - y * sine[i];
      second[i] = y * cosine[i] + x * sine[i];
    }
  }
};

// RMS norm of a head, rounded as a tensor of the model's dtype is. All lanes of the warp; each head's threads are in one.
__device__ __forceinline__ void norm_head(const uint16_t* weight, float eps, int lane, float (&first)[4], float (&second)[4]) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) squares += first[i] * first[i] + second[i] * second[i];
#pragma unroll
  for (int off = kHeadThreads / 2; off; off /= 2) squares += __shfl_xor_sync(~0u, squares, off);
  const float rstd = rsqrtf(squares / HEAD_DIM + eps);
  float by[2][4];
  load_floats(weight + lane, by[0]);
  load_floats(weight + HEAD_DIM / 2 + lane, by[1]);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float2 low = floats(rounded(first[i] * rstd * by[0][i], first[i + 1] * rstd * by[0][i + 1]));
    const float2 high = floats(rounded(second[i] * rstd * by[1][i], second[i + 1] * rstd * by[1][i + 1]));
    first[i] = low.x, first[i + 1] = low.y, second[i] = high.x, second[i + 1] = high.y;
  }
}

struct NewRows {  // of K and V, where they go
  uint8_t *k, *v;              // shared memory
  uint8_t *k_cache, *v_cache;  // null: nowhere
  float inverse_k_scale, inverse_v_scale;
};

// All threads. `queries`: [kGroup][kQueryRow]; `rows` are written where the token is among those attended to.
__device__ __forceinline__ void take_token(const Token& token, const Rotation& rotation, int kv_head, uint16_t* queries, bool attended,
                                           const NewRows& rows) {
  const int lane = threadIdx.x % kHeadThreads * 4;
  const int jobs = kGroup + (attended ? 2 : 0);
  float row_scale = 1.f;
  if constexpr (DEFERRED) row_scale = load_shared_state(token.row_scale);
  constexpr int kWarpJobs = 32 / kHeadThreads;
  for (int first_job = threadIdx.x / 32 * kWarpJobs; first_job < jobs; first_job += WARPS * kWarpJobs) {
    const int job = first_job + threadIdx.x % 32 / kHeadThreads, there_is = min(job, jobs - 1);
    const int head = there_is < kGroup ? kv_head * kGroup + there_is : HEADS + (there_is - kGroup) * KV_HEADS + kv_head;
    float first[4], second[4];
    load_product(token, head * HEAD_DIM + lane, row_scale, first);
    load_product(token, head * HEAD_DIM + HEAD_DIM / 2 + lane, row_scale, second);
    if constexpr (NORMED) {
      if (first_job <= kGroup) {
        float x[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[0][i] = first[i], x[1][i] = second[i];
        norm_head(job < kGroup ? token.q_norm : token.k_norm, token.eps, lane, x[0], x[1]);
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (job <= kGroup) first[i] = x[0][i], second[i] = x[1][i];
      }
    }
    if (job >= jobs) continue;
    if (job <= kGroup) rotation.turn(first, second);
    if (job < kGroup) {
      uint32_t* to = (uint32_t*)(queries + job * kQueryRow + lane);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* x = i < 2 ? first + i * 2 : second + (i - 2) * 2;
        const uint32_t pair = rounded(x[0], x[1]);
        const float2 back = floats(pair);
        to[i < 2 ? i : HEAD_DIM / 4 + i - 2] = kHalf && !FLOAT16 ? operand(back.x, back.y) : pair;
      }
    } else {
      const bool key = job == kGroup;
      uint8_t* here = (key ? rows.k : rows.v) + lane * kKvBytes;
      uint8_t* there = key ? rows.k_cache : rows.v_cache;
      if (there != nullptr) there += lane * kKvBytes;
      const float inverse = key ? rows.inverse_k_scale : rows.inverse_v_scale;
      keep_numbers(first, inverse, here, there);
      keep_numbers(second, inverse, here + HEAD_DIM / 2 * kKvBytes, there == nullptr ? nullptr : there + HEAD_DIM / 2 * kKvBytes);
    }
  }
}
