// Paged decode attention inside the persistent kernel: rotary embedding, write of the new key and value, split softmax.
//
// A work item is a run of tokens of one sequence for up to four query heads that share a K/V head. Items are cut so that
// about one falls to each block. Within an item a token is read by HEAD_DIM / 8 lanes, 16 bytes each; every such group of
// lanes keeps a running softmax (Milakov and Gimelshein, 2018) and the groups are merged at the end. Where a sequence has
// several items, the block that finishes last merges them, in the order of the tokens (Dao et al., Flash-Decoding, 2023).

constexpr int kGroupHeads = 4;  // query heads of an item
constexpr int kQueriesPerKv = HEADS / KV_HEADS;
constexpr int kSubgroups = (kQueriesPerKv + kGroupHeads - 1) / kGroupHeads;
constexpr int kVirtualHeads = KV_HEADS * kSubgroups;
constexpr int kLanesPerToken = HEAD_DIM / 8;
constexpr int kTokensPerWarp = 32 / kLanesPerToken;
constexpr int kTokenGroups = kConsumerWarps * kTokensPerWarp;
constexpr float kNoScore = -1e30f;
constexpr int kQkvRows = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

struct AttentionScratch {  // shared memory
  float acc[kConsumerWarps][kGroupHeads][HEAD_DIM];
  float highest[kConsumerWarps][kGroupHeads];
  float sum[kConsumerWarps][kGroupHeads];
  float q[kGroupHeads][HEAD_DIM];
  float new_k[HEAD_DIM], new_v[HEAD_DIM];
  int last;
};

// The step's sequences, and how attention over them is cut: the same in every block, found once per window width.
struct Step {
  int64_t position[ROWS], cache_slot[ROWS];
  const int* pages[ROWS];
  int length[ROWS];
  int window, tokens, items;  // 0: no window; tokens of an item; number of items
};

struct Item {
  int row, virtual_head, chunk, chunks, first_item;  // first_item: number of the row's first item
  int begin, end;                                    // tokens
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
  int tokens = max((total * kVirtualHeads + GRID - 1) / GRID, kTokenGroups);
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

// One warp: a head of q or k from the fused product, normed and rotated, into out[HEAD_DIM]; rounded as a bf16 tensor is.
__device__ inline void rotate_head(const uint16_t* head, const uint16_t* norm, const float* cos_sin, float factor, float* out) {
  const int lane = threadIdx.x % 32;
  float rstd = 1.f;
  if (norm != nullptr) {
    float squares = 0.f;
    for (int d = lane; d < HEAD_DIM; d += 32) {
      const float x = bf16_value(load_shared_state(head + d));
      squares += x * x;
    }
    for (int off = 16; off; off /= 2) squares += __shfl_xor_sync(~0u, squares, off);
    rstd = rsqrtf(squares / HEAD_DIM + EPS);
  }
  for (int d = lane; d < HEAD_DIM / 2; d += 32) {
    float first = bf16_value(load_shared_state(head + d)), second = bf16_value(load_shared_state(head + d + HEAD_DIM / 2));
    if (norm != nullptr) {
      first = bf16_round(first * rstd * bf16_value(norm[d]));
      second = bf16_round(second * rstd * bf16_value(norm[d + HEAD_DIM / 2]));
    }
    const float cosine = cos_sin[d], sine = cos_sin[d + HEAD_DIM / 2];
    out[d] = bf16_round(first * cosine - second * sine) * factor;
    out[d + HEAD_DIM / 2] = bf16_round(second * cosine + first * sine) * factor;
  }
}

// One warp: values to the cache's format and back, as everybody else will read them; `to` (null: nowhere) in the cache.
__device__ inline void store_head(float* values, char* to, float inverse_scale) {
  const int lane = threadIdx.x % 32;
  for (int d = lane; d < HEAD_DIM; d += 32) {
#if KV_FP8
    const uint32_t byte = e4m3_quad(values[d] * inverse_scale, 0.f, 0.f, 0.f) & 0xff;
    if (to != nullptr) ((uint8_t*)to)[d] = (uint8_t)byte;
    float quad[4];
    e4m3_values(byte, quad);
    values[d] = quad[0];
#else
    if (to != nullptr) ((uint16_t*)to)[d] = bf16_bits(values[d]);
#endif
  }
}

#if KV_FP8
typedef uint2 CacheWords;
__device__ __forceinline__ CacheWords load_cache(const char* p) { return load_shared_state8(p); }
__device__ __forceinline__ void unpack(CacheWords w, float* out) {
  e4m3_values(w.x, out);
  e4m3_values(w.y, out + 4);
}
#else
typedef uint4 CacheWords;
__device__ __forceinline__ CacheWords load_cache(const char* p) { return load_shared_state16(p); }
__device__ __forceinline__ void unpack(CacheWords w, float* out) {
  out[0] = bf16_low(w.x), out[1] = bf16_high(w.x), out[2] = bf16_low(w.y), out[3] = bf16_high(w.y);
  out[4] = bf16_low(w.z), out[5] = bf16_high(w.z), out[6] = bf16_low(w.w), out[7] = bf16_high(w.w);
}
#endif

// The running softmax of one group of lanes: this lane's 8 dimensions of each head.
struct Softmax {
  float highest[kGroupHeads], sum[kGroupHeads], acc[kGroupHeads][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int g = 0; g < kGroupHeads; g++) {
      highest[g] = kNoScore, sum[g] = 0.f;
#pragma unroll
      for (int d = 0; d < 8; d++) acc[g][d] = 0.f;
    }
  }

