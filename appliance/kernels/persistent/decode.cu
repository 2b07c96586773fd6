// A whole decode step, from token ids to logits, in one kernel that never lets the memory rest.
//
// One block per multiprocessor. A producer warp copies the weights that its block will need, layer after layer, into a ring
// in shared memory, waiting for nothing but free slots. Sixteen consumer warps multiply; between products they wait for all
// other blocks (the next product needs every part of the last one's result), and meanwhile the ring fills up. So the
// barriers, norms and attention of a layer hide behind the reading of weights. See README.md beside this file.
//
// A product tile is 16 weight rows by the whole inner dimension: the sixteen warps take 128 bytes of every 2 KiB of each
// row and add their sums up through shared memory, in the order of the warps.

// Phases of a step. Each waits for all blocks to have finished the phase before (`barrier.target` arrivals), works, and
// arrives. They are functions of their own so that registers hold what one phase needs: spilled ones would be fetched from
// L2, as shared memory leaves hardly any L1.

template <class P>
__device__ __noinline__ Ring normed_phase(Ring ring, GridBarrier barrier, const uint16_t* norm, Output out) {
  fetch_for_epilogues<P>(out);
  Input<P> in;
  load_normed(in, norm, barrier);
  ring = product<P>(ring, in, out);
  return ring;
}

// For a row that does not fit in registers at once: tiles keep their sums from pass to pass.
template <class P>
__device__ __noinline__ Ring plain_phase(Ring ring, GridBarrier barrier, const uint16_t* x, const float* amax, Output out) {
  fetch_for_epilogues<P>(out);
  if (RANKS > 1 && threadIdx.x == 0) shared().epoch++;
  barrier.wait_all();
  Input<P> in;
  typename PlainOf<P>::Type loaded;
  float inverse_scale[P::kRowSlots];
  loaded.load(x, 0);
  find_scales<P>(amax, inverse_scale);
  if constexpr (P::kPasses == 1) {
    take_plain(in, loaded, inverse_scale);
    ring = product<P>(ring, in, out);
  } else {
    Shared& s = shared();
    float sums[P::kTilesPerBlock][kColumnTiles][4] = {};
#pragma unroll 1
    for (int pass = 0; pass < P::kPasses; pass++) {
      constexpr bool kAhead = ROWS <= 2;  // registers hold the next part of x already
      if (!kAhead && pass > 0) loaded.load(x, pass);
      take_plain(in, loaded, inverse_scale);
      if (kAhead && pass + 1 < P::kPasses) loaded.load(x, pass + 1);
#pragma unroll
      for (int i = 0; i < P::kTilesPerBlock; i++)
        if (blockIdx.x + i * GRID < P::kTiles) {
          const bool last = pass + 1 == P::kPasses;
          Ring held;
          multiply_tile<P>(ring, held, in, pass, false, sums[i]);
          if (last) store_sums<P>(s.sums[i % 2][threadIdx.x / 32], sums[i]);  // as in `product`; all of x is in registers by now
          consumers_sync();
          release(held, ring);
          if (last) write_results<P>(out, blockIdx.x + i * GRID, i);
        }
    }
  }
  if constexpr (RANKS > 1) collect_results<P>(out);
  return ring;
}

// By a thread, before a barrier of the block.
__device__ inline void describe_attention(int l) {
  Shared& s = shared();
  const Layer& layer = s.layer[l];
  s.task = {layer.cache, s.model.qkv, layer.q_norm, layer.k_norm, s.model.attended, s.model.amax + l * 2 * ROWS, s.model.cos_sin,
            (float)layer.k_scale, (float)layer.v_scale, s.model.partial, s.model.partial_softmax, s.model.arrived};
}

__device__ __noinline__ void attention_phase(GridBarrier barrier) {
  Shared& s = shared();
  if (blockIdx.x >= s.step.items) {
    barrier.wait_all();  // an arrival ahead of others' last ones would count as one of these
    return;
  }
  attention(s.attention, s.step, s.task, barrier);
}

// ---------------------------------------------------------------- the step

__device__ inline void embed() {
  const Shared& s = shared();
  for (int i = blockIdx.x * kConsumers + threadIdx.x; i < ROWS * (HIDDEN / 8); i += GRID * kConsumers) {
    const int row = i / (HIDDEN / 8), at = i % (HIDDEN / 8) * 8;
    *(uint4*)(s.model.hidden + row * HIDDEN + at) = *(const uint4*)(s.model.embedding + (int64_t)s.token[row] * HIDDEN + at);
  }
}

// The last block to come through leaves everything as the next launch wants it.
__device__ inline void leave() {
  Shared& s = shared();
  consumers_sync();
  if (threadIdx.x == 0) s.last = atomicAdd(s.model.left, 1) == GRID - 1;
  consumers_sync();
  if (!s.last) return;
  for (int i = threadIdx.x; i < LAYERS * 2 * ROWS; i += kConsumers) s.model.amax[i] = 0.f;
  if (threadIdx.x == 0) *s.model.barrier = 0, *s.model.left = 0;
  if (RANKS > 1 && threadIdx.x == 0) *s.model.epoch = s.epoch;
}

