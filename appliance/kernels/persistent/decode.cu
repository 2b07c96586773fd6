// A whole decode step, from token ids to logits, in one kernel that never lets the memory rest.
//
// One block per multiprocessor. A producer warp copies the weights that its block will need, layer after layer, into a ring
// in shared memory, waiting for nothing but free slots. Sixteen consumer warps multiply; between products they wait for all
// other blocks (the next product needs every part of the last one's result), and meanwhile the ring fills up. So the
// barriers, norms and attention of a layer hide behind the reading of weights. See README.md beside this file.
//
// A product tile is 16 weight rows by the whole inner dimension: the sixteen warps take 128 bytes of every 2 KiB of each
// row and add their sums up through shared memory, in the order of the warps.

constexpr int kElementBytes = FP8 ? 1 : 2;
constexpr int kColumnTiles = (ROWS + 7) / 8;                    // mma tiles of 8 rows of x
// Chunks of x that a thread holds in registers at a time; fewer where x arrives in several passes and while the next part is
// being loaded many rows of it are in registers too.
constexpr int kWholePassChunks = (FP8 ? 4 : 8) / kColumnTiles;
constexpr int kPlainPassChunks = ROWS >= 4 ? kWholePassChunks / 2 : kWholePassChunks * 3 / 4;
constexpr int kChunkElements = kChunk / kElementBytes;
constexpr int kWindowRegisters = FP8 ? 8 : 4;                   // of x, for 64 bytes of a weight row
constexpr int kColumnPitch = 20;                                // floats of a column of a tile's sums, so that writes meet no bank twice
constexpr int kXPitch = kChunkElements * 2 + (FP8 ? 16 : 64);   // bytes of a row of staged x
constexpr int kStageChunks = 36864 / (ROWS * kXPitch) > 0 ? 36864 / (ROWS * kXPitch) : 1;
constexpr float kFp8Max = 448.f, kSmallestAmax = 1e-12f;

struct Layer {  // as plan.py writes it
  const uint8_t *qkv, *o, *gate_up, *down;
  const float *qkv_scale, *o_scale, *gate_up_scale, *down_scale;  // per weight row; FP8 only
  const uint16_t *qkv_bias, *o_bias, *gate_up_bias, *down_bias;   // null: none
  const uint16_t *input_norm, *post_norm, *q_norm, *k_norm;
  char* cache;
  int64_t window;  // 0: none
  double k_scale, v_scale;
};

struct Model {  // as plan.py writes it
  const uint16_t* embedding;
  const uint16_t* final_norm;
  const uint8_t* head;
  const float* head_scale;
  const float* cos_sin;
  uint16_t *hidden, *qkv, *attended, *gated;  // [ROWS, HIDDEN], [ROWS, kQkvRows], [ROWS, HEADS * HEAD_DIM], [ROWS, FFN]
  float *partial, *partial_softmax;
  // Zero before the first launch; every launch leaves them zero.
  uint32_t *barrier, *left;  // blocks that arrived; blocks that are through
  int* arrived;              // [ROWS][kVirtualHeads]
  float* amax;               // [LAYERS][2][ROWS]: of attended, of gated
  const int* token_table;    // [slots, token_stride]: the token at each position
  int64_t token_stride;
  const int* page_table;  // [slots, max_pages]
  int64_t max_pages;
};

enum Kind { kQkv, kO, kGateUp, kDown, kHead };

