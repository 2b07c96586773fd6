// Decode attention: one new token of each sequence over its paged K/V cache, rotary embedding and the write of the new K and V
// included, in one launch.
//
// A block has a run of tokens of one sequence for one K/V head and all query heads that share it (up to 16). Its warps take
// strips of 16 tokens in turn, straight from the cache into registers, each with a running softmax over products of the tensor
// cores (laid out as in Dao, FlashAttention-2, 2023); the sums are merged in shared memory, and where a sequence has several
// blocks, in memory. What blocks do is in the host's plan: items of eight numbers (`Work`), one for every KV_HEADS blocks.
//
// Behind the kernel in front (griddepcontrol.wait) is only what may come from it: the product's heads. Older tokens' K and V, the
// plan, the page table and the angles are older than it, and are read before. Rows of padding have an item without tokens, which
// writes zeros; items beyond the plan's have row -1.
//
// Compiled with NVRTC for sm_80 and newer, behind persistent/primitives.cuh and the other files here.

__device__ __forceinline__ Work read_work(const int* plan, int item) {
  const uint4 a = load_shared_state16(plan + item * 8), b = load_shared_state16(plan + item * 8 + 4);
  Work work;
  work.row = (int)a.x, work.begin = (int)a.y, work.end = (int)a.z, work.length = (int)a.w;
  work.first = (int)b.x, work.chunk = (int)b.y, work.chunks = (int)b.z, work.place = (int)b.w;
  return work;
}

// The pages of a warp's strips from token `begin` on, below `end`: lane i has that of its strip number `from` + i.
__device__ __forceinline__ int read_pages(const int* pages, int begin, int end, int from) {
  const int base = begin + (threadIdx.x / 32 + (from + (int)(threadIdx.x % 32)) * WARPS) * kStrip;
  return base < end ? __float_as_int(load_shared_state((const float*)pages + base / PAGE_SIZE)) : 0;
}

#define BITS_AS_FLOAT(bits) __uint_as_float((uint32_t)(bits))

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    decode_attention(const void* qkv, const float* row_scales, const float* column_scales, const uint16_t* bias, const float* cos_sin,
                     uint8_t* cache, const int* page_table, const int64_t* slots, const int* plan, uint16_t* out, float* partial,
                     float* statistics, int* arrived, int64_t rows, int64_t qkv_stride, int64_t max_pages, int64_t score_factor, int64_t out_factor,
                     int64_t inverse_k_scale, int64_t inverse_v_scale, const uint16_t* q_norm, const uint16_t* k_norm, int64_t eps) {
  Scratch& s = *(Scratch*)dynamic_shared;
  const int item = (int)blockIdx.x / KV_HEADS, kv_head = (int)blockIdx.x % KV_HEADS, warp = threadIdx.x / 32;
  // Most often an item is the row of its number from its first token on: its pages are asked for together with the plan.
  const int* pages = page_table + min(item, (int)rows - 1) * max_pages;
  int own_pages = read_pages(pages, 0, (int)max_pages * PAGE_SIZE, 0);
  const Work work = read_work(plan, item);
  Span span;
  span.begin = work.begin, span.end = work.end, span.first = work.first;
  span.newest = work.end == work.length ? work.length - 1 : -1;
  const int begin = span.begin + warp * kStrip;
  if (work.row != item || work.begin != 0) {
    pages = page_table + (int64_t)max(work.row, 0) * max_pages;
    own_pages = read_pages(pages, span.begin, span.end, 0);
  }
  Keys keys;
  Values values;
  const uint8_t* place = strip_place(cache, __shfl_sync(~0u, own_pages, 0), begin, kv_head);
  keys.load(span, begin, place);
  values.load(span, begin, place);
  Token token;
  token.cos_sin = cos_sin + (int64_t)max(work.length - 1, 0) * HEAD_DIM;
  Rotation rotation;
  rotation.load(token);
  const int64_t slot = span.newest >= 0 ? slots[work.row] : -1;
  wait_for_kernel_in_front();
  let_next_kernel_start();
  if (work.row < 0) return;

  Results results;
  results.out = out, results.partial = partial, results.statistics = statistics, results.arrived = arrived;
  results.factor = BITS_AS_FLOAT(out_factor);
  if (span.begin < span.end) {
    token.qkv = (const uint8_t*)qkv + work.row * qkv_stride * (QKV_INT32 ? 4 : 2);
    token.row_scale = row_scales + work.row, token.column_scales = column_scales, token.bias = bias;
    token.q_norm = q_norm, token.k_norm = k_norm, token.eps = BITS_AS_FLOAT(eps);
    NewRows to;
    to.k = s.new_k, to.v = s.new_v;
    const int64_t row_at = ((slot / PAGE_SIZE * 2 * PAGE_SIZE + slot % PAGE_SIZE) * KV_HEADS + kv_head) * kRowBytes;
    to.k_cache = slot < 0 ? nullptr : cache + row_at;
    to.v_cache = slot < 0 ? nullptr : cache + row_at + kToValues;
    to.inverse_k_scale = BITS_AS_FLOAT(inverse_k_scale), to.inverse_v_scale = BITS_AS_FLOAT(inverse_v_scale);
    take_token(token, rotation, kv_head, s.queries[0], span.newest >= 0, to);
  }
  __syncthreads();
  if (begin < span.end) {
    Softmax softmax;
    softmax.clear();
    int number = 0;
#pragma unroll 1
    for (int base = begin; base < span.end; base += WARPS * kStrip) {
      const int next = base + WARPS * kStrip;
      if (next < span.end) {
        if (++number % 32 == 0) own_pages = read_pages(pages, span.begin, span.end, number);
        place = strip_place(cache, __shfl_sync(~0u, own_pages, number % 32), next, kv_head);
      }
      const bool newest_here = span.newest >= base && span.newest < base + kStrip;
      if (newest_here) keys.take(span.newest - base, s.new_k);
      uint32_t weights[kOctets][2];
      softmax.weigh(span, base, keys, s.queries[0], BITS_AS_FLOAT(score_factor), weights);
      if (next < span.end) keys.load(span, next, place);
      if (newest_here) values.take(span.newest - base, s.new_v);
      softmax.add(values, weights);
      if (next < span.end) values.load(span, next, place);
    }
    store_warp(s, softmax);
  }
  __syncthreads();
  const int strips = (span.end - span.begin + kStrip - 1) / kStrip;
  finish(s, work, kv_head, min(strips, WARPS), results);
}
