// Tiles of weights in the ring by registers of x; results of a tile.

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
template <class P>
__device__ __forceinline__ void multiply_window(const uint4& low, const uint4& high, const uint32_t (&b)[kColumnTiles][P::kWindowRegisters],
                                                int half, Sums& sums) {
  const uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
  if constexpr (P::kFormat == kFp8) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      uint32_t a[4];
      widen(lows[w], a[0], a[2]);
      widen(highs[w], a[1], a[3]);
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) mma<kFp8>(sums.part[w % Sums::kParts][t], a[0], a[1], a[2], a[3], b[t][w * 2], b[t][w * 2 + 1]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < 4; w += 2)
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++)
        mma<kBf16>(sums.part[(w / 2 + half * 2) % Sums::kParts][t], lows[w], highs[w], lows[w + 1], highs[w + 1], b[t][w], b[t][w + 1]);
  }
}

// INT4: 256 bytes of weight rows `lane / 4` and 8 more, four groups, by x. Even nibbles of two words are the registers of one
// product of the tensor cores; the odd ones, where they are, 16 times as much, those of another. total += weight's scale *
// x's scale * (sum of value * x - zero point * sum of x), of the row and the group whose two columns of sums this thread has.
template <class P>
__device__ __forceinline__ void multiply_groups(const uint8_t* slot, const uint32_t (*b)[kColumnTiles][P::kWindowRegisters], int chunk, int in_pass, float (&total)[4]) {
  constexpr int kTogether = 4 / ROWS;  // groups that share sums
  const int warp = threadIdx.x / 32 % kSideWarps, lane = threadIdx.x % 32;
  const int left = P::kRowBytes - chunk * kChunk - warp * 256;
  if (P::kRowBytes % kChunk != 0 && left <= 0) return;
  const auto inside = [&](int group) { return P::kRowBytes % 256 == 0 || group * 64 < left; };
  const uint8_t* rows = slot + lane / 4 * kPitch + warp * 256 + lane % 4 * 16;
  const uint2* scales = (const uint2*)(slot + kTileRows * kPitch + warp * 256) + lane / 4;
  const float2* of_x = shared().x_groups + (in_pass * (P::kChunkElements / kGroup) + warp * 4) * ROWS;
#pragma unroll
  for (int first = 0; first < 4; first += kTogether) {
    int even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = first; i < first + kTogether; i++) {
      if (!inside(i)) break;
      const uint4 low = *(const uint4*)(rows + i * 64), high = *(const uint4*)(rows + 8 * kPitch + i * 64);
      const uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
      constexpr uint32_t kEven = 0x0f0f0f0f, kOdd = 0xf0f0f0f0;
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        mma_integer(even, lows[w] & kEven, highs[w] & kEven, lows[w + 1] & kEven, highs[w + 1] & kEven, b[i][0][w * 2], b[i][0][w * 2 + 2]);
        mma_integer(odd, lows[w] & kOdd, highs[w] & kOdd, lows[w + 1] & kOdd, highs[w + 1] & kOdd, b[i][0][w * 2 + 1], b[i][0][w * 2 + 3]);
      }
    }
    const int group = first + lane % 4 / ROWS;
    if (!inside(group)) continue;
    const float2 x = of_x[group * ROWS + lane % ROWS];
    const uint2 pair = scales[group * 8];
    const uint32_t of_weight[2] = {pair.x, pair.y};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float2 scale_zero = f16_values(of_weight[r]);
      const float product = (float)((even[r * 2] * 16 + odd[r * 2]) * 256 + (even[r * 2 + 1] * 16 + odd[r * 2 + 1]));
      total[r * 2] += scale_zero.x * (product * x.x - scale_zero.y * x.y);
    }
  }
}

// Gives slots back to the producer, after a barrier of the block: an arrival of every warp at every slot would cost more
// than the products.
__device__ __forceinline__ void release(Ring from, const Ring& to) {
  if (threadIdx.x != kConsumers - 1) return;
  for (; from.slot != to.slot || from.parity != to.parity; from.next()) mbarrier_arrive(from.empty());
}

constexpr int kHeldSlots = 2;  // that are multiplied before they are released
static_assert(SLOTS > kHeldSlots, "a ring without free slots does not move");

