// Paged decode attention inside the persistent kernel: rotary embedding, write of the new key and value, split softmax.
//
// A work item is a run of tokens of one sequence for up to four query heads that share a K/V head. Items are cut so that
// about one falls to each block. Within an item a warp takes 16 tokens at a time on the tensor cores, each warp with a running
// softmax (Milakov and Gimelshein, 2018; products laid out as in Dao, FlashAttention-2, 2023), and these are merged at the
// end. Where a sequence has several items, the block that finishes last merges them, in the order of the tokens (Dao et al.,
// Flash-Decoding, 2023).

constexpr int kGroupHeads = 4;  // query heads of an item
constexpr int kQueriesPerKv = HEADS / KV_HEADS;
constexpr int kSubgroups = (kQueriesPerKv + kGroupHeads - 1) / kGroupHeads;
constexpr int kVirtualHeads = KV_HEADS * kSubgroups;
constexpr int kWarpTokens = 16;
constexpr int kSweep = kConsumerWarps * kWarpTokens;
// Fewer tokens than these are not worth an item of their own: results of several have to be merged through L2.
constexpr int kFewestTokens = 128;
constexpr float kNoScore = -1e30f;
constexpr int kQkvRows = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

struct Item {
  int row, virtual_head, chunk, chunks, first_item;  // first_item: number of the row's first item
  int begin, end;                                    // tokens
};

struct AttentionScratch {  // shared memory
  float acc[kConsumerWarps][kGroupHeads][HEAD_DIM];
  float highest[kConsumerWarps][kGroupHeads];
  float sum[kConsumerWarps][kGroupHeads];
  uint16_t q[kGroupHeads][HEAD_DIM + 32];  // as the tensor cores take it; rows 64 bytes apart modulo 128
  uint8_t new_k[HEAD_DIM * KV_BYTES], new_v[HEAD_DIM * KV_BYTES];  // of the newest token, as the cache has them
  Item item;
  int last;
};

// The step's sequences, and how attention over them is cut: the same in every block, found once per window width.
struct Step {
  int64_t position[ROWS], cache_slot[ROWS];
  const int* pages[ROWS];
  int length[ROWS];
  int window, tokens, items;  // 0: no window; tokens of an item; number of items
};

__device__ __forceinline__ int first_token(int length, int window) {
  return window > 0 && length > window ? length - window : 0;
}

// By one thread; a barrier of the block must follow.
__device__ inline void plan_attention(Step& step, int window) {
  if (threadIdx.x != 0 || step.window == window) return;
  int total = 0, longest = 0;
  for (int r = 0; r < ROWS; r++) {
    const int n = step.length[r] - first_token(step.length[r], window);
    total += n;
    longest = max(longest, n);
  }
  int tokens = max((total * kVirtualHeads + GRID - 1) / GRID, kFewestTokens);
  int items;
  while (true) {
    tokens = (tokens + 15) / 16 * 16;
    items = 0;
    for (int r = 0; r < ROWS; r++) {
      const int n = step.length[r] - first_token(step.length[r], window);
      items += (n + tokens - 1) / tokens * kVirtualHeads;
    }
    if (items <= GRID || tokens >= longest) break;
    tokens += tokens / 8 + 1;
  }
  step.window = window;
  step.tokens = tokens;
  step.items = items;
}

__device__ inline Item find_item(const Step& step, int number) {
  Item item{};
  int before = 0;
  for (int r = 0; r < ROWS; r++) {
    const int begin = first_token(step.length[r], step.window);
    const int chunks = (step.length[r] - begin + step.tokens - 1) / step.tokens;
    const int items = chunks * kVirtualHeads;
    if (number < before + items) {
      item.row = r;
      item.chunks = chunks;
      item.first_item = before;
      item.chunk = (number - before) / kVirtualHeads;
      item.virtual_head = (number - before) % kVirtualHeads;
      item.begin = begin + item.chunk * step.tokens;
      item.end = min(item.begin + step.tokens, step.length[r]);
      break;
    }
    before += items;
  }
  return item;
}

