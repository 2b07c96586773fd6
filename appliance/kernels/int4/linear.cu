// out = x @ weight.T + bias with 4-bit weights and 16-bit activations, for few rows of x: it streams the weight.
//
// Output is cut into tiles of kRows weight rows by kColumns rows of x, the inner dimension into chunks; a chunk of a tile is
// a unit of work. Units, counted tile after tile, are dealt out evenly: a block has consecutive ones, so that every
// multiprocessor reads the same amount whatever the shape (Osama et al., "Stream-K", 2023). Where a tile is shared, its
// blocks write float32 sums to a workspace, and the one that comes last adds them up in the order of the chunks: the same
// bits on every run.
//
// The weight is the left operand of the tensor cores' product: 16 rows of it by 8 rows of x. A word of the weight has eight
// consecutive inner positions; each thread's registers of both operands hold the same positions, whichever they are, so
// words go from memory to registers as they lie there. Two nibbles at a time become bfloat16 by being put under the
// exponent of 128 (float16: 1024), and a fused multiply-add takes off 128 + zero point: exact. The scale of a group is
// applied to its sums, in float32, and so nothing is rounded but the result.
//
// With SPLIT, on Hopper, a block has a share of one tile instead, and the SPLIT blocks of a tile are a cluster, which adds the
// shares up through its shared memory: quicker where a tile is shared by many.
//
// Compile-time: BF16 (else float16), GROUP (inner positions of a scale), COLUMN_TILES, ROW_TILES (of a warp), WARPS, CHUNK,
// STAGES (chunks in flight, the one being multiplied counted), BLOCKS_PER_SM, SPLIT (0: units dealt out evenly).

constexpr int kThreads = WARPS * 32;
constexpr int kRows = 16 * ROW_TILES * WARPS;
constexpr int kColumns = 8 * COLUMN_TILES;
// Words that a thread takes of a row at a time, as many as have one scale: the four threads of a row have a span.
constexpr int kWords = GROUP % 128 == 0 ? 4 : GROUP % 64 == 0 ? 2 : 1;
constexpr int kSpan = 32 * kWords;
constexpr int kSpans = CHUNK / kSpan;
constexpr int kWeightPieces = CHUNK / 32;  // of 16 bytes, of a row's chunk
constexpr int kXPieces = CHUNK / 8;
constexpr int kWeightBytes = kRows * CHUNK / 2;
constexpr int kXBytes = kColumns * CHUNK * 2;
constexpr int kScaleBytes = kRows * kSpans * 4;
constexpr int kStageBytes = kWeightBytes + kXBytes + kScaleBytes;
// Sums of a group in several registers where there are few: a product has to wait for the one before it that adds to the
// same.
constexpr int kParts = COLUMN_TILES * ROW_TILES == 1 ? 2 : 1;
constexpr int kTogether = COLUMN_TILES * ROW_TILES <= 4 ? COLUMN_TILES : 4 / ROW_TILES;  // tiles of columns
constexpr int kJoined = COLUMN_TILES * ROW_TILES <= 4 ? 8 / (COLUMN_TILES * ROW_TILES) : 1;  // blocks' sums read at a time
constexpr int kUnrolledSpans = COLUMN_TILES * ROW_TILES >= 8 ? 1 : kSpans;  // registers hold the operands of so many

static_assert(GROUP % 32 == 0 && CHUNK % 256 == 0, "what a thread takes at once has one scale; rows are whole lines");

struct Problem {
  const uint8_t* weight;       // [n, k / 2]
  const uint8_t* scale_zero;   // float16 [n, k / GROUP, 2]
  const uint16_t* x;           // [m, k], rows x_stride apart, 16-byte aligned
  const uint16_t* bias;        // [n] or null
  uint16_t* out;               // [m, n]
  float4* partial;             // [blocks, 2, kRows * kColumns]
  uint32_t* counters;          // [tiles], zero before and after
  int m, n, k;
  int64_t x_stride;

  __device__ int chunks() const { return (k + CHUNK - 1) / CHUNK; }
  __device__ int column_blocks() const { return (m + kColumns - 1) / kColumns; }
  __device__ int tiles() const { return (n + kRows - 1) / kRows * column_blocks(); }
  __device__ int first_row(int tile) const { return tile / column_blocks() * kRows; }
  __device__ int first_column(int tile) const { return tile % column_blocks() * kColumns; }
  // The units of block b begin there; the block that has unit u, if they are dealt out evenly.
  __device__ int first_unit(int block) const {
#if SPLIT
    return block / SPLIT * chunks() + chunks() * (block % SPLIT) / SPLIT;
#else
    return (int)((int64_t)tiles() * chunks() * block / gridDim.x);
#endif
  }
  __device__ int block_of(int unit) const {
    const int64_t units = (int64_t)tiles() * chunks();
    return (int)(((int64_t)(unit + 1) * gridDim.x - 1) / units);
  }
};