// By a warp: what attention will read of the cache before its barrier, from memory to L2, a layer ahead. Under full load a
// read from memory takes as long as a barrier and the attention over it. The plan may be one for another window meanwhile:
// then these are other tokens of the sequences, and nothing is lost but time.
__device__ inline void fetch_cache_ahead() {
  const Shared& s = shared();
#pragma unroll 1
  for (int l = 1; l < LAYERS; l++) {
    while (s.cache_layer < l) __nanosleep(500);
    __syncwarp();
    if (blockIdx.x >= s.step.items) continue;
    const Item item = find_item(s.step, blockIdx.x);
    const int end = min(item.end, item.begin + kSweep), newest = s.step.length[item.row] - 1;
    const int* pages = s.step.pages[item.row];
#pragma unroll 1
    for (int i = item.begin * 2 + threadIdx.x % 32; i < end * 2; i += 32)
      if (i / 2 != newest)
        bulk_prefetch_l2(s.layer[l].cache + cache_offset(pages[i / 2 / PAGE_SIZE], i % 2, i / 2 % PAGE_SIZE, item.virtual_head / kSubgroups), HEAD_DIM * KV_BYTES);
  }
}

__device__ inline void consume_step() {
  Shared& s = shared();
  const Model& model = s.model;
  GridBarrier barrier{model.barrier, 0};
  Ring ring{0, 0};
  embed();
  barrier.arrive();
#pragma unroll 1
  for (int l = 0; l < LAYERS; l++) {
    const Layer& layer = s.layer[l];
    const float* amax = model.amax + l * 2 * ROWS;
    ring = normed_phase<QkvProduct>(ring, barrier, layer.input_norm, {layer.qkv_scale, layer.qkv_bias, model.qkv, nullptr});
    plan_attention(s.step, (int)layer.window);
    if (threadIdx.x == kConsumers - 32) describe_attention(l);  // not the thread that the barrier keeps busy
    barrier.arrive();
    attention_phase(barrier);
    barrier.arrive();
    if (threadIdx.x < ROWS) s.gated_amax[threadIdx.x] = 0;
    ring = plain_phase<OProduct>(ring, barrier, model.attended, amax, {layer.o_scale, layer.o_bias, model.hidden, nullptr});
    barrier.arrive();
    if (threadIdx.x == 0) s.cache_layer = l + 1;
    ring = normed_phase<GateUpProduct>(ring, barrier, layer.post_norm, {layer.gate_up_scale, layer.gate_up_bias, model.gated, nullptr});
    consumers_sync();
    if (kLayerFormat == kFp8 && threadIdx.x < ROWS) atomic_max(model.amax + (l * 2 + 1) * ROWS + threadIdx.x, __int_as_float(s.gated_amax[threadIdx.x]));
    barrier.arrive();
    ring = plain_phase<DownProduct>(ring, barrier, model.gated, amax + ROWS, {layer.down_scale, layer.down_bias, model.hidden, nullptr});
    barrier.arrive();
  }
  normed_phase<HeadProduct>(ring, barrier, model.final_norm, {model.head_scale, nullptr, nullptr, s.logits});
  leave();
}

// slots: int64 [ROWS], rows of token table and page table; positions: int64 [ROWS], of the tokens to run; cache_slots: int64
// [ROWS], page * PAGE_SIZE + offset of the new K and V, -1: not written; lengths: int32 [ROWS], positions + 1, 0 for padding;
// logits: float32 [ROWS, VOCAB].
extern "C" __global__ void __launch_bounds__(kThreads, 1)
decode_step(const Layer* layers, const Model* model, const int64_t* slots, const int64_t* positions, const int64_t* cache_slots,
            const int* lengths, float* logits) {
  Shared& s = *(Shared*)(dynamic_shared + SLOTS * kSlotBytes);
  static_assert(SLOTS * kSlotBytes + sizeof(Shared) <= SHARED_BYTES, "fewer slots");
  const int tid = threadIdx.x;
  for (int i = tid; i < (int)(sizeof(s.layer) / 8); i += kThreads) ((uint64_t*)s.layer)[i] = ((const uint64_t*)layers)[i];
  for (int i = tid; i < (int)(sizeof(Model) / 8); i += kThreads) ((uint64_t*)&s.model)[i] = ((const uint64_t*)model)[i];
  if (tid < ROWS) {
    s.step.position[tid] = positions[tid];
    s.step.cache_slot[tid] = cache_slots[tid];
    s.step.length[tid] = lengths[tid];
    s.step.pages[tid] = model->page_table + slots[tid] * model->max_pages;
    s.token[tid] = model->token_table[slots[tid] * model->token_stride + positions[tid]];
  }
  if (tid == 0) {
    s.logits = logits;
    s.step.window = -1;
    s.awaited = -1;
    s.epoch = RANKS > 1 ? (uint32_t)*model->epoch : 0;
    s.cache_layer = 0;
    for (int i = 0; i < SLOTS; i++) {
      mbarrier_init(shared_address(&s.full[i]), 1);
      mbarrier_init(shared_address(&s.empty[i]), 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (tid >= kConsumers) {
    few_registers();
    if (tid < kConsumers + 32) {
      Producer producer;
      pass_weights(producer);
      producer.end();
    } else if (kPrefetchSlots > 0 && tid < kConsumers + 64) {
      Prefetcher prefetcher;
      pass_weights(prefetcher);
    } else if (tid >= kConsumers + 64 && tid < kConsumers + 96) {
      fetch_cache_ahead();
    }
  } else {
    many_registers();
    consume_step();
  }
}