  // q: this lane's dimensions of each head, in shared memory: in registers there is no room for them.
  __device__ __forceinline__ void add(const float* q, const float* k, const float* v, bool valid) {
    float score[kGroupHeads];
#pragma unroll
    for (int g = 0; g < kGroupHeads; g++) {
      const float4 a = *(const float4*)(q + g * HEAD_DIM), b = *(const float4*)(q + g * HEAD_DIM + 4);
      score[g] = a.x * k[0] + a.y * k[1] + a.z * k[2] + a.w * k[3] + b.x * k[4] + b.y * k[5] + b.z * k[6] + b.w * k[7];
    }
#pragma unroll
    for (int off = kLanesPerToken / 2; off; off /= 2)
#pragma unroll
      for (int g = 0; g < kGroupHeads; g++) score[g] += __shfl_xor_sync(~0u, score[g], off);
#pragma unroll
    for (int g = 0; g < kGroupHeads; g++) {
      const float seen = valid ? fmaxf(highest[g], score[g]) : highest[g];
      const float keep = exp2f(highest[g] - seen), weight = valid ? exp2f(score[g] - seen) : 0.f;
      highest[g] = seen;
      sum[g] = sum[g] * keep + weight;
#pragma unroll
      for (int d = 0; d < 8; d++) acc[g][d] = acc[g][d] * keep + weight * v[d];
    }
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int off = kLanesPerToken; off < 32; off *= 2)
#pragma unroll
      for (int g = 0; g < kGroupHeads; g++) {
        const float other = __shfl_xor_sync(~0u, highest[g], off);
        const float seen = fmaxf(highest[g], other);
        const float mine = exp2f(highest[g] - seen), theirs = exp2f(other - seen);
        highest[g] = seen;
        sum[g] = sum[g] * mine + __shfl_xor_sync(~0u, sum[g], off) * theirs;
#pragma unroll
        for (int d = 0; d < 8; d++) acc[g][d] = acc[g][d] * mine + __shfl_xor_sync(~0u, acc[g][d], off) * theirs;
      }
  }
};

// K and V of the tokens that a group of lanes reads next: two, a sweep of all groups apart.
struct TokenPair {
  CacheWords k[2], v[2];

  // The newest token is not in the cache yet: it comes from scratch.
  __device__ __forceinline__ void load(const Item& item, int base, int newest, const char* cache, const int* pages) {
    const int lane = threadIdx.x % 32;
    const int group = threadIdx.x / 32 * kTokensPerWarp + lane / kLanesPerToken, at = lane % kLanesPerToken * 8;
    const int kv_head = item.virtual_head / kSubgroups;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int token = base + u * kTokenGroups + group;
      k[u] = CacheWords(), v[u] = CacheWords();
      if (token < item.end && token != newest) {
        const int64_t page = pages[token / PAGE_SIZE];
        k[u] = load_cache(cache + cache_offset(page, 0, token % PAGE_SIZE, kv_head) + at * KV_BYTES);
        v[u] = load_cache(cache + cache_offset(page, 1, token % PAGE_SIZE, kv_head) + at * KV_BYTES);
      }
    }
  }
};

// Tokens of an item, into scratch: one partial softmax per warp. `pair`: the first tokens.
__device__ inline void attend_tokens(AttentionScratch& s, const Item& item, TokenPair pair, int newest, const char* cache, const int* pages) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp * kTokensPerWarp + lane / kLanesPerToken, at = lane % kLanesPerToken * 8;
  const float* q = &s.q[0][at];
  Softmax softmax;
  softmax.clear();