__host__ __device__ constexpr int tiles_per_block(int rows) { return ((rows + 15) / 16 + GRID - 1) / GRID; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int kMostTiles = larger(tiles_per_block(VOCAB), larger(tiles_per_block(2 * FFN), tiles_per_block(kQkvRows)));
constexpr int kMostResidualTiles = tiles_per_block(HIDDEN);

struct Shared {
  Layer layer[LAYERS];
  Model model;
  float* logits;
  uint64_t full[SLOTS], empty[SLOTS];
  Step step;
  AttentionTask task;
  int token[ROWS];
  int last;
  float squares[kConsumerWarps][ROWS], largest[kConsumerWarps][ROWS];
  float x_scale[ROWS];
  // What epilogues need of this block's tiles, fetched at the start of a phase: under full load a fetch takes microseconds.
  float weight_scale[kMostTiles * 16], bias[kMostTiles * 16];
  uint16_t residual[ROWS][kMostResidualTiles * 16];
  int gated_amax[ROWS];  // bits of floats
  union {
    AttentionScratch attention;
    float sums[2][kConsumerWarps][ROWS * kColumnPitch];
    uint4 x[kStageChunks * ROWS * kXPitch / 16];  // a product's input on its way from all threads to all threads
  };
};

extern __shared__ __align__(128) uint8_t dynamic_shared[];

__device__ __forceinline__ Shared& shared() { return *(Shared*)(dynamic_shared + SLOTS * kSlotBytes); }

// A weight matrix of N rows by K elements as the ring passes it: tiles of 16 rows are dealt to the blocks in turn.
template <int ROWS_OF_WEIGHT, int INNER, int KIND>
struct Product {
  static constexpr int N = ROWS_OF_WEIGHT, K = INNER, kKind = KIND;
  static constexpr int kRowBytes = K * kElementBytes;
  static constexpr int kChunks = (kRowBytes + kChunk - 1) / kChunk;
  static constexpr int kPassChunks = KIND == kO || KIND == kDown ? kPlainPassChunks : kWholePassChunks;
  static constexpr int kPasses = (kChunks + kPassChunks - 1) / kPassChunks;
  static constexpr int kChunksPerPass = (kChunks + kPasses - 1) / kPasses;
  static constexpr int kTiles = (N + 15) / 16;
  static constexpr int kTilesPerBlock = tiles_per_block(N);
  static_assert(kRowBytes % 64 == 0, "a row is read in pieces of 64 bytes");
  static_assert(kPasses == 1 || kTilesPerBlock <= 8, "sums of every tile are kept between passes");

  // The first weight row of a half tile. Gate and up rows of the same index share a tile.
  static __device__ __forceinline__ int first_row(int tile, int half) {
    if (KIND == kGateUp) return tile * 8 + half * (N / 2);
    return tile * 16 + half * 8;
  }
};

typedef Product<kQkvRows, HIDDEN, kQkv> QkvProduct;
typedef Product<HIDDEN, HEADS * HEAD_DIM, kO> OProduct;
typedef Product<2 * FFN, HIDDEN, kGateUp> GateUpProduct;
typedef Product<HIDDEN, FFN, kDown> DownProduct;
typedef Product<VOCAB, HIDDEN, kHead> HeadProduct;

// Where a reader or writer of the ring is. Small, so that functions take and return it in registers.
struct Ring {
  int slot;
  uint32_t parity;

  __device__ __forceinline__ void next() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ uint32_t full() const { return shared_address(&shared().full[slot]); }
  __device__ __forceinline__ uint32_t empty() const { return shared_address(&shared().empty[slot]); }
};

// ---------------------------------------------------------------- producer

struct Producer {
  Ring ring{0, 0}, behind{0, 0};  // the next slot to fill; the oldest one whose copies may be under way
  int issued = 0;

  // By the whole warp. A row of the slot is one copy, each by a lane of its own.
  __device__ __forceinline__ void copy(const uint8_t* from, uint32_t bytes, uint64_t policy) {
    const int lane = threadIdx.x % 32;
    if (issued < kSlotsInFlight) {
      issued++;
    } else {
      mbarrier_wait(behind.full(), behind.parity);
      behind.next();
    }
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    const uint32_t full = ring.full();
    if (lane == 0) mbarrier_expect(full, kTileRows * bytes);
    __syncwarp();
    if (lane < kTileRows) bulk_copy(shared_address(dynamic_shared) + ring.slot * kSlotBytes + lane * kPitch, from, bytes, full, policy);
    ring.next();
  }

  template <class P>
  __device__ __forceinline__ void produce(const uint8_t* weight, const float* scale, const uint16_t* norm) {
    const uint64_t policy = evict_first_policy();
    const int lane = threadIdx.x % 32;
    // Small things that the consumers will want soon: each block fetches a line of the norm's weights, and its tiles' scales.
    if (norm != nullptr && lane == 16 && blockIdx.x * 64 < HIDDEN) prefetch_l2(norm + blockIdx.x * 64);
    if (FP8)
      for (int i = lane; i < P::kTilesPerBlock * 2; i += 32)
        prefetch_l2(scale + min(P::first_row(blockIdx.x + i / 2 * GRID, i % 2), P::N - 1));
    for (int pass = 0; pass < P::kPasses; pass++)
      for (int tile = blockIdx.x; tile < P::kTiles; tile += GRID) {
        const int row = min(P::first_row(tile, lane / 8 % 2) + lane % 8, P::N - 1);
        const int last = min((pass + 1) * P::kChunksPerPass, P::kChunks);
        for (int chunk = pass * P::kChunksPerPass; chunk < last; chunk++)
          copy(weight + (int64_t)row * P::kRowBytes + chunk * kChunk, min(kChunk, P::kRowBytes - chunk * kChunk), policy);
      }
  }

  __device__ __forceinline__ void step() {
    const Shared& s = shared();
    for (int l = 0; l < LAYERS; l++) {
      const Layer& layer = s.layer[l];
      produce<QkvProduct>(layer.qkv, layer.qkv_scale, layer.input_norm);
      produce<OProduct>(layer.o, layer.o_scale, nullptr);
      produce<GateUpProduct>(layer.gate_up, layer.gate_up_scale, layer.post_norm);
      produce<DownProduct>(layer.down, layer.down_scale, nullptr);
    }
    produce<HeadProduct>(s.model.head, s.model.head_scale, s.model.final_norm);
  }
};

// ---------------------------------------------------------------- inputs of a product

// x as the tensor cores take it: for each 64 bytes of a weight row and each column tile, the elements of row lane / 4 that
// stand opposite to this thread's 16 bytes of weight. FP8 numbers are held as the float16 that they are exactly: Hopper has
// no mma on FP8 registers, weights are widened too, and x is widened once.
template <class P>
struct Input {
  uint32_t b[P::kChunksPerPass * 2][kColumnTiles][kWindowRegisters];
};

// Two f16 registers of four e4m3 numbers: bytes 0 and 1, 2 and 3; exact.
__device__ __forceinline__ void widen(uint32_t word, uint32_t& first, uint32_t& second) {
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(first) : "h"((uint16_t)word));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(second) : "h"((uint16_t)(word >> 16)));
}