// This thread's share of a tile: the next chunks of the ring times the registers of x. Afterwards the slots from `held` to
// `ring` are to be released.
template <class P>
__device__ __forceinline__ void multiply(Ring& ring, Ring& held, const Input<P>& in, int pass, float (&total)[kColumnTiles][4]) {
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
#pragma unroll
    for (int half = 0; half < 2; half++)
      if ((pass * P::kChunksPerPass + c) * kChunk + warp * 128 + half * 64 < P::kRowBytes)
        multiply_window<P>(*(const uint4*)(slot + half * 64), *(const uint4*)(slot + 8 * kPitch + half * 64), in.b[c * 2 + half], half, sums);
    ring.next();
  }
  sums.add_to(total);
}

// INT4: the same with two slots at a time, each by half of the warps: chunks of a tile, or of two tiles where a tile has one.
// So a thread has four groups between two barriers, and what they take besides the products is done once.
template <class P>
__device__ __forceinline__ void multiply_by_sides(Ring& ring, Ring& held, const Input<P>& in, int pass, bool second_tile, float (&total)[kColumnTiles][4]) {
  const int side = threadIdx.x / 32 / kSideWarps;
  held = ring;
#pragma unroll
  for (int c = 0; c < P::kChunksPerPass; c += 2) {
    const int chunk = pass * P::kChunksPerPass + c;
    if (chunk >= P::kChunks) break;
    if (c > 0) {
      consumers_sync();
      release(held, ring);
      held = ring;
    }
    const bool two = P::kTwoTiles ? second_tile : c + 1 < P::kChunksPerPass && chunk + 1 < P::kChunks;
    Ring mine = ring;
    if (side > 0) mine.next();
    if (side == 0 || two) {
      const int of_tile = P::kTwoTiles ? 0 : side;
      mbarrier_wait(mine.full(), mine.parity);
      const uint8_t* slot = dynamic_shared + mine.slot * kSlotBytes;
      multiply_groups<P>(slot, in.b + c / 2 * 4, chunk + of_tile, c + of_tile, total[0]);
    }
    ring.next();
    if (two) ring.next();
  }
}

