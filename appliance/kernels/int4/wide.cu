// out = x @ weight.T + bias with 4-bit weights and 16-bit activations on Hopper, for up to some hundred rows of x.
//
// A block has a tile of kRows weight rows by COLUMNS rows of x, and a share of the inner dimension; the SPLIT blocks of a
// tile are a cluster, which adds the shares up in their order through its shared memory: the same bits on every run.
//
// The weight is the left operand of a warpgroup's product (wgmma), which comes from registers: 16-byte pieces of a row go
// from shared memory to the four threads that have the row, each takes its two nibbles of every word (consecutive inner
// positions, so x may lie in shared memory as it is in memory), puts them under the exponent of 128 (float16: 1024), takes off
// 128 + zero point, which is exact, and multiplies by the scale, which is rounded to the type of x. While the tensor cores
// multiply one piece, the next is being made. What a chunk needs beside that is done while products are under way: the block
// meets for the next chunk before the last piece of this one, and begins copies behind products.
//
// Compile-time: BF16 (else float16), GROUP (inner positions of a scale), COLUMNS (8 to 128), WARPGROUPS, CHUNK (inner
// positions of a stage), STAGES, SPLIT, BLOCKS_PER_SM.

constexpr int kThreads = 128 * WARPGROUPS;
constexpr int kRows = 64 * WARPGROUPS;
constexpr int kPieces = CHUNK / 32;   // 16 bytes of a weight row
constexpr int kXPieces = CHUNK / 8;   // 16 bytes of a row of x
constexpr int kLowestGroupBit = GROUP & -GROUP;
constexpr int kSpan = kLowestGroupBit < CHUNK ? kLowestGroupBit : CHUNK;  // positions of a chunk with one scale
constexpr int kSpans = CHUNK / kSpan;
constexpr int kXBytes = COLUMNS * CHUNK * 2;
constexpr int kWeightBytes = kRows * CHUNK / 2;
constexpr int kStageBytes = (kXBytes + kWeightBytes + kRows * kSpans * 4 + 1023) / 1024 * 1024;
constexpr int kAhead = STAGES - 2;  // chunks in front whose x is under way; weights are one further

constexpr bool kFetchesEarly = COLUMNS < 128;  // a piece's words, while products are waited for: registers suffice

static_assert(GROUP % 32 == 0 && CHUNK % 64 == 0 && STAGES >= 3, "x lies in rows of 128 bytes; a piece has one scale");

struct Problem {
  const uint8_t* weight;      // [n, k / 2]
  const uint8_t* scale_zero;  // float16 [n, k / GROUP, 2]
  const uint16_t* x;          // [m, k], rows x_stride apart, 16-byte aligned
  const uint16_t* bias;       // [n] or null
  uint16_t* out;              // [m, n]
  int m, n, k;
  int64_t x_stride;
  int first_row, first_column;    // of the tile
  int first_chunk, chunk_count;   // of the share
};

// ---------------------------------------------------------------- chunks, into shared memory