// Byte offset of a token's K (which = 0) or V (1) of a head in the cache of a layer.
__device__ __forceinline__ int64_t cache_offset(int64_t page, int which, int offset, int kv_head) {
  return (((page * 2 + which) * PAGE_SIZE + offset) * KV_HEADS + kv_head) * (int64_t)(HEAD_DIM * KV_BYTES);
}

// A lane's pairs of dimensions of a head, d and d + HEAD_DIM / 2.
constexpr int kPairs = (HEAD_DIM + 63) / 64;
__device__ __forceinline__ int pair_dimension(int i) { return threadIdx.x % 32 + i * 32; }
__device__ __forceinline__ bool has_pair(int i) { return HEAD_DIM % 64 == 0 || pair_dimension(i) < HEAD_DIM / 2; }

// What turns a position's heads, and their norm's weights. Loaded before the heads are there.
struct Rotation {
  float cosine[kPairs] = {}, sine[kPairs] = {}, norm[kPairs][2] = {};

  __device__ __forceinline__ void load(const float* cos_sin, const uint16_t* weight) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int d = has_pair(i) ? pair_dimension(i) : 0;
      cosine[i] = cos_sin[d], sine[i] = cos_sin[d + HEAD_DIM / 2];
      norm[i][0] = weight == nullptr ? 1.f : bf16_value(weight[d]);
      norm[i][1] = weight == nullptr ? 1.f : bf16_value(weight[d + HEAD_DIM / 2]);
    }
  }
};

// One warp: a head's numbers, lane by lane.
struct Head {
  float v[kPairs][2];

  __device__ __forceinline__ void load(const uint16_t* from) {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        v[i][half] = has_pair(i) ? bf16_value(load_shared_state(from + pair_dimension(i) + half * (HEAD_DIM / 2))) : 0.f;
  }

  // Normed and rotated; rounded as a bf16 tensor is.
  __device__ __forceinline__ void rotate(const Rotation& by, bool normed) {
    if (normed) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < kPairs; i++) squares += v[i][0] * v[i][0] + v[i][1] * v[i][1];
#pragma unroll
      for (int off = 16; off; off /= 2) squares += __shfl_xor_sync(~0u, squares, off);
      const float rstd = rsqrtf(squares / HEAD_DIM + EPS);
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) v[i][half] = bf16_round(v[i][half] * rstd * by.norm[i][half]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const float first = v[i][0], second = v[i][1];
      v[i][0] = bf16_round(first * by.cosine[i] - second * by.sine[i]);
      v[i][1] = bf16_round(second * by.cosine[i] + first * by.sine[i]);
    }
  }

  // `store(dimension, number)` for each.
  template <class F>
  __device__ __forceinline__ void each(F store) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (has_pair(i)) store(pair_dimension(i) + half * (HEAD_DIM / 2), v[i][half]);
  }
};

// Eight numbers of the cache, and as the tensor cores take them: bf16 as they are, FP8 as the float16 that they are exactly.
#if KV_FP8
typedef uint2 CacheWords;
constexpr Format kCacheFormat = kFp8;
__device__ __forceinline__ CacheWords load_cache(const char* p) { return load_shared_state8(p); }
__device__ __forceinline__ void unpack(CacheWords w, uint32_t (&out)[4]) {
  widen(w.x, out[0], out[1]);
  widen(w.y, out[2], out[3]);
}
__device__ __forceinline__ uint32_t pair16(float low, float high) { return f16_pair(low, high); }
__device__ __forceinline__ float2 values16(uint32_t pair) { return f16_values(pair); }
#else
typedef uint4 CacheWords;
constexpr Format kCacheFormat = kBf16;
__device__ __forceinline__ CacheWords load_cache(const char* p) { return load_shared_state16(p); }
__device__ __forceinline__ void unpack(CacheWords w, uint32_t (&out)[4]) { out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w; }
__device__ __forceinline__ uint32_t pair16(float low, float high) { return bf16_pair(low, high); }
__device__ __forceinline__ float2 values16(uint32_t pair) { return make_float2(bf16_low(pair), bf16_high(pair)); }
#endif

// K of 16 tokens, as a warp's tensor cores take it: a lane has eight numbers in every 32 of tokens lane / 4 and 8 more.
struct Keys {
  static constexpr int kPieces = HEAD_DIM / 32;
  CacheWords k[2][kPieces];