#pragma unroll 1
  for (int base = item.begin; base < item.end; base += 2 * kTokenGroups) {
    if (base > item.begin) pair.load(item, base, newest, cache, pages);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int token = base + u * kTokenGroups + group;
      float kf[8], vf[8];
      unpack(pair.k[u], kf);
      unpack(pair.v[u], vf);
      if (token == newest && token < item.end) {  // scratch has it where the item ends with it
#pragma unroll
        for (int d = 0; d < 8; d++) kf[d] = s.new_k[at + d], vf[d] = s.new_v[at + d];
      }
      softmax.add(q, kf, vf, token < item.end);
    }
  }
  softmax.merge_warp();
  if (lane < kLanesPerToken) {
#pragma unroll
    for (int g = 0; g < kGroupHeads; g++) {
#pragma unroll
      for (int d = 0; d < 8; d++) s.acc[warp][g][at + d] = softmax.acc[g][d];
      if (lane == 0) s.highest[warp][g] = softmax.highest[g], s.sum[warp][g] = softmax.sum[g];
    }
  }
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
  const int tid = threadIdx.x, g = tid / HEAD_DIM, d = tid % HEAD_DIM;
  const int kv_head = item.virtual_head / kSubgroups, sub = item.virtual_head % kSubgroups;
  float highest = kNoScore, sum = 0.f, acc = 0.f;
  if (g < kGroupHeads) {
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++) highest = fmaxf(highest, s.highest[w][g]);
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++) {
      const float weight = exp2f(s.highest[w][g] - highest);
      sum += weight * s.sum[w][g];
      acc += weight * s.acc[w][g][d];
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

// q of the item's heads, and the new token's K and V where the item ends with it, into scratch; a warp each.
__device__ inline void rotate_item(AttentionScratch& s, const Step& step, const Item& item, const AttentionTask& task) {
  const int warp = threadIdx.x / 32;
  const int kv_head = item.virtual_head / kSubgroups, sub = item.virtual_head % kSubgroups;
  const int heads = min(kGroupHeads, kQueriesPerKv - sub * kGroupHeads);
  const uint16_t* qkv = task.qkv + item.row * kQkvRows;
  const float* cos_sin = task.cos_sin + step.position[item.row] * HEAD_DIM;
  if (warp < kGroupHeads) {
    const int head = kv_head * kQueriesPerKv + sub * kGroupHeads + min(warp, heads - 1);
    rotate_head(qkv + head * HEAD_DIM, task.q_norm, cos_sin, SOFTMAX_SCALE * 1.44269504f * task.k_scale, s.q[warp]);
  } else if (item.end == step.length[item.row] && warp < kGroupHeads + 2) {
    // Every item that sees the new token rounds it the same way; one writes it to the cache.
    const int64_t slot = step.cache_slot[item.row];
    const int which = warp - kGroupHeads;
    const bool writes = sub == 0 && slot >= 0;
    char* to = writes ? task.cache + cache_offset(slot / PAGE_SIZE, which, slot % PAGE_SIZE, kv_head) : nullptr;
    const uint16_t* head = qkv + (HEADS + which * KV_HEADS + kv_head) * HEAD_DIM;
    float* values = which ? s.new_v : s.new_k;
    if (which == 0) {
      rotate_head(head, task.k_norm, cos_sin, 1.f, values);
    } else {
      for (int d = threadIdx.x % 32; d < HEAD_DIM; d += 32) values[d] = bf16_value(load_shared_state(head + d));
    }
    __syncwarp();
    store_head(values, to, 1.f / (which ? task.v_scale : task.k_scale));
  }
}

// All items of this block, by the consumer warps. `task` is there once the barrier's wait is over. The cache is read ahead of the barrier: only q and the new token's K and V
// come from the product that other blocks may still be at.
__device__ inline void attention(AttentionScratch& s, const Step& step, const AttentionTask& task, const char* cache, GridBarrier barrier) {
  int number = blockIdx.x;
  Item item = find_item(step, number);
  TokenPair pair;
  if (number < step.items) pair.load(item, item.begin, step.length[item.row] - 1, cache, step.pages[item.row]);
  barrier.wait_all();
  while (number < step.items) {
    const int newest = step.length[item.row] - 1;
    rotate_item(s, step, item, task);
    consumers_sync();
    attend_tokens(s, item, pair, newest, task.cache, step.pages[item.row]);
    consumers_sync();
    finish_item(s, item, number, task);
    number += GRID;
    if (number >= step.items) break;
    consumers_sync();  // scratch is free for the next item
    item = find_item(step, number);
    pair.load(item, item.begin, step.length[item.row] - 1, task.cache, step.pages[item.row]);
  }
}