// A stage is x, weight, scales. Where pieces of 16 bytes lie in x (as the tensor cores want them) and in the weight: the eight
// rows that a warp reads at once have the same piece in different banks.
__device__ __forceinline__ int x_place(int row, int piece) {
  return piece / 8 * (COLUMNS * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
}
__device__ __forceinline__ int weight_place(int row, int piece) {
  constexpr int kRowsOfLine = kPieces < 8 ? 8 / kPieces : 1;
  return (row * kPieces + (piece ^ row / kRowsOfLine % (kPieces < 8 ? kPieces : 8))) * 16;
}

// This thread's share of weight and scales, of one chunk after the other. What is not there becomes zeros. Without a policy for
// L2: with one, NVRTC 13.0 makes a copy for sm_90a that an H200 calls an illegal instruction.
struct WeightLoader {
  static constexpr int kRowsAtOnce = kThreads / kPieces, kCopies = kRows / kRowsAtOnce;
  static constexpr int kScaleCopies = (kRows * kSpans + kThreads - 1) / kThreads;
  static_assert(kRowsAtOnce % 8 == 0 && kThreads % kSpans == 0, "places of a thread's copies differ by a constant");
  static_assert(kThreads / kSpans % kRows == 0 || kRows % (kThreads / kSpans) == 0, "no scale is behind the last one");
  static constexpr int kScaleRowsAtOnce = kThreads / kSpans;

  const uint8_t *from, *scale_from;  // of the first copy; of the scales of its row
  int64_t step, scale_step;          // from one copy to the next
  int inner, scale_inner;            // positions of the first copy and scale
  int rows_left, scale_rows_left;
  uint32_t to, scale_to;  // in a stage

  __device__ __forceinline__ WeightLoader(const Problem& p) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    inner = p.first_chunk * CHUNK + piece * 32;
    from = p.weight + (p.first_row + row) * (int64_t)(p.k / 2) + inner / 2;
    step = (int64_t)kRowsAtOnce * (p.k / 2);
    rows_left = p.n - p.first_row - row;
    to = shared_base() + kXBytes + weight_place(row, piece);
    const int scale_row = threadIdx.x / kSpans % kRows, span = threadIdx.x % kSpans;  // several threads copy the same, if few
    scale_inner = p.first_chunk * CHUNK + span * kSpan;
    scale_from = p.scale_zero + (p.first_row + scale_row) * (int64_t)(p.k / GROUP) * 4;
    scale_step = (int64_t)kScaleRowsAtOnce * (p.k / GROUP) * 4;
    scale_rows_left = p.n - p.first_row - scale_row;
    scale_to = shared_base() + kXBytes + kWeightBytes + (span * kRows + scale_row) * 4;
  }

  // Into the stage that begins at `stage`; zeros if it is not `wanted`. Without branches: where there are some, the compiler
  // waits for all products that are under way.
  __device__ __forceinline__ void load_next(const Problem& p, uint32_t stage, bool wanted) {
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      copy16(to + stage + i * (kRowsAtOnce * kPieces * 16), from + i * step,
             wanted && inner < p.k && i * kRowsAtOnce < rows_left);
    const uint8_t* scale = scale_from + (uint32_t)scale_inner / GROUP * 4;
#pragma unroll
    for (int i = 0; i < kScaleCopies; i++)
      copy4(scale_to + stage + i * (kScaleRowsAtOnce * 4), scale + i * scale_step,
            wanted && scale_inner < p.k && i * kScaleRowsAtOnce < scale_rows_left);
    from += CHUNK / 2, inner += CHUNK, scale_inner += CHUNK;
  }
};

