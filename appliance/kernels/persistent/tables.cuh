// Sizes, the tables that the host writes, a block's shared memory, and how weights pass through the ring; then the producer,
// which feeds it.

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

struct Layer {  // as runtime/persistent_decode.py writes it
  const uint8_t *qkv, *o, *gate_up, *down;
  const float *qkv_scale, *o_scale, *gate_up_scale, *down_scale;  // per weight row; FP8 only
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

