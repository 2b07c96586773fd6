// A product's input: from global memory, normed or plain, quantized where weights are FP8, to the registers of the consumers.

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
    const int row = Place(r).row;
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