// The same for x.
struct XLoader {
  static constexpr int kRowsAtOnce = kThreads / kXPieces, kCopies = (COLUMNS + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kBatch = kCopies < 16 ? 16 / kCopies : 1;  // stages that are in registers at a time, at the beginning
  static_assert(kRowsAtOnce % 8 == 0, "places of a thread's copies differ by a constant");

  const uint16_t* from;
  int64_t step;
  int inner, rows_left;
  uint32_t to;

  __device__ __forceinline__ XLoader(const Problem& p) {
    const int row = threadIdx.x / kXPieces % COLUMNS, piece = threadIdx.x % kXPieces;  // several copy the same of a narrow x
    inner = p.first_chunk * CHUNK + piece * 8;
    from = p.x + (p.first_column + row) * p.x_stride + inner;
    step = kRowsAtOnce * p.x_stride;
    rows_left = p.m - p.first_column - row;
    to = shared_base() + x_place(row, piece);
  }

  __device__ __forceinline__ void load_next(const Problem& p, uint32_t stage, bool wanted) {
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      copy16(to + stage + i * kRowsAtOnce * 128, from + i * step, wanted && inner < p.k && i * kRowsAtOnce < rows_left);
    from += CHUNK, inner += CHUNK;
  }

  // The first `count` chunks, through registers: that does not wait for the copies of weights that were begun before.
  __device__ __forceinline__ void load_first(const Problem& p, int count) {
#pragma unroll
    for (int first = 0; first < kAhead; first += kBatch) {
      uint4 held[kBatch][kCopies];
#pragma unroll
      for (int b = 0; b < kBatch; b++)
#pragma unroll
        for (int i = 0; i < kCopies; i++) {
          const bool there = first + b < count && inner + b * CHUNK < p.k && i * kRowsAtOnce < rows_left;
          held[b][i] = first + b < kAhead && there ? load16(from + b * CHUNK + i * step) : uint4{0, 0, 0, 0};
        }
#pragma unroll
      for (int b = 0; b < kBatch && first + b < kAhead; b++)
#pragma unroll
        for (int i = 0; i < kCopies; i++)
          store_shared16(to + (first + b) * kStageBytes + i * kRowsAtOnce * 128, held[b][i]);
      const int done = kAhead - first < kBatch ? kAhead - first : kBatch;
      from += done * CHUNK, inner += done * CHUNK;
    }
  }
};

// ---------------------------------------------------------------- products

// The left operand's numbers of this thread: rows lane / 4 and 8 more of its warp's, nibbles lane % 4 and 4 more of a word.
struct Rows {
  uint32_t weight_at, scale_at;  // of piece 0, span 0, stage 0
  int shift;
  uint32_t minus_zero[2], scale[2];

  __device__ __forceinline__ Rows() {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    weight_at = shared_base() + kXBytes + weight_place(row, 0);
    scale_at = shared_base() + kXBytes + kWeightBytes + row * 4;
    shift = threadIdx.x % 4 * 4;
  }

  __device__ __forceinline__ void load_scales(uint32_t stage, int span) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = load_shared4(scale_at + stage + (span * kRows + half * 8) * 4);
      scale[half] = twice(half_value((uint16_t)pair));
      minus_zero[half] = twice((BF16 ? -128.f : -1024.f) - half_value((uint16_t)(pair >> 16)));
    }
  }

  __device__ __forceinline__ uint32_t number(uint32_t word, int half) const {
    const uint32_t nibbles = and_or(word >> shift, 0x000f000f, BF16 ? 0x43004300 : 0x64006400);
    return multiply(multiply_add(nibbles, BF16 ? 0x3f803f80 : 0x3c003c00, minus_zero[half]), scale[half]);
  }

  // 32 inner positions of both rows.
  __device__ __forceinline__ void fetch(uint32_t stage, int piece, uint4 (&words)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; half++)
      words[half] = load_shared16((weight_at + stage ^ piece * 16) + half * (8 * kPieces * 16));
  }

  // As left operands of two products.
  __device__ __forceinline__ void convert(const uint4 (&words)[2], uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      a[0][half] = number(words[half].x, half), a[0][half + 2] = number(words[half].y, half);
      a[1][half] = number(words[half].z, half), a[1][half + 2] = number(words[half].w, half);
    }
  }
};

// What this thread copied for the next chunk is there, and then what all threads did: the tensor cores may read it, and what
// lies in the stage of the chunk before this one is not read again.
__device__ __forceinline__ void meet_for_chunk() {
  wait_group<kAhead - 1>();
  show_to_tensor_cores();
  __syncthreads();
}