// ---------------------------------------------------------------- a unit's numbers, into shared memory

// Rows of a chunk are multiples of 128 bytes, where all banks meet again: 16-byte pieces change places with others of
// their row, so that the rows a warp reads at once lie in different banks.
__device__ __forceinline__ int weight_place(int row, int piece) { return row * kWeightPieces + (piece ^ (row % (8 / kWords) * kWords)); }

// The pieces of x in the order in which the four threads of a row read them: thread t has words t * kWords of a span.
__device__ __forceinline__ int x_place(int row, int piece) {
  const int span = piece / (4 * kWords), thread = piece / kWords % 4, word = piece % kWords;
  return row * kXPieces + ((span * 4 * kWords + word * 4 + thread) ^ (row % 2 * 4));
}

// Goes through the units of a block and has this thread's share of weight and scales copied. Rows that are not there, and
// what lies behind the end of a row, become zeros.
struct WeightLoader {
  static constexpr int kRowsAtOnce = kThreads / kWeightPieces, kCopies = kRows / kRowsAtOnce;
  static constexpr int kScaleRowsAtOnce = kThreads / kSpans, kScaleCopies = (kRows + kScaleRowsAtOnce - 1) / kScaleRowsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0 && kThreads % kSpans == 0, "places of a thread's copies differ by a constant");

  uint64_t policy;
  int tile, chunk, chunks;
  const uint8_t *from, *scale_from;  // of the first copy
  int64_t step, scale_step;          // from one copy to the next
  int rows_left, scale_rows_left;    // in the tile, from the first copy's row on
  int inner_left, scale_inner_left;  // in the row, from the first copy's place on
  uint32_t to, scale_to;             // in a stage

  __device__ __forceinline__ void begin_tile(const Problem& p) {
    const int piece = threadIdx.x % kWeightPieces, span = threadIdx.x % kSpans;
    const int row = p.first_row(tile) + threadIdx.x / kWeightPieces, scale_row = p.first_row(tile) + threadIdx.x / kSpans;
    from = p.weight + row * (int64_t)(p.k / 2) + chunk * (CHUNK / 2) + piece * 16;
    scale_from = p.scale_zero + (scale_row * (int64_t)(p.k / GROUP) + (chunk * CHUNK + span * kSpan) / GROUP) * 4;
    rows_left = p.n - row, scale_rows_left = p.n - scale_row;
    inner_left = p.k - chunk * CHUNK - piece * 32, scale_inner_left = p.k - chunk * CHUNK - span * kSpan;
  }

  __device__ __forceinline__ WeightLoader(const Problem& p, int unit) : policy(read_once_policy()), chunks(p.chunks()) {
    tile = unit / chunks, chunk = unit % chunks;
    step = (int64_t)kRowsAtOnce * (p.k / 2), scale_step = (int64_t)kScaleRowsAtOnce * (p.k / GROUP) * 4;
    to = shared_base() + weight_place(threadIdx.x / kWeightPieces, threadIdx.x % kWeightPieces) * 16;
    scale_to = shared_base() + kWeightBytes + (threadIdx.x % kSpans * kRows + threadIdx.x / kSpans) * 4;
    begin_tile(p);
  }

  __device__ __forceinline__ void load(int stage) const {
    const uint8_t* at = from;
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const bool there = inner_left > 0 && i * kRowsAtOnce < rows_left;
      copy16_once(to + stage * kStageBytes + i * (kRowsAtOnce * kWeightPieces * 16), at, there, policy);
      at += step;
    }
    at = scale_from;
#pragma unroll
    for (int i = 0; i < kScaleCopies; i++) {
      const bool there = scale_inner_left > 0 && i * kScaleRowsAtOnce < scale_rows_left;
      if (kRows % kScaleRowsAtOnce == 0 || threadIdx.x / kSpans + i * kScaleRowsAtOnce < kRows)
        copy4(scale_to + stage * kStageBytes + i * (kScaleRowsAtOnce * 4), at, there);
      at += scale_step;
    }
  }

  __device__ __forceinline__ void advance(const Problem& p) {
    chunk++;
    if (chunk == chunks) chunk = 0, tile++;
    if (chunk == 0 || CHUNK % GROUP != 0) return begin_tile(p);
    from += CHUNK / 2, scale_from += CHUNK / GROUP * 4;
    inner_left -= CHUNK, scale_inner_left -= CHUNK;
  }
};