// Vectors of 8 elements of x, dealt to all consumer threads: chunk by chunk, in a chunk row by row.
constexpr int kVectorsPerRow = kChunkElements / 8;
constexpr int kRowsPerSweep = kConsumers / kVectorsPerRow;  // rows that all threads together cover with a vector each
constexpr int kRowSlots = ROWS > kRowsPerSweep ? ROWS / kRowsPerSweep : 1;  // rows that a thread has vectors of
static_assert((ROWS & (ROWS - 1)) == 0, "rows are dealt in powers of two");

struct Place {
  int chunk, row, element;  // element of the whole row, chunk of the pass

  __device__ __forceinline__ explicit Place(int v) {
    const int at = threadIdx.x + v * kConsumers;
    chunk = at / (ROWS * kVectorsPerRow);
    row = at / kVectorsPerRow % ROWS;
    element = chunk * kChunkElements + at % kVectorsPerRow * 8;
  }
};

template <class P>
struct Loaded {
  static constexpr int kVectors = (P::kChunksPerPass * ROWS * kVectorsPerRow + kConsumers - 1) / kConsumers;
  uint4 v[kVectors];

  static __device__ __forceinline__ bool inside(const Place& p, int pass) {
    return p.chunk < P::kChunksPerPass && p.element + pass * P::kChunksPerPass * kChunkElements < P::K;
  }

  __device__ __forceinline__ void load(const uint16_t* x, int pass) {
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const Place p(i);
      v[i] = inside(p, pass) ? load_shared_state16(x + p.row * P::K + pass * P::kChunksPerPass * kChunkElements + p.element) : uint4();
    }
  }
};

__device__ __forceinline__ void unpack_bf16(const uint4& v, float* out) {
  out[0] = bf16_low(v.x), out[1] = bf16_high(v.x), out[2] = bf16_low(v.y), out[3] = bf16_high(v.y);
  out[4] = bf16_low(v.z), out[5] = bf16_high(v.z), out[6] = bf16_low(v.w), out[7] = bf16_high(v.w);
}