// Begins the products of chunk `chunk` in `stage`; when it returns, at most those of its last piece are under way, and the next
// chunk may be read. Copies go to the stages of the two chunks before: x, then weights.
__device__ __forceinline__ void multiply_chunk(const Problem& p, int chunk, uint32_t stage, uint32_t x_stage, uint32_t weight_stage,
                                               Rows& rows, WeightLoader& weight_loader, XLoader& x_loader, uint32_t (&a)[2][2][4],
                                               float (&sums)[COLUMNS / 2]) {
  uint4 words[2];
#pragma unroll
  for (int piece = 0; piece < kPieces; piece++) {
    if (piece * 32 % kSpan == 0) rows.load_scales(stage, piece * 32 / kSpan);
    if (piece == 0 || !kFetchesEarly) rows.fetch(stage, piece, words);
    rows.convert(words, a[piece % 2]);
    const uint64_t b = describe(shared_base() + stage + piece / 2 * (COLUMNS * 128) + piece % 2 * 64);
    warpgroup_fence();
    begin_product(sums, a[piece % 2][0], b);
    begin_product(sums, a[piece % 2][1], b + (32 >> 4));
    warpgroup_commit();
    if (kFetchesEarly && piece + 1 < kPieces) rows.fetch(stage, piece + 1, words);
    if (piece == 0) {
      x_loader.load_next(p, x_stage, chunk + kAhead < p.chunk_count);
      end_group();  // with the weights of the same chunk, begun in the chunk before
    }
    if (piece == kPieces - 2) {
      if (kPieces == 2) warpgroup_wait<1>();  // with more pieces, products of the chunk before have ended long since
      meet_for_chunk();
    }
    if (piece == kPieces - 1) weight_loader.load_next(p, weight_stage, chunk + kAhead + 1 < p.chunk_count);
    warpgroup_wait<1>();  // the next piece goes where the one before this lies
  }
}

// ---------------------------------------------------------------- results

// The tile's sums of this block go where others find them (shares.cuh).
__device__ __forceinline__ void leave_sums(const float (&sums)[COLUMNS / 2]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++)
    store_shared4(sum_place<kRows>(row + i / 2 % 2 * 8, i / 4 * 8 + column + i % 2), sums[i]);
}

// ---------------------------------------------------------------- the kernel

extern "C" __global__ void CLUSTER __launch_bounds__(kThreads, BLOCKS_PER_SM)
int4_linear(const uint8_t* weight, const uint8_t* scale_zero, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m,
            int64_t n, int64_t k, int64_t x_stride) {
  Problem p{weight, scale_zero, x, bias, out, (int)m, (int)n, (int)k, x_stride};
  const int rank = SPLIT == 1 ? 0 : cluster_rank(), tile = blockIdx.x / SPLIT;
  const int column_blocks = (p.m + COLUMNS - 1) / COLUMNS, chunks = (p.k + CHUNK - 1) / CHUNK;
  p.first_row = tile / column_blocks * kRows, p.first_column = tile % column_blocks * COLUMNS;
  p.first_chunk = chunks * rank / SPLIT, p.chunk_count = chunks * (rank + 1) / SPLIT - p.first_chunk;

  // Weights do not change: they may be read while the kernel in front still computes x.
  WeightLoader weight_loader(p);
#pragma unroll 1
  for (int stage = 0; stage <= kAhead; stage++) {
    weight_loader.load_next(p, stage * kStageBytes, stage < p.chunk_count);
    if (stage < kAhead) end_group();  // the last one is ended with its x
  }
  wait_for_kernel_in_front();
  XLoader x_loader(p);
  x_loader.load_first(p, p.chunk_count);
  meet_for_chunk();

  Rows rows;
  uint32_t a[2][2][4];
  float sums[COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0.f;
  // Where the chunk, the one before it, and the one before that lie.
  uint32_t stage = 0, before = (STAGES - 1) * kStageBytes, x_stage = kAhead * kStageBytes;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunk_count; chunk++) {
    multiply_chunk(p, chunk, stage, x_stage, before, rows, weight_loader, x_loader, a, sums);
    x_stage = before, before = stage;
    stage = stage == (STAGES - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }
  warpgroup_wait<0>();
  hold(sums);
  wait_group<0>();  // zeros in place of chunks behind the last one
  let_next_kernel_start();  // not before: its blocks would be in the way
  __syncthreads();          // sums lie where chunks did
  leave_sums(sums);
  add_shares<kRows, COLUMNS, kThreads>(p, p.first_row, p.first_column, rank);
}