template <class P>
__device__ __forceinline__ void multiply_tile(Ring& ring, Ring& held, const Input<P>& in, int pass, bool second_tile, float (&total)[kColumnTiles][4]) {
  if constexpr (P::kFormat == kInt4) multiply_by_sides<P>(ring, held, in, pass, second_tile, total);
  else multiply<P>(ring, held, in, pass, total);
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
    const int row = min(P::first_row(P::first_tile() + i / 16 * GRID, i / 8 % 2) + i % 8, P::N - 1);
    if (P::kFormat == kFp8) s.weight_scale[i] = out.scale[row];
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

// The result that a thread has of a block's tile number `turn`. Tiles take turns at the warps, so that no warp falls behind.
template <class P>
struct Result {
  static constexpr int kOutputRows = P::kKind == kGateUp ? 8 : 16;
  static constexpr unsigned kLanes = kOutputRows * ROWS < 32 ? (1u << (kOutputRows * ROWS)) - 1 : ~0u;  // of a warp that has some
  int row, in_tile;  // row of x; row of the weight in the tile

  __device__ __forceinline__ explicit Result(int turn) {
    constexpr int kThreadsUsed = (kOutputRows * ROWS + 31) / 32 * 32;
    const int at = (threadIdx.x + kConsumers - turn * kThreadsUsed % kConsumers) % kConsumers;
    row = at / kOutputRows, in_tile = at % kOutputRows;
  }
};

// To the residual stream.
template <class P>
__device__ __forceinline__ void add_to_residual(const Output& out, const Result<P>& at, int tile, int turn, float v) {
  out.to[at.row * P::N + tile * 16 + at.in_tile] = bf16_bits(bf16_value(shared().residual[at.row][turn * 16 + at.in_tile]) + bf16_round(v));
}

// Results of a tile, from the warps' sums.
template <class P>
__device__ __forceinline__ void write_results(const Output& out, int tile, int turn) {
  constexpr int N = P::N, KIND = P::kKind;
  constexpr int kOutputRows = Result<P>::kOutputRows;
  Shared& s = shared();
  const Result<P> result(turn);
  const int row = result.row, in_tile = result.in_tile;
  const int weight_row = tile * kOutputRows + in_tile;
  if (row >= ROWS || weight_row >= (KIND == kGateUp ? N / 2 : N)) return;
  const auto sums = P::kTwoTiles ? s.sums[turn / 2 % 2] + turn % 2 * kSideWarps : s.sums[turn % 2];
  float v[2] = {0.f, 0.f};
#pragma unroll
  for (int w = 0; w < (P::kTwoTiles ? kSideWarps : kConsumerWarps); w++) {
    const float* column = sums[w] + row * kColumnPitch;
    v[0] += column[in_tile];
    if (KIND == kGateUp) v[1] += column[in_tile + 8];
  }
#pragma unroll
  for (int i = 0; i < (KIND == kGateUp ? 2 : 1); i++) {
    const int local = turn * 16 + in_tile + i * 8;
    if (P::kFormat == kFp8) v[i] *= s.x_scale[row] * s.weight_scale[local];
    if (P::kFormat == kInt4 && P::kKind != kO && P::kKind != kDown) v[i] *= s.x_scale[row];
    v[i] += s.bias[local];
  }
  if (KIND == kGateUp) {
    const float gate = bf16_round(v[0]), up = bf16_round(v[1]);
    const float y = bf16_round(gate / (1.f + __expf(-gate)) * up);
    out.to[row * (N / 2) + weight_row] = bf16_bits(y);
    if (P::kFormat == kFp8) atomicMax(&s.gated_amax[row], __float_as_int(fabsf(y)));
  } else if (KIND == kO || KIND == kDown) {
    if constexpr (RANKS > 1) tell_ranks(Result<P>::kLanes, row, weight_row, v[0]);
    else add_to_residual<P>(out, result, tile, turn, v[0]);
  } else if (KIND == kQkv) {
    out.to[row * N + weight_row] = bf16_bits(v[0]);
  } else {
    out.logits[(int64_t)row * N + weight_row] = v[0];
  }
}

// Once all tiles of this block were told to the ranks: their sums, to the residual stream.
template <class P>
__device__ __forceinline__ void collect_results(const Output& out) {
#pragma unroll
  for (int turn = 0; turn < P::kTilesPerBlock; turn++) {
    const int tile = blockIdx.x + turn * GRID;
    const Result<P> result(turn);
    if (tile < P::kTiles && result.row < ROWS) add_to_residual<P>(out, result, tile, turn, sum_of_ranks(result.row, tile * 16 + result.in_tile));
  }
}

template <class P>
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (P::kFormat == kInt4) {
    float low = sums[0][0], high = sums[0][2];
#pragma unroll
    for (int off = ROWS; off < 4; off *= 2) low += __shfl_xor_sync(~0u, low, off), high += __shfl_xor_sync(~0u, high, off);
    if (lane % 4 >= ROWS) return;
    to[lane % 4 * kColumnPitch + lane / 4] = low;
    to[lane % 4 * kColumnPitch + lane / 4 + 8] = high;
  } else {
#pragma unroll
    for (int t = 0; t < kColumnTiles; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = t * 8 + lane % 4 * 2 + i % 2;
        if (column < ROWS) to[column * kColumnPitch + lane / 4 + i / 2 * 8] = sums[t][i];
      }
  }
}

// All tiles of this block in one pass over x: `in` is loaded.
template <class P>
__device__ __forceinline__ Ring product(Ring ring, const Input<P>& in, const Output& out) {
  // Two buffers of sums: writers of a tile's are at most one barrier ahead of the readers of the last tile's.
  Shared& s = shared();
  constexpr int kAtOnce = P::kTwoTiles ? 2 : 1;
  int turn = 0;
#pragma unroll 1
  for (int tile = P::first_tile(); tile < P::kTiles; tile += kAtOnce * GRID, turn += kAtOnce) {
    float sums[kColumnTiles][4] = {};
    Ring held;
    multiply_tile<P>(ring, held, in, 0, tile + GRID < P::kTiles, sums);
    store_sums<P>(s.sums[turn / kAtOnce % 2][threadIdx.x / 32], sums);
    consumers_sync();
    release(held, ring);
    write_results<P>(out, tile, turn);
    if (P::kTwoTiles && tile + GRID < P::kTiles) write_results<P>(out, tile + GRID, turn + 1);
  }
  return ring;
}