// Eight numbers as x is staged: bf16, or the float16 of the FP8 of them divided by the row's scale.
__device__ __forceinline__ uint4 staged(const float* x, float inverse_scale) {
#if FP8
  uint4 out;
  widen(e4m3_quad(x[0] * inverse_scale, x[1] * inverse_scale, x[2] * inverse_scale, x[3] * inverse_scale), out.x, out.y);
  widen(e4m3_quad(x[4] * inverse_scale, x[5] * inverse_scale, x[6] * inverse_scale, x[7] * inverse_scale), out.z, out.w);
  return out;
#else
  return make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
#endif
}

// Registers of x from the staging area, for chunks [first, first + kStageChunks) of a pass.
template <class P>
__device__ __forceinline__ void take_staged(Input<P>& in, int first) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kStageChunks; c++) {
    if (first + c >= P::kChunksPerPass) break;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) {
        uint32_t(&b)[kWindowRegisters] = in.b[(first + c) * 2 + half][t];
        const int row = t * 8 + lane / 4;
        const uint8_t* from = (const uint8_t*)shared().x + (c * ROWS + row) * kXPitch;
        if (row >= ROWS) {
#pragma unroll
          for (int i = 0; i < kWindowRegisters; i++) b[i] = 0;
        } else if (FP8) {
          const int at = (warp * 128 + half * 64 + lane % 4 * 16) * 2;
          const uint4 low = *(const uint4*)(from + at), high = *(const uint4*)(from + at + 16);
          b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
          b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
        } else {
          const uint4 v = *(const uint4*)(from + warp * 128 + half * 64 + lane % 4 * 16);
          b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
        }
      }
  }
}

// All chunks of a pass through the staging area; `element(v, i)` is element i of the thread's vector v, as float.
template <class P, class F>
__device__ __forceinline__ void distribute(Input<P>& in, F stage) {
#pragma unroll
  for (int first = 0; first < P::kChunksPerPass; first += kStageChunks) {
    if (first > 0) consumers_sync();
#pragma unroll
    for (int i = 0; i < Loaded<P>::kVectors; i++) {
      const Place p(i);
      if (p.chunk >= first && p.chunk < min(first + kStageChunks, P::kChunksPerPass))
        *(uint4*)((uint8_t*)shared().x + ((p.chunk - first) * ROWS + p.row) * kXPitch + p.element % kChunkElements * 2) = stage(i, p);
    }
    consumers_sync();
    take_staged<P>(in, first);
  }
  consumers_sync();  // the staging area is free
}

// x = RMS norm of the residual stream times `norm`, once all blocks have arrived. Leaves the rows' scales in shared memory.
template <class P>
__device__ __forceinline__ void load_normed(Input<P>& in, const uint16_t* norm, GridBarrier barrier) {
  static_assert(P::kPasses == 1, "the norm needs whole rows");
  constexpr int kVectors = Loaded<P>::kVectors;
  Shared& s = shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 weight[kVectors / kRowSlots > 0 ? kVectors / kRowSlots : 1];
#pragma unroll
  for (int i = 0; i < kVectors; i += kRowSlots) {
    const Place p(i);
    weight[i / kRowSlots] = Loaded<P>::inside(p, 0) ? *(const uint4*)(norm + p.element) : uint4();
  }
  barrier.wait_all();
  Loaded<P> loaded;
  loaded.load(s.model.hidden, 0);
  float squares[kRowSlots] = {}, largest[kRowSlots] = {};
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    float x[8], w[8];
    unpack_bf16(loaded.v[i], x);
    unpack_bf16(weight[i / kRowSlots], w);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      squares[i % kRowSlots] += x[e] * x[e];
      largest[i % kRowSlots] = fmaxf(largest[i % kRowSlots], fabsf(x[e] * w[e]));
    }
  }
#pragma unroll
  for (int r = 0; r < kRowSlots; r++) {
#pragma unroll
    for (int off = 16; off; off /= 2) {
      squares[r] += __shfl_xor_sync(~0u, squares[r], off);
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], off));
    }
    if (lane == 0) s.squares[warp][r] = squares[r], s.largest[warp][r] = largest[r];
  }
  consumers_sync();
  float rstd[kRowSlots], inverse_scale[kRowSlots];