// The same for x.
struct XLoader {
  static constexpr int kRowsAtOnce = kThreads / kXPieces, kCopies = kColumns / kRowsAtOnce;
  static_assert(kRowsAtOnce % 2 == 0 && kColumns % kRowsAtOnce == 0, "places of a thread's copies differ by a constant");

  int tile, chunk, chunks;
  const uint16_t* from;  // of the first copy
  int64_t step;
  int rows_left, inner_left;
  uint32_t to;

  __device__ __forceinline__ void begin_tile(const Problem& p) {
    const int row = p.first_column(tile) + threadIdx.x / kXPieces, inner = chunk * CHUNK + threadIdx.x % kXPieces * 8;
    from = p.x + row * p.x_stride + inner;
    rows_left = p.m - row, inner_left = p.k - inner;
  }

  __device__ __forceinline__ XLoader(const Problem& p, int unit) : chunks(p.chunks()) {
    tile = unit / chunks, chunk = unit % chunks;
    step = kRowsAtOnce * p.x_stride;
    to = shared_base() + kWeightBytes + kScaleBytes + x_place(threadIdx.x / kXPieces, threadIdx.x % kXPieces) * 16;
    begin_tile(p);
  }

  __device__ __forceinline__ bool there(int copy) const { return inner_left > 0 && copy * kRowsAtOnce < rows_left; }

  // As copies under way.
  __device__ __forceinline__ void load(int stage) const {
    const uint16_t* at = from;
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      copy16(to + stage * kStageBytes + i * (kRowsAtOnce * kXPieces * 16), at, there(i));
      at += step;
    }
  }

  // The first `units` chunks, through registers: that does not wait for the copies of weights that were begun before.
  __device__ __forceinline__ void load_first(const Problem& p, int units) {
    constexpr int kBatch = kCopies < 16 ? 16 / kCopies : 1;  // stages on their way at a time
#pragma unroll
    for (int first = 0; first < STAGES - 1; first += kBatch) {
      uint4 held[kBatch][kCopies];
#pragma unroll
      for (int b = 0; b < kBatch && first + b < STAGES - 1; b++) {
        if (first + b >= units) continue;
#pragma unroll
        for (int i = 0; i < kCopies; i++) held[b][i] = there(i) ? load16(from + i * step) : uint4{0, 0, 0, 0};
        advance(p);
      }
#pragma unroll
      for (int b = 0; b < kBatch && first + b < STAGES - 1; b++) {
        if (first + b >= units) continue;
#pragma unroll
        for (int i = 0; i < kCopies; i++)
          store_shared16(to + (first + b) * kStageBytes + i * (kRowsAtOnce * kXPieces * 16), held[b][i]);
      }
    }
  }

  __device__ __forceinline__ void advance(const Problem& p) {
    from += CHUNK, inner_left -= CHUNK;
    if (++chunk < chunks) return;
    chunk = 0, tile++;
    begin_tile(p);
  }
};

// ---------------------------------------------------------------- products

// The eight values of a word, minus the zero point, in pairs of consecutive inner positions.
__device__ __forceinline__ void widen(uint32_t word, uint32_t minus_zero, uint32_t minus_zero_high, uint32_t (&pairs)[4]) {
#if BF16
#pragma unroll
  for (int j = 0; j < 4; j++) pairs[j] = multiply_add(and_or(word >> 4 * j, 0x000f000f, 0x43004300), 0x3f803f80, minus_zero);
#else  // ten bits of mantissa: a nibble may stay where it is, and is 16 times itself there
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    pairs[j] = multiply_add(and_or(word >> 4 * j, 0x000f000f, 0x64006400), 0x3c003c00, minus_zero);
    pairs[j + 1] = multiply_add(and_or(word >> 4 * j, 0x00f000f0, 0x64006400), 0x2c002c00, minus_zero_high);
  }
#endif
}

