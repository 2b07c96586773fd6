// Sizes, the tables that the host writes, a block's shared memory, and how weights pass through the ring; then the producer,
// which feeds it.

constexpr int kColumnTiles = (ROWS + 7) / 8;  // mma tiles of 8 rows of x; INT4 needs two columns for a row
static_assert(kLayerFormat != kInt4 || ROWS <= 4, "rows that INT4 has columns for");
constexpr int kColumnPitch = 20;              // floats of a column of a tile's sums, so that writes meet no bank twice
constexpr float kFp8Max = 448.f, kSmallestAmax = 1e-12f;
static_assert((ROWS & (ROWS - 1)) == 0, "rows are dealt in powers of two");
static_assert(RANKS == 1 || RANKS % 2 == 0 && HIDDEN % 16 == 0, "ranks exchange whole tiles, a thread tells every second one");

// What depends on the format of a product's weights.
template <Format F>
struct Sizes {
  static constexpr Format kFormat = F;
  static constexpr int kChunkElements = F == kInt4 ? kChunk * 2 : F == kFp8 ? kChunk : kChunk / 2;
  // Chunks of x that a thread holds in registers at a time; fewer where x arrives in several passes and while the next part
  // is being loaded many rows of it are in registers too.
  static constexpr int kWholePassChunks = (F == kBf16 ? 8 : 4) / kColumnTiles;
  static constexpr int kPlainPassChunks = F == kInt4 ? kWholePassChunks / (ROWS == 1 ? 1 : 2) : ROWS >= 4 ? kWholePassChunks / 2 : kWholePassChunks * 3 / 4;
  static constexpr int kWindowRegisters = F == kBf16 ? 4 : 8;  // of x, for 64 bytes of a weight row
  // Bytes of a row of staged x: 16-bit floats, or INT4's fixed-point numbers in two planes, of upper and of lower bytes.
  static constexpr int kXPlane = F == kBf16 ? kChunkElements * 2 + 64 : F == kFp8 ? kChunkElements * 2 + 16 : kChunkElements + 16;
  static constexpr int kXPitch = F == kInt4 ? kXPlane * 2 : kXPlane;
  static constexpr int kStageChunks = 36864 / (ROWS * kXPitch) > 0 ? 36864 / (ROWS * kXPitch) : 1;
  // Vectors of 8 elements of x, dealt to all consumer threads: chunk by chunk, in a chunk row by row.
  static constexpr int kVectorsPerRow = kChunkElements / 8;
  static constexpr int kRowsPerSweep = kConsumers / kVectorsPerRow;  // rows that all threads together cover with a vector each
  static constexpr int kRowSlots = ROWS > kRowsPerSweep ? ROWS / kRowsPerSweep : 1;  // rows that a thread has vectors of
};
// INT4: groups of x in a pass.
constexpr int kXGroups = kLayerFormat == kInt4 ? Sizes<kInt4>::kWholePassChunks * (Sizes<kInt4>::kChunkElements / kGroup) * ROWS : 1;

struct Layer {  // as runtime/persistent_decode.py writes it
  const uint8_t *qkv, *o, *gate_up, *down;
  // FP8: per weight row. INT4: scales and zero points of the groups, in the order of the ring's slots (see Product).
  const float *qkv_scale, *o_scale, *gate_up_scale, *down_scale;
  const uint16_t *qkv_bias, *o_bias, *gate_up_bias, *down_bias;   // null: none
  const uint16_t *input_norm, *post_norm, *q_norm, *k_norm;
  char* cache;
  int64_t window;  // 0: none
  double k_scale, v_scale;
};

struct Model {  // as runtime/persistent_decode.py writes it
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
  // Of several ranks; see exchange.cuh.
  int64_t rank;
  uint64_t* epoch;            // all-reduces that were done
  const uint64_t* abandoned;  // not zero: the other ranks are gone
  uint64_t* inbox[RANKS];     // of every rank, as this one sees it
};

enum Kind { kQkv, kO, kGateUp, kDown, kHead };