#pragma unroll
  for (int r = 0; r < kRowSlots; r++) {
    // The warps that hold parts of the same row: all with ROWS = 1, else those as far into a sweep as this one.
    constexpr int kWarpsPerRow = kVectorsPerRow / 32;
    constexpr int kRowsShared = ROWS < kRowsPerSweep ? ROWS : kRowsPerSweep;
    float sum = 0.f, highest = 0.f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++)
      if (w / kWarpsPerRow % kRowsShared == warp / kWarpsPerRow % kRowsShared) sum += s.squares[w][r], highest = fmaxf(highest, s.largest[w][r]);
    rstd[r] = rsqrtf(sum / HIDDEN + EPS);
    const float scale = fmaxf(highest * rstd[r], kSmallestAmax) / kFp8Max;
    inverse_scale[r] = 1.f / scale;
    if (lane == 0) s.x_scale[Place(r).row] = scale;
  }
  distribute<P>(in, [&](int i, const Place&) {
    float x[8], w[8];
    unpack_bf16(loaded.v[i], x);
    unpack_bf16(weight[i / kRowSlots], w);
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = x[e] * rstd[i % kRowSlots] * w[e];
    return staged(x, inverse_scale[i % kRowSlots]);
  });
}

// 1 / scale of the rows of a bf16 tensor whose largest magnitudes are known; leaves the scales in shared memory.
__device__ __forceinline__ void find_scales(const float* amax, float (&inverse_scale)[kRowSlots]) {
#pragma unroll
  for (int r = 0; r < kRowSlots; r++) {
    const int row = (threadIdx.x / kVectorsPerRow + r * kRowsPerSweep) % ROWS;
    const float scale = FP8 ? fmaxf(load_shared_state(amax + row), kSmallestAmax) / kFp8Max : 1.f;
    inverse_scale[r] = 1.f / scale;
    if (threadIdx.x % 32 == 0) shared().x_scale[row] = scale;
  }
}

template <class P>
__device__ __forceinline__ void take_plain(Input<P>& in, const Loaded<P>& loaded, const float (&inverse_scale)[kRowSlots]) {
  distribute<P>(in, [&](int i, const Place&) {
#if FP8
    float x[8];
    unpack_bf16(loaded.v[i], x);
    return staged(x, inverse_scale[i % kRowSlots]);
#else
    return loaded.v[i];
#endif
  });
}

// ---------------------------------------------------------------- product

// A warp's share of a tile: in several registers per result, as a product of the tensor cores has to wait for the one
// before it that adds to the same register.
struct Sums {
  static constexpr int kParts = kColumnTiles == 1 ? 4 : 2;
  float part[kParts][kColumnTiles][4] = {};

  __device__ __forceinline__ void add_to(float (&total)[kColumnTiles][4]) const {
#pragma unroll
    for (int t = 0; t < kColumnTiles; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int p = 0; p < kParts; p++) total[t][i] += part[p][t][i];
  }
};

// 16 bytes of weight rows `lane / 4` and 8 more, by the registers of x that stand opposite.
__device__ __forceinline__ void multiply_window(const uint4& low, const uint4& high, const uint32_t (&b)[kColumnTiles][kWindowRegisters],
                                                int half, Sums& sums) {
  const uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#if FP8
#pragma unroll
  for (int w = 0; w < 4; w++) {
    uint32_t a[4];
    widen(lows[w], a[0], a[2]);
    widen(highs[w], a[1], a[3]);
#pragma unroll
    for (int t = 0; t < kColumnTiles; t++) mma(sums.part[w % Sums::kParts][t], a[0], a[1], a[2], a[3], b[t][w * 2], b[t][w * 2 + 1]);
  }
#else
#pragma unroll
  for (int w = 0; w < 4; w += 2)
#pragma unroll
    for (int t = 0; t < kColumnTiles; t++) 
      mma(sums.part[(w / 2 + half * 2) % Sums::kParts][t], lows[w], highs[w], lows[w + 1], highs[w + 1], b[t][w], b[t][w + 1]);
#endif
}

// Gives slots back to the producer, after a barrier of the block: an arrival of every warp at every slot would cost more
// than the products.
__device__ __forceinline__ void release(Ring from, const Ring& to) {
  if (threadIdx.x != kConsumers - 1) return;
  for (; from.slot != to.slot || from.parity != to.parity; from.next()) mbarrier_arrive(from.empty());
}