__device__ __forceinline__ void load_words(uint32_t from, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 4) {
    const uint4 v = load_shared16(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = load_shared8(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = load_shared4(from);
  }
}

// Sums of a tile in a thread's registers: rows lane / 4 and 8 more of the weight, columns lane % 4 * 2 and 1 more.
struct Sums {
  float of[COLUMN_TILES][ROW_TILES][4];

  __device__ void clear() {
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[c][r][i] = 0.f;
  }
};

// Where in a stage a thread's numbers are. The places that pieces have changed are bits of an address (stages are multiples
// of 128 bytes), so going on by a span or a word is an addition or an exclusive or.
struct Places {
  uint32_t weight, scale, x;  // of its first row of either; of span 0, word 0

  __device__ __forceinline__ Places() {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * ROW_TILES * 16 + lane / 4;
    weight = shared_base() + weight_place(row, 0) * 16 + lane % 4 * 4 * kWords;
    if (kWords == 4) weight = shared_base() + weight_place(row, lane % 4) * 16;
    scale = shared_base() + kWeightBytes + row * 4;
    x = shared_base() + kWeightBytes + kScaleBytes + ((lane / 4) * kXPieces + (lane % 4 ^ lane / 4 % 2 * 4)) * 16;
  }

  __device__ __forceinline__ uint32_t weight_at(int stage, int span, int row) const {
    constexpr int kPerLine = 8 / kWords;  // spans in 128 bytes
    return ((weight + stage * kStageBytes + span / kPerLine * 128) ^ (span % kPerLine * 16 * kWords)) + row * (CHUNK / 2);
  }

  __device__ __forceinline__ uint32_t scale_at(int stage, int span, int row) const {
    return scale + stage * kStageBytes + (span * kRows + row) * 4;
  }

  __device__ __forceinline__ uint32_t x_at(int stage, int span, int word, int column_tile) const {
    const int piece = span * 4 * kWords + word * 4;
    return ((x + stage * kStageBytes) ^ (piece % 8 * 16)) + piece / 8 * 128 + column_tile * 8 * kXPieces * 16;
  }
};

// A span of 16 rows of the weight: left operands of the products, less the zero points, and the scales of rows lane / 4 and
// 8 more.
struct RowTile {
  uint32_t a[kWords][2][4];
  float scale[2];

  __device__ __forceinline__ void load(const Places& places, int stage, int span, int row_tile) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_tile * 16 + half * 8;
      uint32_t words[kWords];
      load_words(places.weight_at(stage, span, row), words);
      const uint32_t pair = load_shared4(places.scale_at(stage, span, row));
      scale[half] = half_value((uint16_t)pair);
      const float zero = half_value((uint16_t)(pair >> 16));
      const uint32_t minus_zero = twice((BF16 ? -128.f : -1024.f) - zero);
      const uint32_t minus_zero_high = BF16 ? 0 : twice(-64.f - zero);
#pragma unroll
      for (int word = 0; word < kWords; word++) {
        uint32_t pairs[4];
        widen(words[word], minus_zero, minus_zero_high, pairs);
#pragma unroll
        for (int j = 0; j < 4; j++) a[word][j / 2][half + j % 2 * 2] = pairs[j];
      }
    }
  }
};

__device__ __forceinline__ void multiply_span(const Places& places, int stage, int span, Sums& sums) {
  RowTile rows[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) rows[r].load(places, stage, span, r);
#pragma unroll
  for (int first = 0; first < COLUMN_TILES; first += kTogether) {
    float part[kParts][kTogether][ROW_TILES][4] = {};
#pragma unroll
    for (int word = 0; word < kWords; word++)
#pragma unroll
      for (int c = 0; c < kTogether; c++) {
        const uint4 b = load_shared16(places.x_at(stage, span, word, first + c));
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
          tensor_product(part[0][c][r], rows[r].a[word][0], b.x, b.y);
          tensor_product(part[kParts - 1][c][r], rows[r].a[word][1], b.z, b.w);
        }
      }
#pragma unroll
    for (int c = 0; c < kTogether; c++)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float total = kParts == 1 ? part[0][c][r][i] : part[0][c][r][i] + part[kParts - 1][c][r][i];
          sums.of[first + c][r][i] += rows[r].scale[i / 2] * total;
        }
  }
}

// ---------------------------------------------------------------- results

#if SPLIT

// This block's sums of its tile go where others find them (shares.cuh).
__device__ __forceinline__ void leave_sums(const Sums& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (threadIdx.x / 32 * ROW_TILES + r) * 16 + i / 2 * 8 + lane / 4;
        store_shared4(sum_place<kRows>(row, c * 8 + lane % 4 * 2 + i % 2), sums.of[c][r][i]);
      }
}

#else

__device__ __forceinline__ void write_results(const Problem& p, int tile, const Sums& sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = p.first_row(tile) + (warp * ROW_TILES + r) * 16 + h * 8 + lane / 4;
      if (row >= p.n) continue;
      const float bias = p.bias == nullptr ? 0.f : value(p.bias[row]);
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int column = p.first_column(tile) + c * 8 + lane % 4 * 2 + i;
          if (column < p.m) p.out[(int64_t)column * p.n + row] = (uint16_t)twice(sums.of[c][r][h * 2 + i] + bias);
        }
    }
}