__host__ __device__ constexpr int tiles_of(int rows) { return (rows + 15) / 16; }
__host__ __device__ constexpr int tiles_per_block(int rows) { return (tiles_of(rows) + GRID - 1) / GRID; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int kMostResidualTiles = tiles_per_block(HIDDEN);
constexpr int kMostTiles = larger(larger(tiles_per_block(VOCAB), kMostResidualTiles), larger(tiles_per_block(2 * FFN), tiles_per_block(kQkvRows)));

struct Shared {
  Layer layer[LAYERS];
  Model model;
  float* logits;
  uint64_t full[SLOTS], empty[SLOTS];
  Step step;
  AttentionTask task;
  int token[ROWS];
  int last;
  uint32_t epoch;  // of the ranks' next sum, or of the one being made
  float squares[kConsumerWarps][ROWS], largest[kConsumerWarps][ROWS];
  float x_scale[ROWS];
  // What epilogues need of this block's tiles, fetched at the start of a phase: under full load a fetch takes microseconds.
  float weight_scale[kMostTiles * 16], bias[kMostTiles * 16];
  uint16_t residual[ROWS][kMostResidualTiles * 16];
  float2 x_groups[kXGroups];  // INT4: [chunk][group][row]: a group's scale / 16 and its scale * the sum of its x
  volatile int awaited;       // number of the slot, from the step's start, that the producer waits to fill; -1: it does not wait
  volatile int cache_layer;  // the last layer whose cache may be fetched into L2
  int gated_amax[ROWS];  // bits of floats
  union {
    AttentionScratch attention;
    float sums[2][kConsumerWarps][ROWS * kColumnPitch];
    // A product's input on its way from all threads to all threads.
    uint4 x[ROWS * larger(Sizes<kLayerFormat>::kStageChunks * Sizes<kLayerFormat>::kXPitch, Sizes<kHeadFormat>::kStageChunks * Sizes<kHeadFormat>::kXPitch) / 16];
  };
};

__device__ __forceinline__ Shared& shared() { return *(Shared*)(dynamic_shared + SLOTS * kSlotBytes); }

// A weight matrix of N rows by K elements as the ring passes it: tiles of 16 rows are dealt to the blocks in turn.
template <int ROWS_OF_WEIGHT, int INNER, int KIND, Format F>
struct Product : Sizes<F> {
  static constexpr int N = ROWS_OF_WEIGHT, K = INNER, kKind = KIND;
  static constexpr int kRowBytes = F == kInt4 ? K / 2 : F == kFp8 ? K : K * 2;
  static constexpr int kChunks = (kRowBytes + kChunk - 1) / kChunk;
  static constexpr int kPassChunks = KIND == kO || KIND == kDown ? Sizes<F>::kPlainPassChunks : Sizes<F>::kWholePassChunks;
  static constexpr int kPasses = (kChunks + kPassChunks - 1) / kPassChunks;
  static constexpr int kChunksPerPass = (kChunks + kPasses - 1) / kPasses;
  static constexpr int kTiles = tiles_of(N);
  static constexpr int kTilesPerBlock = tiles_per_block(N);
  static_assert(kRowBytes % 64 == 0, "a row is read in pieces of 64 bytes");
  static_assert(kPasses == 1 || kTilesPerBlock <= 8, "sums of every tile are kept between passes");
  // INT4: 16 scales and zero points for each 64 bytes of a row: [tile][group][row of half a tile][half][scale, zero].
  static constexpr int kTileScaleBytes = kRowBytes;
  // INT4: the two slots that are multiplied at a time are chunks of a tile, or tiles where these have a single chunk.
  static constexpr bool kTwoTiles = F == kInt4 && kChunks == 1;
  // Pieces of 64 bytes of a weight row that a thread has registers of x for.
  static constexpr int kWindows = F == kInt4 ? (kChunksPerPass + 1) / 2 * 4 : kChunksPerPass * 2;

  // Tiles are dealt to the blocks in turn, and a layer's products go on where the last one stopped, as a layer takes as long as
  // the block with the most to read; output and down products both begin with the first block (see exchange.cuh).
  static constexpr int kFirstBlock = KIND == kGateUp ? tiles_of(HIDDEN) % GRID : KIND == kQkv ? (tiles_of(HIDDEN) + tiles_of(2 * FFN)) % GRID : 0;

  // The first tile of this block; the others follow GRID apart.
  static __device__ __forceinline__ int first_tile() {
    const int block = blockIdx.x;
    return block >= kFirstBlock ? block - kFirstBlock : block + GRID - kFirstBlock;
  }

  // The first weight row of a half tile. Gate and up rows of the same index share a tile.
  static __device__ __forceinline__ int first_row(int tile, int half) {
    if (KIND == kGateUp) return tile * 8 + half * (N / 2);
    return tile * 16 + half * 8;
  }
};

typedef Product<kQkvRows, HIDDEN, kQkv, kLayerFormat> QkvProduct;
typedef Product<HIDDEN, HEADS * HEAD_DIM, kO, kLayerFormat> OProduct;
typedef Product<2 * FFN, HIDDEN, kGateUp, kLayerFormat> GateUpProduct;
typedef Product<HIDDEN, FFN, kDown, kLayerFormat> DownProduct;
typedef Product<VOCAB, HIDDEN, kHead, kHeadFormat> HeadProduct;

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

// What passes through the ring, in order: `to.chunk<P>(weight rows' chunk of this lane, its bytes, the chunk's scales, theirs)`
// for every slot of this block, `to.begin<P>(scale, norm)` before a product's first.
template <class P, class To>
__device__ __forceinline__ void pass_weight(To& to, const uint8_t* weight, const float* scale, const uint16_t* norm) {
  const int lane = threadIdx.x % 32;
  to.template begin<P>(scale, norm);
  for (int pass = 0; pass < P::kPasses; pass++)
    for (int tile = P::first_tile(); tile < P::kTiles; tile += GRID) {
      const int row = min(P::first_row(tile, lane / 8 % 2) + lane % 8, P::N - 1);
      const int last = min((pass + 1) * P::kChunksPerPass, P::kChunks);
      for (int chunk = pass * P::kChunksPerPass; chunk < last; chunk++) {
        const uint8_t* from = weight + (int64_t)row * P::kRowBytes + chunk * kChunk;
        const uint8_t* scales = (const uint8_t*)scale + (int64_t)tile * P::kTileScaleBytes + chunk * kChunk;
        if constexpr (P::kFormat == kInt4) {
          to.copy(lane < kTileRows ? from : scales, min(kChunk, P::kRowBytes - chunk * kChunk), min(kChunk, P::kTileScaleBytes - chunk * kChunk));
        } else {
          to.copy(from, min(kChunk, P::kRowBytes - chunk * kChunk), 0);
        }
      }
    }
}

template <class To>
__device__ __forceinline__ void pass_weights(To& to) {
  const Shared& s = shared();
  for (int l = 0; l < LAYERS; l++) {
    const Layer& layer = s.layer[l];
    pass_weight<QkvProduct>(to, layer.qkv, layer.qkv_scale, layer.input_norm);
    pass_weight<OProduct>(to, layer.o, layer.o_scale, nullptr);
    pass_weight<GateUpProduct>(to, layer.gate_up, layer.gate_up_scale, layer.post_norm);
    pass_weight<DownProduct>(to, layer.down, layer.down_scale, nullptr);
  }
  pass_weight<HeadProduct>(to, s.model.head, s.model.head_scale, s.model.final_norm);
}

// Fills the ring.
struct Producer {
  Ring ring{0, 0}, behind{0, 0};  // the next slot to fill; the oldest one whose copies may be under way
  int issued = 0;
  uint64_t policy = evict_first_policy();

  // Small things that the consumers will want soon: each block fetches a line of the norm's weights, and its tiles' scales.
  template <class P>
  __device__ __forceinline__ void begin(const float* scale, const uint16_t* norm) {
    const int lane = threadIdx.x % 32;
    if (norm != nullptr && lane == 16 && blockIdx.x * 64 < HIDDEN) prefetch_l2(norm + blockIdx.x * 64);
    if (P::kFormat == kFp8)
      for (int i = lane; i < P::kTilesPerBlock * 2; i += 32)
        prefetch_l2(scale + min(P::first_row(P::first_tile() + i / 2 * GRID, i % 2), P::N - 1));
  }

  // By the whole warp. A row of the slot is one copy, each by a lane of its own; scales are one more.
  __device__ __forceinline__ void copy(const uint8_t* from, uint32_t bytes, uint32_t scale_bytes) {
    const int lane = threadIdx.x % 32;
    if (issued >= kSlotsInFlight) {
      mbarrier_wait(behind.full(), behind.parity);
      behind.next();
    }
    if (kPrefetchSlots > 0) {
      if (!mbarrier_done(ring.empty(), ring.parity ^ 1)) {
        shared().awaited = issued;
        mbarrier_wait(ring.empty(), ring.parity ^ 1);
        shared().awaited = -1;
      }
      issued++;
    } else {
      mbarrier_wait(ring.empty(), ring.parity ^ 1);
      if (issued < kSlotsInFlight) issued++;
    }
    const uint32_t full = ring.full();
    if (lane == 0) mbarrier_expect(full, kTileRows * bytes + scale_bytes);
    __syncwarp();
    const int copies = kLayerFormat == kInt4 && scale_bytes > 0 ? kTileRows + 1 : kTileRows;
    if (lane < copies)
      bulk_copy(shared_address(dynamic_shared) + ring.slot * kSlotBytes + lane * kPitch, from, lane < kTileRows ? bytes : scale_bytes, full, policy);
    ring.next();
  }

  __device__ __forceinline__ void end() {
    if (kPrefetchSlots > 0) shared().awaited = 0x7fffffff;
  }
};

// Fetches into L2 what the ring has no room for yet, so that memory need not rest while the consumers wait for each other.
struct Prefetcher {
  int number = 0;  // of the slot, from the step's start
  uint32_t last = 0;

  template <class P>
  __device__ __forceinline__ void begin(const float*, const uint16_t*) {}

  __device__ __forceinline__ void copy(const uint8_t* from, uint32_t bytes, uint32_t scale_bytes) {
    const int lane = threadIdx.x % 32;
    while (true) {
      const int awaited = shared().awaited;
      if (awaited >= number) break;  // too late for this one
      if (awaited >= 0 && number - awaited <= kPrefetchSlots && (uint32_t)clock() - last >= kPrefetchPace) {
        if (lane < kTileRows) bulk_prefetch_l2(from, bytes);
        if (lane == kTileRows && scale_bytes > 0) bulk_prefetch_l2(from, scale_bytes);
        last = (uint32_t)clock();
        break;
      }
      __nanosleep(100);
    }
    number++;
  }
};