// This thread's share of a tile: the next chunks of the ring times the registers of x. Afterwards the slots from `held` to
// `ring` are to be released.
template <class P>
__device__ __forceinline__ void multiply(Ring& ring, Ring& held, const Input<P>& in, int pass, float (&total)[kColumnTiles][4]) {
  constexpr int kHeldSlots = 2;
  static_assert(SLOTS > kHeldSlots, "a ring without free slots does not move");
  Sums sums;
  held = ring;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint8_t* data = dynamic_shared + lane / 4 * kPitch + warp * 128 + lane % 4 * 16;
#pragma unroll
  for (int c = 0; c < P::kChunksPerPass; c++) {
    if (pass * P::kChunksPerPass + c >= P::kChunks) break;
    if (c > 0 && c % kHeldSlots == 0) {
      consumers_sync();
      release(held, ring);
      held = ring;
    }
    mbarrier_wait(ring.full(), ring.parity);
    const uint8_t* slot = data + ring.slot * kSlotBytes;
    ring.next();
#pragma unroll
    for (int half = 0; half < 2; half++)
      if ((pass * P::kChunksPerPass + c) * kChunk + warp * 128 + half * 64 < P::kRowBytes)
        multiply_window(*(const uint4*)(slot + half * 64), *(const uint4*)(slot + 8 * kPitch + half * 64), in.b[c * 2 + half], half, sums);
  }
  sums.add_to(total);
}

struct Output {
  const float* scale;    // of the weight's rows
  const uint16_t* bias;  // null: none
  uint16_t* to;          // bf16 result; of kO and kDown: the residual stream, added to
  float* logits;         // kHead
};

// Before a phase waits: what its epilogues will need. The barrier's own synchronization makes it visible to the block.
template <class P>
__device__ __forceinline__ void fetch_for_epilogues(const Output& out) {
  Shared& s = shared();
  for (int i = threadIdx.x; i < P::kTilesPerBlock * 16; i += kConsumers) {
    const int row = min(P::first_row(blockIdx.x + i / 16 * GRID, i / 8 % 2) + i % 8, P::N - 1);
    if (FP8) s.weight_scale[i] = out.scale[row];
    s.bias[i] = out.bias == nullptr ? 0.f : bf16_value(out.bias[row]);
  }
  if (P::kKind == kO || P::kKind == kDown) {
    for (int i = threadIdx.x; i < ROWS * P::kTilesPerBlock * 16; i += kConsumers) {
      const int row = i / (P::kTilesPerBlock * 16), at = i % (P::kTilesPerBlock * 16);
      const int column = min((int)(blockIdx.x + at / 16 * GRID) * 16 + at % 16, P::N - 1);
      s.residual[row][at] = load_shared_state(out.to + row * P::N + column);
    }
  }
}

// Results of a tile, from the warps' sums. Tiles take turns at the warps, so that no warp falls behind.
template <class P>
__device__ __forceinline__ void write_results(const Output& out, int tile, int turn) {
  constexpr int N = P::N, KIND = P::kKind;
  constexpr int kOutputRows = KIND == kGateUp ? 8 : 16;
  constexpr int kThreadsUsed = (kOutputRows * ROWS + 31) / 32 * 32;
  Shared& s = shared();
  const int at = (threadIdx.x + kConsumers - turn * kThreadsUsed % kConsumers) % kConsumers;
  const int row = at / kOutputRows, in_tile = at % kOutputRows;  // row of x; row of the weight in the tile
  const int weight_row = tile * kOutputRows + in_tile;
  if (row >= ROWS || weight_row >= (KIND == kGateUp ? N / 2 : N)) return;
  float v[2] = {0.f, 0.f};
#pragma unroll
  for (int w = 0; w < kConsumerWarps; w++) {
    const float* column = s.sums[turn % 2][w] + row * kColumnPitch;
    v[0] += column[in_tile];
    if (KIND == kGateUp) v[1] += column[in_tile + 8];
  }
#pragma unroll
  for (int i = 0; i < (KIND == kGateUp ? 2 : 1); i++) {
    const int local = turn * 16 + in_tile + i * 8;
    if (FP8) v[i] *= s.x_scale[row] * s.weight_scale[local];
    v[i] += s.bias[local];
  }
  if (KIND == kGateUp) {
    const float gate = bf16_round(v[0]), up = bf16_round(v[1]);
    const float y = bf16_round(gate / (1.f + __expf(-gate)) * up);
    out.to[row * (N / 2) + weight_row] = bf16_bits(y);
    if (FP8) atomicMax(&s.gated_amax[row], __float_as_int(fabsf(y)));
  } else if (KIND == kO || KIND == kDown) {
    out.to[row * N + weight_row] = bf16_bits(bf16_value(s.residual[row][turn * 16 + in_tile]) + bf16_round(v[0]));
  } else if (KIND == kQkv) {
    out.to[row * N + weight_row] = bf16_bits(v[0]);
  } else {
    out.logits[(int64_t)row * N + weight_row] = v[0];
  }
}

