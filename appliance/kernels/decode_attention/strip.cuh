// Strips of 16 tokens of the paged cache, as a warp's tensor cores take them, and the running softmax over them.
//
// A strip lies within a page. Scores are products of 16 query heads by 8 tokens; the output is kept transposed, dimensions by
// query heads, so that eight heads of a group cost the registers of eight: the scores' registers are its operand as they are.
// Sizes are macros: HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, WARPS (of a block), KV_FP8, FLOAT16 (the model's dtype, else bf16).

constexpr int kThreads = WARPS * 32;
constexpr int kGroup = HEADS / KV_HEADS;  // query heads that share a K/V head
constexpr int kOctets = (kGroup + 7) / 8;
constexpr int kStrip = 16;
constexpr int kKvBytes = KV_FP8 ? 1 : 2;
constexpr int kRowBytes = HEAD_DIM * kKvBytes;
constexpr int kWords = kRowBytes >= 128 ? 4 : 2;   // that a lane loads at once
constexpr int kNumbers = kWords * 4 / kKvBytes;    // in them
constexpr int kPieces = HEAD_DIM / (4 * kNumbers);  // loads of a row of K, by four lanes
constexpr int kSets = HEAD_DIM / (8 * kNumbers);    // loads of a row of V, by eight lanes
constexpr float kNoScore = -1e30f;
constexpr bool kHalf = KV_FP8 || FLOAT16;  // products are of float16, which holds FP8's numbers exactly, else of bf16

static_assert(kGroup >= 1 && kGroup <= 16 && HEADS % KV_HEADS == 0, "query heads per K/V head");
static_assert(PAGE_SIZE % kStrip == 0, "a strip lies within a page");
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "size of a head");

__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) mma_f16(c, a0, a1, a2, a3, b0, b1);
  else mma_bf16(c, a0, a1, a2, a3, b0, b1);
}

// Two floats as products take them.
__device__ __forceinline__ uint32_t operand(float low, float high) { return kHalf ? f16_pair(low, high) : bf16_pair(low, high); }

// A lane's numbers, two in a word, as products take them.
__device__ __forceinline__ void unpack(const uint32_t (&from)[kWords], uint32_t (&to)[kNumbers / 2]) {
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    if constexpr (KV_FP8) widen(from[i], to[i * 2], to[i * 2 + 1]);
    else to[i] = from[i];
  }
}

// Tokens of a sequence that a block attends to. The newest one's K and V are not in the cache yet.
struct Span {
  int begin, end;  // tokens; begin is a multiple of 16
  int first;       // token that is seen, before which there may be up to 15 of `begin`'s strip
  int newest;      // -1: not in here

  __device__ __forceinline__ bool cached(int token) const { return token >= first && token < end && token != newest; }
};

// The place of a strip in the cache of a layer: K of its first token; V is further on.
__device__ __forceinline__ const uint8_t* strip_place(const uint8_t* cache, int page, int base, int kv_head) {
  return cache + (((int64_t)page * 2 * PAGE_SIZE + base % PAGE_SIZE) * KV_HEADS + kv_head) * kRowBytes;
}
constexpr int kTokenBytes = KV_HEADS * kRowBytes;
constexpr int kToValues = PAGE_SIZE * kTokenBytes;

// Lane: numbers of tokens lane / 4 and 8 more, kNumbers in every 4 * kNumbers.
struct Keys {
  uint32_t w[2][kPieces][kWords];

  static __device__ __forceinline__ int token(int i) { return threadIdx.x % 32 / 4 + i * 8; }
  static __device__ __forceinline__ int element(int piece) { return (piece * 4 + threadIdx.x % 4) * kNumbers; }

  __device__ __forceinline__ void load(const Span& span, int base, const uint8_t* place) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++)
        load_if(span.cached(base + token(i)), place + token(i) * kTokenBytes + element(piece) * kKvBytes, w[i][piece]);
  }

  // The newest token, number `at` of the strip.
  __device__ __forceinline__ void take(int at, const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++)
#pragma unroll
        for (int j = 0; j < kWords; j++)
          if (token(i) == at) w[i][piece][j] = ((const uint32_t*)(row + element(piece) * kKvBytes))[j];
  }
};

// Lane: of tokens 2 * (lane % 4), the next, and 8 more than these, kNumbers in every 8 * kNumbers.
struct Values {
  uint32_t w[4][kSets][kWords];

  static __device__ __forceinline__ int token(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }
  static __device__ __forceinline__ int element(int set) { return (set * 8 + threadIdx.x % 32 / 4) * kNumbers; }