  static __device__ __forceinline__ int token(int i) { return threadIdx.x % 32 / 4 + i * 8; }
  static __device__ __forceinline__ int element(int piece) { return piece * 32 + threadIdx.x % 4 * 8; }

  // Tokens from `base` on. The newest one is not in the cache yet.
  __device__ __forceinline__ void load(const Item& item, int base, int newest, const char* cache, const int* pages) {
    int page[2];
#pragma unroll
    for (int i = 0; i < 2; i++) page[i] = base + token(i) < item.end && base + token(i) != newest ? pages[(base + token(i)) / PAGE_SIZE] : -1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const char* from = cache + cache_offset(page[i], 0, (base + token(i)) % PAGE_SIZE, item.virtual_head / kSubgroups);
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) k[i][piece] = page[i] >= 0 ? load_cache(from + element(piece) * KV_BYTES) : CacheWords();
    }
  }

  // The newest token, number `at` of the 16, from scratch.
  __device__ __forceinline__ void take_newest(const AttentionScratch& s, int at) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (token(i) == at) {
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) k[i][piece] = *(const CacheWords*)(s.new_k + element(piece) * KV_BYTES);
      }
  }
};

// V of 16 tokens: octets lane / 4 (and 8 more) of tokens 2 * (lane % 4), the next, and 8 more than these.
struct Values {
  static constexpr int kSets = (HEAD_DIM + 63) / 64;
  CacheWords v[4][kSets];

  static __device__ __forceinline__ int token(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }
  static __device__ __forceinline__ int element(int set) { return (set * 8 + threadIdx.x % 32 / 4) * 8; }
  static __device__ __forceinline__ bool has(int set) { return HEAD_DIM % 64 == 0 || element(set) < HEAD_DIM; }

  __device__ __forceinline__ void load(const Item& item, int base, int newest, const char* cache, const int* pages) {
    int page[4];
#pragma unroll
    for (int i = 0; i < 4; i++) page[i] = base + token(i) < item.end && base + token(i) != newest ? pages[(base + token(i)) / PAGE_SIZE] : -1;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const char* from = cache + cache_offset(page[i], 1, (base + token(i)) % PAGE_SIZE, item.virtual_head / kSubgroups);
#pragma unroll
      for (int set = 0; set < kSets; set++) v[i][set] = page[i] >= 0 && has(set) ? load_cache(from + element(set) * KV_BYTES) : CacheWords();
    }
  }

  __device__ __forceinline__ void take_newest(const AttentionScratch& s, int at) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (token(i) == at) {
#pragma unroll
        for (int set = 0; set < kSets; set++)
          if (has(set)) v[i][set] = *(const CacheWords*)(s.new_v + element(set) * KV_BYTES);
      }
  }
};

__device__ __forceinline__ int warp_begin(const Item& item) { return item.begin + (int)(threadIdx.x / 32) * kWarpTokens; }

// The running softmax of a warp: lane / 4 is the head (of four; the other lanes' rows are none). Its sums of V are in scratch.
struct Softmax {
  float highest = kNoScore, sum = 0.f, keep;
  uint32_t upper[2], lower[2];  // weights of 16 tokens, and what 16 bits leave of them

  // Weights of 16 tokens, `count` of them there; `factor`: from products to exponents of two.
  __device__ __forceinline__ void weigh(const AttentionScratch& s, const Keys& keys, int count, float factor) {
    const int head = threadIdx.x % 32 / 4;
    float product[2][4] = {};
#pragma unroll
    for (int piece = 0; piece < Keys::kPieces; piece++) {
      const uint4 q = head < kGroupHeads ? *(const uint4*)(s.q[head] + Keys::element(piece)) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t k[4];
        unpack(keys.k[i][piece], k);
        mma<kCacheFormat>(product[i], q.x, 0, q.y, 0, k[0], k[1]);
        mma<kCacheFormat>(product[i], q.z, 0, q.w, 0, k[2], k[3]);
      }
    }
    float weight[4], seen = highest;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      weight[i] = Values::token(i) < count ? product[i / 2][i % 2] * factor : kNoScore;
      seen = fmaxf(seen, weight[i]);
    }
    seen = fmaxf(seen, __shfl_xor_sync(~0u, seen, 1));
    seen = fmaxf(seen, __shfl_xor_sync(~0u, seen, 2));
    keep = exp2f(highest - seen);
    highest = seen;
    sum *= keep;