__device__ __forceinline__ void store_sums(float* to, const float (&sums)[kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kColumnTiles; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = t * 8 + lane % 4 * 2 + i % 2;
      if (column < ROWS) to[column * kColumnPitch + lane / 4 + i / 2 * 8] = sums[t][i];
    }
}

// All tiles of this block in one pass over x: `in` is loaded.
template <class P>
__device__ __forceinline__ Ring product(Ring ring, const Input<P>& in, const Output& out) {
  // Two buffers of sums: writers of a tile's are at most one barrier ahead of the readers of the last tile's.
  Shared& s = shared();
  int turn = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < P::kTiles; tile += GRID, turn++) {
    float sums[kColumnTiles][4] = {};
    Ring held;
    multiply<P>(ring, held, in, 0, sums);
    store_sums(s.sums[turn % 2][threadIdx.x / 32], sums);
    consumers_sync();
    release(held, ring);
    write_results<P>(out, tile, turn);
  }
  return ring;
}

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
  barrier.wait_all();
  Input<P> in;
  Loaded<P> loaded;
  float inverse_scale[kRowSlots];
  loaded.load(x, 0);
  find_scales(amax, inverse_scale);
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
          Ring held;
          multiply<P>(ring, held, in, pass, sums[i]);
          consumers_sync();
          release(held, ring);
        }
    }
#pragma unroll
    for (int i = 0; i < P::kTilesPerBlock; i++) {
      const int tile = blockIdx.x + i * GRID;
      if (tile >= P::kTiles) continue;
      store_sums(s.sums[i % 2][threadIdx.x / 32], sums[i]);
      consumers_sync();
      write_results<P>(out, tile, i);
    }
  }
  return ring;
}

__device__ __noinline__ void attention_phase(GridBarrier barrier, int l) {
  Shared& s = shared();
  const Layer& layer = s.layer[l];
  if (threadIdx.x == 0)
    s.task = {layer.cache, s.model.qkv, layer.q_norm, layer.k_norm, s.model.attended, s.model.amax + l * 2 * ROWS, s.model.cos_sin,
              (float)layer.k_scale, (float)layer.v_scale, s.model.partial, s.model.partial_softmax, s.model.arrived};
  attention(s.attention, s.step, s.task, layer.cache, barrier);
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
    barrier.arrive();
    attention_phase(barrier, l);
    barrier.arrive();
    if (threadIdx.x < ROWS) s.gated_amax[threadIdx.x] = 0;
    ring = plain_phase<OProduct>(ring, barrier, model.attended, amax, {layer.o_scale, layer.o_bias, model.hidden, nullptr});
    barrier.arrive();
    ring = normed_phase<GateUpProduct>(ring, barrier, layer.post_norm, {layer.gate_up_scale, layer.gate_up_bias, model.gated, nullptr});
    consumers_sync();
    if (FP8 && threadIdx.x < ROWS) atomic_max(model.amax + (l * 2 + 1) * ROWS + threadIdx.x, __int_as_float(s.gated_amax[threadIdx.x]));
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
    for (int i = 0; i < SLOTS; i++) {
      mbarrier_init(shared_address(&s.full[i]), 1);
      mbarrier_init(shared_address(&s.empty[i]), 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (tid >= kConsumers) {
    few_registers();
    if (tid < kConsumers + 32) Producer().step();
  } else {
    many_registers();
    consume_step();
  }
}