  __device__ __forceinline__ void load(const Span& span, int base, const uint8_t* place) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int set = 0; set < kSets; set++)
        load_if(span.cached(base + token(i)), place + kToValues + token(i) * kTokenBytes + element(set) * kKvBytes, w[i][set]);
  }

  __device__ __forceinline__ void take(int at, const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int set = 0; set < kSets; set++)
#pragma unroll
        for (int j = 0; j < kWords; j++)
          if (token(i) == at) w[i][set][j] = ((const uint32_t*)(row + element(set) * kKvBytes))[j];
  }
};

// Queries in shared memory; rows are 64 bytes apart modulo 128, so that eight lanes read from all banks.
constexpr int kQueryRow = HEAD_DIM + 32;

// The running softmax of a warp (Milakov and Gimelshein, 2018). Scores: lane / 4 is the head, of each octet. Output: columns
// are heads 2 * (lane % 4) and the next; rows are numbers e and e + 1 of what `Values` has of lane / 4.
struct Softmax {
  float highest[kOctets], sum[kOctets];
  float out[kOctets][HEAD_DIM / 16][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int o = 0; o < kOctets; o++) {
      highest[o] = kNoScore, sum[o] = 0.f;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) out[o][i][j] = 0.f;
    }
  }

  // Weights of a strip, as products take them, from its keys; `factor`: from products to exponents of two. What was summed
  // so far is made relative to the new maximum.
  __device__ __forceinline__ void weigh(const Span& span, int base, const Keys& keys, const uint16_t* queries, float factor,
                                        uint32_t (&weights)[kOctets][2]) {
    const int head = threadIdx.x % 32 / 4;
    float product[2][4] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++) {
      uint32_t k[2][kNumbers / 2];
      unpack(keys.w[0][piece], k[0]);
      unpack(keys.w[1][piece], k[1]);
#pragma unroll
      for (int part = 0; part < kNumbers / 8; part++) {
        const uint16_t* from = queries + head * kQueryRow + Keys::element(piece) + part * 8;
        const uint4 low = *(const uint4*)from;
        uint4 high = make_uint4(0, 0, 0, 0);
        if constexpr (kOctets == 2) high = *(const uint4*)(from + 8 * kQueryRow);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          multiply(product[i], low.x, high.x, low.y, high.y, k[i][part * 4], k[i][part * 4 + 1]);
          multiply(product[i], low.z, high.z, low.w, high.w, k[i][part * 4 + 2], k[i][part * 4 + 3]);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOctets; o++) {
      float weight[4], seen = highest[o];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = base + Values::token(i);
        weight[i] = token >= span.first && token < span.end ? product[i / 2][o * 2 + i % 2] * factor : kNoScore;
        seen = fmaxf(seen, weight[i]);
      }
      seen = fmaxf(seen, __shfl_xor_sync(~0u, seen, 1));
      seen = fmaxf(seen, __shfl_xor_sync(~0u, seen, 2));
      const float keep = exp2f(highest[o] - seen);
      highest[o] = seen;
      sum[o] *= keep;
#pragma unroll
      for (int i = 0; i < 4; i++) weight[i] = exp2f(weight[i] - seen), sum[o] += weight[i];
      weights[o][0] = operand(weight[0], weight[1]);
      weights[o][1] = operand(weight[2], weight[3]);
      const float first = __shfl_sync(~0u, keep, threadIdx.x % 4 * 8), second = __shfl_sync(~0u, keep, threadIdx.x % 4 * 8 + 4);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; i++) {
        out[o][i][0] *= first, out[o][i][1] *= second;
        out[o][i][2] *= first, out[o][i][3] *= second;
      }
    }
  }

  __device__ __forceinline__ void add(const Values& values, const uint32_t (&weights)[kOctets][2]) {
#pragma unroll
    for (int set = 0; set < kSets; set++) {
      uint32_t v[4][kNumbers / 2];
#pragma unroll
      for (int i = 0; i < 4; i++) unpack(values.w[i][set], v[i]);
#pragma unroll
      for (int j = 0; j < kNumbers / 2; j++) {
        const uint32_t a0 = __byte_perm(v[0][j], v[1][j], 0x5410), a1 = __byte_perm(v[0][j], v[1][j], 0x7632);
        const uint32_t a2 = __byte_perm(v[2][j], v[3][j], 0x5410), a3 = __byte_perm(v[2][j], v[3][j], 0x7632);
#pragma unroll
        for (int o = 0; o < kOctets; o++) multiply(out[o][set * (kNumbers / 2) + j], a0, a1, a2, a3, weights[o][0], weights[o][1]);
      }
    }
  }
};