#pragma unroll
    for (int i = 0; i < 4; i++) weight[i] = exp2f(weight[i] - seen), sum += weight[i];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      upper[i] = pair16(weight[i * 2], weight[i * 2 + 1]);
      const float2 rounded = values16(upper[i]);
      lower[i] = pair16(weight[i * 2] - rounded.x, weight[i * 2 + 1] - rounded.y);
    }
  }

  // Lower parts of the weights are in rows of their own, which are free: eight more than the head's.
  __device__ __forceinline__ void add(AttentionScratch& s, const Values& values, bool first) const {
    const int warp = threadIdx.x / 32, head = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int set = 0; set < Values::kSets; set++) {
      uint32_t v[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) unpack(values.v[i][set], v[i]);
      float octet[2][8];
#pragma unroll
      for (int e = 0; e < 8; e++) {  // element e of eight octets
        float c[4] = {};
        const uint32_t which = e % 2 ? 0x7632 : 0x5410;
        mma<kCacheFormat>(c, upper[0], lower[0], upper[1], lower[1], __byte_perm(v[0][e / 2], v[1][e / 2], which),
                          __byte_perm(v[2][e / 2], v[3][e / 2], which));
        octet[0][e] = c[0] + c[2], octet[1][e] = c[1] + c[3];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = (set * 8 + quarter * 2 + i) * 8;
        if (head >= kGroupHeads || at >= HEAD_DIM) continue;
        float4* to = (float4*)(s.acc[warp][head] + at);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float4 total = make_float4(octet[i][j * 4], octet[i][j * 4 + 1], octet[i][j * 4 + 2], octet[i][j * 4 + 3]);
          if (!first) {
            const float4 before = to[j];
            total.x += before.x * keep, total.y += before.y * keep, total.z += before.z * keep, total.w += before.w * keep;
          }
          to[j] = total;
        }
      }
    }
  }

  __device__ __forceinline__ void store(AttentionScratch& s) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int warp = threadIdx.x / 32, head = threadIdx.x % 32 / 4;
    if (head < kGroupHeads && threadIdx.x % 4 == 0) s.highest[warp][head] = highest, s.sum[warp][head] = sum;
  }
};

// Tokens of an item, into scratch: a partial softmax of every warp that has some. `keys`, `values`: the warp's first tokens.
__device__ __forceinline__ void attend_tokens(AttentionScratch& s, const Item& item, Keys& keys, Values& values, int newest, const char* cache,
                                              const int* pages, float factor) {
  const int begin = warp_begin(item);
  if (begin >= item.end) return;
  Softmax softmax;
#pragma unroll 1
  for (int base = begin; base < item.end; base += kSweep) {
    // Where the item ends with the newest token, scratch has it.
    const bool newest_here = newest >= base && newest < min(base + kWarpTokens, item.end);
    if (newest_here) keys.take_newest(s, newest - base);
    softmax.weigh(s, keys, item.end - base, factor);
    if (base + kSweep < item.end) keys.load(item, base + kSweep, newest, cache, pages);
    if (newest_here) values.take_newest(s, newest - base);
    softmax.add(s, values, base == begin);
    if (base + kSweep < item.end) values.load(item, base + kSweep, newest, cache, pages);
  }
  softmax.store(s);
}

struct AttentionTask {  // of one layer
  char* cache;
  const uint16_t *qkv, *q_norm, *k_norm;
  uint16_t* out;
  float* amax;  // [ROWS] of out
  const float* cos_sin;
  float k_scale, v_scale;
  float *partial, *partial_softmax;  // of each item: [kGroupHeads][HEAD_DIM]; [kGroupHeads][2]
  int* arrived;                      // [ROWS][kVirtualHeads], zero between layers
};