// Where the sums of a block lie that it has of a tile: a block has the beginning of at most one tile that it does not
// finish, and of at most one tile something else.
__device__ __forceinline__ float4* slot(const Problem& p, int block, bool beginning) {
  return p.partial + (int64_t)(block * 2 + beginning) * (kRows * kColumns / 4) + threadIdx.x;
}

// This block's sums of a shared tile join the others'; true for the last block, whose `sums` are the tile's then.
__device__ __forceinline__ bool join(const Problem& p, int tile, int first, int last, Sums& sums) {
  float4* to = slot(p, blockIdx.x, blockIdx.x == first);
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      const float* v = sums.of[c][r];
      to[(c * ROW_TILES + r) * kThreads] = float4{v[0], v[1], v[2], v[3]};
    }
  __threadfence();
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = arrive(p.counters + tile) == (uint32_t)(last - first);
    if (is_last) p.counters[tile] = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  sums.clear();
#pragma unroll 1
  for (int block = first; block <= last; block += kJoined) {
    float4 v[kJoined][COLUMN_TILES * ROW_TILES];
#pragma unroll
    for (int b = 0; b < kJoined; b++)
#pragma unroll
      for (int i = 0; i < COLUMN_TILES * ROW_TILES; i++)
        if (block + b <= last) v[b][i] = load_others(slot(p, block + b, block + b == first) + i * kThreads);
#pragma unroll
    for (int b = 0; b < kJoined; b++)
#pragma unroll
      for (int i = 0; i < COLUMN_TILES * ROW_TILES; i++) {
        float(&sum)[4] = sums.of[i / ROW_TILES][i % ROW_TILES];
        if (block + b <= last) sum[0] += v[b][i].x, sum[1] += v[b][i].y, sum[2] += v[b][i].z, sum[3] += v[b][i].w;
      }
  }
  return true;
}

#endif

// ---------------------------------------------------------------- the kernel

extern "C" __global__ void CLUSTER __launch_bounds__(kThreads, BLOCKS_PER_SM)
int4_linear(const uint8_t* weight, const uint8_t* scale_zero, const uint16_t* x, const uint16_t* bias, uint16_t* out, float4* partial,
            uint32_t* counters, int64_t m, int64_t n, int64_t k, int64_t x_stride) {
  const Problem p{weight, scale_zero, x, bias, out, partial, counters, (int)m, (int)n, (int)k, x_stride};
  const int first = p.first_unit(blockIdx.x), end = p.first_unit(blockIdx.x + 1);

  // Weights do not change: they may be read while the kernel in front still computes x.
  WeightLoader weight_loader(p, first);
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (first + stage < end) {
      weight_loader.load(stage);
      weight_loader.advance(p);
    }
    end_group();
  }
  wait_for_kernel_in_front();
  XLoader x_loader(p, first);
  x_loader.load_first(p, end - first);

  const Places places;
  Sums sums;
  sums.clear();
  int stage = 0, ahead_stage = STAGES - 1;
#if !SPLIT
  const int chunks = p.chunks();
  int tile = first / chunks, chunk = first % chunks;
  int from_chunk = chunk;  // where this block's part of the tile begins
#endif
#pragma unroll 1
  for (int unit = first; unit < end; unit++) {
    wait_group<STAGES - 2>();
    __syncthreads();
    if (unit + STAGES - 1 < end) {  // into the stage that was multiplied last, by everybody
      weight_loader.load(ahead_stage);
      weight_loader.advance(p);
      x_loader.load(ahead_stage);
      x_loader.advance(p);
    }
    end_group();
#pragma unroll kUnrolledSpans
    for (int span = 0; span < kSpans; span++) multiply_span(places, stage, span, sums);
    if (++stage == STAGES) stage = 0;
    if (++ahead_stage == STAGES) ahead_stage = 0;
#if !SPLIT
    if (++chunk < chunks && unit + 1 < end) continue;

    if (unit + 1 == end) let_next_kernel_start();  // not before: its blocks would be in the way
    bool whole = from_chunk == 0 && chunk == chunks;
    if (!whole) whole = join(p, tile, p.block_of(tile * chunks), p.block_of((tile + 1) * chunks - 1), sums);
    if (whole) write_results(p, tile, sums);
    sums.clear();
    tile++, chunk = from_chunk = 0;
#endif
  }
#if SPLIT
  let_next_kernel_start();
  __syncthreads();  // sums lie where chunks did
  leave_sums(sums);
  const int tile = blockIdx.x / SPLIT;
  add_shares<kRows, kColumns, kThreads>(p, p.first_row(tile), p.first_column(tile), blockIdx.x % SPLIT);
#endif
}