// The thread's element (head g, dimension d) of what several items of a row give, in the order of the tokens. By the block
// that finished last, after a barrier of the block. The items' weights are found by a thread each.
__device__ inline void merge_items(AttentionScratch& s, const Item& item, const AttentionTask& task, int g, int d, float& sum, float& acc) {
  float* stats = &s.acc[0][0][0];  // [chunks][kGroupHeads][2], free by now
  const int first = item.first_item + item.virtual_head;
  for (int i = threadIdx.x; i < item.chunks * kGroupHeads * 2; i += kConsumers)
    stats[i] = load_shared_state(task.partial_softmax + (first + i / (kGroupHeads * 2) * kVirtualHeads) * kGroupHeads * 2 + i % (kGroupHeads * 2));
  consumers_sync();
  if (g >= kGroupHeads) return;
  float highest = kNoScore;
  for (int c = 0; c < item.chunks; c++) highest = fmaxf(highest, stats[(c * kGroupHeads + g) * 2]);
  sum = 0.f, acc = 0.f;
  const float* from = task.partial + (first * kGroupHeads + g) * HEAD_DIM + d;
  constexpr int kBatch = 8;  // loads in flight
  for (int begin = 0; begin < item.chunks; begin += kBatch) {
    float part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      part[i] = begin + i < item.chunks ? load_shared_state(from + (begin + i) * kVirtualHeads * kGroupHeads * HEAD_DIM) : 0.f;
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (begin + i >= item.chunks) break;
      const float* stat = stats + ((begin + i) * kGroupHeads + g) * 2;
      const float weight = exp2f(stat[0] - highest);
      sum += weight * stat[1];
      acc += weight * part[i];
    }
  }
}

// From the partial softmax of every warp to the item's result, or, in the last block, to the row's.
__device__ inline void finish_item(AttentionScratch& s, const Item& item, int number, const AttentionTask& task) {
  const int tid = threadIdx.x, lane = tid % 32, g = tid / HEAD_DIM, d = tid % HEAD_DIM;
  const int kv_head = item.virtual_head / kSubgroups, sub = item.virtual_head % kSubgroups;
  const int warps = min((item.end - item.begin + kWarpTokens - 1) / kWarpTokens, kConsumerWarps);
  float highest = kNoScore, sum = 0.f, acc = 0.f;
  if (g < kGroupHeads) {
    const float own = lane < warps ? s.highest[lane % kConsumerWarps][g] : kNoScore;  // a lane for each warp that had tokens
    highest = own;
#pragma unroll
    for (int off = 16; off; off /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, off));
    const float weight = lane < warps ? exp2f(own - highest) : 0.f;
    if (lane < warps) sum = weight * s.sum[lane % kConsumerWarps][g];
#pragma unroll
    for (int off = 16; off; off /= 2) sum += __shfl_xor_sync(~0u, sum, off);
    const int even = (warps + 3) / 4 * 4;  // weights beyond the last warp's are zero, what stands there may be anything
#pragma unroll 1
    for (int first = 0; first < even; first += 4)
#pragma unroll
      for (int w = first; w < first + 4; w++) {
        const float theirs = __shfl_sync(~0u, weight, w);
        if (w < warps) acc += theirs * s.acc[w][g][d];
      }
  }
  if (item.chunks > 1) {
    if (g < kGroupHeads) {
      task.partial[(number * kGroupHeads + g) * HEAD_DIM + d] = acc;
      if (d == 0) {
        task.partial_softmax[(number * kGroupHeads + g) * 2] = highest;
        task.partial_softmax[(number * kGroupHeads + g) * 2 + 1] = sum;
      }
    }
    consumers_sync();
    if (tid == 0) {
      int* arrived = task.arrived + item.row * kVirtualHeads + item.virtual_head;
      s.last = add_and_get(arrived) == item.chunks;
      if (s.last) *arrived = 0;
    }
    consumers_sync();
    if (!s.last) return;
    merge_items(s, item, task, g, d, sum, acc);
  }
  float value = 0.f;
  if (g < min(kGroupHeads, kQueriesPerKv - sub * kGroupHeads)) {
    value = bf16_round(acc / sum * task.v_scale);
    const int head = kv_head * kQueriesPerKv + sub * kGroupHeads + g;
    task.out[(item.row * HEADS + head) * HEAD_DIM + d] = bf16_bits(value);
  }
  if (kLayerFormat != kFp8) return;
  value = fabsf(value);
  for (int off = 16; off; off /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, off));
  if (tid % 32 == 0 && value > 0.f) atomic_max(task.amax + item.row, value);
}

// What a warp does for an item before its tokens: warps 0 to 3 a head of q each, the next two K and V of the new token, where
// the item ends with it.
__device__ __forceinline__ bool rotates(const Step& step, const Item& item) {
  return threadIdx.x / 32 < kGroupHeads || (threadIdx.x / 32 < kGroupHeads + 2 && item.end == step.length[item.row]);
}

__device__ __forceinline__ void load_rotation(Rotation& rotation, const Step& step, const Item& item, const AttentionTask& task) {
  if (rotates(step, item))
    rotation.load(task.cos_sin + step.position[item.row] * HEAD_DIM, threadIdx.x / 32 < kGroupHeads ? task.q_norm : task.k_norm);
}

// q of the item's heads, and the new token's K and V, into scratch, and into the cache.
__device__ inline void rotate_item(AttentionScratch& s, const Step& step, const Item& item, const AttentionTask& task, const Rotation& rotation) {
  if (!rotates(step, item)) return;
  const int warp = threadIdx.x / 32;
  const int kv_head = item.virtual_head / kSubgroups, sub = item.virtual_head % kSubgroups;
  const int heads = min(kGroupHeads, kQueriesPerKv - sub * kGroupHeads);
  const uint16_t* qkv = task.qkv + item.row * kQkvRows;
  const int which = warp - kGroupHeads;  // of K and V
  const int number = which < 0 ? kv_head * kQueriesPerKv + sub * kGroupHeads + min(warp, heads - 1) : HEADS + which * KV_HEADS + kv_head;
  Head head;
  head.load(qkv + number * HEAD_DIM);
  if (which < 1) head.rotate(rotation, (which < 0 ? task.q_norm : task.k_norm) != nullptr);
  if (which < 0) {
    head.each([&](int d, float x) { s.q[warp][d] = (uint16_t)pair16(x, 0.f); });
    return;
  }
  // Every item that sees the new token rounds it the same way; one writes it to the cache.
  const int64_t slot = step.cache_slot[item.row];
  const bool writes = sub == 0 && slot >= 0;
  uint8_t* to = (uint8_t*)task.cache + cache_offset(slot / PAGE_SIZE, which, slot % PAGE_SIZE, kv_head);
  uint8_t* scratch = which == 0 ? s.new_k : s.new_v;
  [[maybe_unused]] const float inverse_scale = 1.f / (which == 0 ? task.k_scale : task.v_scale);
  head.each([&](int d, float x) {
#if KV_FP8
    const uint8_t number = (uint8_t)e4m3_quad(x * inverse_scale, 0.f, 0.f, 0.f);
    scratch[d] = number;
    if (writes) to[d] = number;
#else
    const uint16_t number = bf16_bits(x);
    ((uint16_t*)scratch)[d] = number;
    if (writes) ((uint16_t*)to)[d] = number;
#endif
  });
}

// All items of this block, which has some, by the consumer warps. The cache is read ahead of the barrier: only q and the new
// token's K and V come from the product that other blocks may still be at.
__device__ __forceinline__ void attention(AttentionScratch& s, const Step& step, const AttentionTask& task, GridBarrier barrier) {
  for (int number = blockIdx.x;;) {
    Keys keys;
    Values values;
    Rotation rotation;
    {
      const Item item = find_item(step, number);
      const int newest = step.length[item.row] - 1;
      keys.load(item, warp_begin(item), newest, task.cache, step.pages[item.row]);
      values.load(item, warp_begin(item), newest, task.cache, step.pages[item.row]);
      load_rotation(rotation, step, item, task);
      if (threadIdx.x == 0) s.item = item;
    }
    if (number == blockIdx.x) barrier.wait_all();
    else consumers_sync();
    const Item& item = s.item;  // registers are scarce
    const int newest = step.length[item.row] - 1;
    rotate_item(s, step, item, task, rotation);
    consumers_sync();
    attend_tokens(s, item, keys, values, newest, task.cache, step.pages[item.row], SOFTMAX_SCALE * 1.44269504f * task.k_scale);
    consumers_sync();
    finish_item(s, item, number, task);
    number += GRID;
    if (number >= step.items) break;
    consumers_sync();  // scratch is free for the next item
  }
}
