// A product's input: from global memory, normed or plain, quantized where weights are FP8, in fixed point where they are INT4,
// to the registers of the consumers.

// x as the tensor cores take it: for each 64 bytes of a weight row and each column tile, the elements of row lane / 4 that
// stand opposite to this thread's 16 bytes of weight. FP8 numbers are held as the float16 that they are exactly: Hopper has
// no mma on FP8 registers, weights are widened too, and x is widened once.
//
// With INT4 weights x is in fixed point, 15 bits and a scale for each row and group, a power of two: numbers above 1/64 of
// the group's largest are exact, and the error of a product is far below that of rounding to bf16. An upper and a lower byte,
// both signed, are columns of their own, so a product of integers serves up to four rows, its sums are exact, and a register
// holds four elements: half of what 16-bit floats take.
template <class P>
struct Input {
  uint32_t b[P::kWindows][kColumnTiles][P::kWindowRegisters];
};

template <class S>
struct Place {
  int chunk, row, element;  // element of the whole row, chunk of the pass

  __device__ __forceinline__ explicit Place(int v) {
    const int at = threadIdx.x + v * kConsumers;
    chunk = at / (ROWS * S::kVectorsPerRow);
    row = at / S::kVectorsPerRow % ROWS;
    element = chunk * S::kChunkElements + at % S::kVectorsPerRow * 8;
  }
};

template <class P>
struct Loaded {
  static constexpr int kVectors = (P::kChunksPerPass * ROWS * P::kVectorsPerRow + kConsumers - 1) / kConsumers;
  uint4 v[kVectors];

  static __device__ __forceinline__ bool inside(const Place<P>& p, int pass) {
    return p.chunk < P::kChunksPerPass && p.element + pass * P::kChunksPerPass * P::kChunkElements < P::K;
  }

  __device__ __forceinline__ void load(const uint16_t* x, int pass) {
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const Place<P> p(i);
      v[i] = inside(p, pass) ? load_shared_state16(x + p.row * P::K + pass * P::kChunksPerPass * P::kChunkElements + p.element) : uint4();
    }
  }
};

__device__ __forceinline__ void unpack_bf16(const uint4& v, float* out) {
  out[0] = bf16_low(v.x), out[1] = bf16_high(v.x), out[2] = bf16_low(v.y), out[3] = bf16_high(v.y);
  out[4] = bf16_low(v.z), out[5] = bf16_high(v.z), out[6] = bf16_low(v.w), out[7] = bf16_high(v.w);
}

// Eight numbers as x is staged: bf16, or the float16 of the FP8 of them divided by the row's scale.
template <Format F>
__device__ __forceinline__ uint4 staged(const float* x, float inverse_scale) {
  if constexpr (F == kFp8) {
    uint4 out;
    widen(e4m3_quad(x[0] * inverse_scale, x[1] * inverse_scale, x[2] * inverse_scale, x[3] * inverse_scale), out.x, out.y);
    widen(e4m3_quad(x[4] * inverse_scale, x[5] * inverse_scale, x[6] * inverse_scale, x[7] * inverse_scale), out.z, out.w);
    return out;
  } else {
    return make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
  }
}

// The power of two by which a group whose largest magnitude has these bits gets into fixed point, and what undoes it.
struct FixedPoint {
  float inverse_scale, scale;

  __device__ __forceinline__ explicit FixedPoint(uint32_t largest) {
    constexpr int kBits = 13;  // the largest is 2^13 to 2^14
    const int exponent = max((int)(largest >> 23), kBits + 1);
    inverse_scale = __uint_as_float((uint32_t)(254 + kBits - exponent) << 23);
    scale = exponent == 255 ? __uint_as_float(0x7f800000) : __uint_as_float((uint32_t)(exponent - kBits) << 23);
  }
};

// Four numbers, each 1.5 * 2^23 + 128 + a number in fixed point: the numbers' upper bytes, and their lower ones, both signed.
__device__ __forceinline__ void split_bytes(const uint32_t* v, uint32_t& upper, uint32_t& lower) {
  const uint32_t first = __byte_perm(v[0], v[4], 0x5140), second = __byte_perm(v[1], v[5], 0x5140);
  upper = __byte_perm(first, second, 0x7632);
  lower = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
}

// Eight numbers in fixed point: `to` is their place in the plane of upper bytes. Bytes lie as the nibbles of a weight word
// do: even ones, then odd ones. Returns their sum.
template <class P>
__device__ __forceinline__ int stage_eight(const float* x, float inverse_scale, uint8_t* to) {
  uint32_t v[8];
  int sum = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    constexpr float kToInteger = 12582912.f + 128.f;  // rounds to an integer, which is then in the lower bits
    v[e] = __float_as_uint(x[e] * inverse_scale + kToInteger);
    sum += (int)(v[e] - __float_as_uint(kToInteger));
  }
  uint2 upper, lower;
  split_bytes(v, upper.x, lower.x);
  split_bytes(v + 2, upper.y, lower.y);
  *(uint2*)to = upper;
  *(uint2*)(to + P::kXPlane) = lower;
  return sum;
}

template <class P>
__device__ __forceinline__ void keep_group(int chunk, int group, int row, float scale, int sum) {
  shared().x_groups[(chunk * (P::kChunkElements / kGroup) + group) * ROWS + row] = make_float2(scale / 16.f, scale * sum);
}

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }  // as bits: a number that is none is larger than all

// Eight numbers of a group of 128, by 16 threads in a row for all of it.
template <class P>
__device__ __forceinline__ void stage_fixed_point(const float* x, const Place<P>& place, uint8_t* to) {
  uint32_t largest = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) largest = max(largest, magnitude(x[e]));
#pragma unroll
  for (int off = 8; off; off /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, off));
  const FixedPoint fixed(largest);
  int sum = stage_eight<P>(x, fixed.inverse_scale, to);
#pragma unroll
  for (int off = 8; off; off /= 2) sum += __shfl_xor_sync(~0u, sum, off);
  if (threadIdx.x % 16 == 0) keep_group<P>(place.chunk, place.element % P::kChunkElements / kGroup, place.row, fixed.scale, sum);
}

// INT4: plain x where every thread has a multiple of four vectors: four of a group each, so that maxima and sums are mostly
// a thread's own. Vectors of a thread are 64 bytes apart, and neighbours begin at different ones: reads are of whole
// sectors, and writes to the staging area meet no bank twice.
template <class P>
struct GroupsOfX {
  static constexpr int kFours = P::kChunksPerPass * ROWS * P::kVectorsPerRow / kConsumers / 4;
  static constexpr bool kServes = P::kFormat == kInt4 && kFours > 0 && P::kChunksPerPass * ROWS % 4 == 0;
  uint4 v[larger(kFours, 1)][4];

  struct Where {
    int chunk, row, group;
    __device__ __forceinline__ explicit Where(int four) {
      constexpr int kGroups = P::kChunkElements / kGroup;
      const int at = (four * kConsumers + threadIdx.x) / 4;
      chunk = at / (ROWS * kGroups), row = at / kGroups % ROWS, group = at % kGroups;
    }
    __device__ __forceinline__ int element(int i) const { return group * kGroup + ((i + group) % 4 * 4 + threadIdx.x % 4) * 8; }
  };

  __device__ __forceinline__ void load(const uint16_t* x, int pass) {
#pragma unroll
    for (int f = 0; f < kFours; f++) {
      const Where w(f);
      const int begin = (pass * P::kChunksPerPass + w.chunk) * P::kChunkElements;
#pragma unroll
      for (int i = 0; i < 4; i++)
        v[f][i] = begin + w.group * kGroup < P::K ? load_shared_state16(x + w.row * P::K + begin + w.element(i)) : uint4();
    }
  }

  // The four vectors `f` to the staging area, where the group's row of a chunk is at `to`.
  __device__ __forceinline__ void stage(int f, const Where& w, uint8_t* to) const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x[8];
      unpack_bf16(v[f][i], x);
#pragma unroll
      for (int e = 0; e < 8; e++) largest = max(largest, magnitude(x[e]));
    }
#pragma unroll
    for (int off = 2; off; off /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, off));
    const FixedPoint fixed(largest);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x[8];
      unpack_bf16(v[f][i], x);
      sum += stage_eight<P>(x, fixed.inverse_scale, to + w.element(i));
    }
#pragma unroll
    for (int off = 2; off; off /= 2) sum += __shfl_xor_sync(~0u, sum, off);
    if (threadIdx.x % 4 == 0) keep_group<P>(w.chunk, w.group, w.row, fixed.scale, sum);
  }
};

// Registers of x from the staging area, for chunks [first, first + kStageChunks) of a pass.
// INT4: a row of x takes two columns of eight, upper and lower bytes. The other columns are for other groups: the tensor
// cores see a group in columns of its own, zeros in all others, and a thread ends up with the sums of one row and group.
template <class P>
__device__ __forceinline__ void take_staged_groups(Input<P>& in, int first) {
  const int side = threadIdx.x / 32 / kSideWarps, warp = threadIdx.x / 32 % kSideWarps, lane = threadIdx.x % 32;
  const int row = lane / 8 % ROWS, turn = lane / 8 / ROWS;
  constexpr int kStep = P::kStageChunks % 2 == 0 ? 2 : 1;  // chunks that are there together
#pragma unroll
  for (int c = 0; c < P::kStageChunks; c += kStep) {
    if (first + c >= P::kChunksPerPass) break;
    if (kStep == 1 && !P::kTwoTiles && (first + c) % 2 > side) continue;
    const int chunk = kStep == 2 && first + c + 1 < P::kChunksPerPass ? c + side : c;  // of a tile's odd last one both take x
    const uint8_t* from = (const uint8_t*)shared().x + (chunk * ROWS + row) * P::kXPitch + lane / 4 % 2 * P::kXPlane + warp * 512 + lane % 4 * 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t(&b)[P::kWindowRegisters] = in.b[(first + c) / 2 * 4 + i][0];
      const bool mine = i % (4 / ROWS) == turn;
      const uint4 none = make_uint4(0, 0, 0, 0);
      const uint4 low = mine ? *(const uint4*)(from + i * 128) : none, high = mine ? *(const uint4*)(from + i * 128 + 16) : none;
      b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
      b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
    }
  }
}

template <class P>
__device__ __forceinline__ void take_staged_rows(Input<P>& in, int first) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < P::kStageChunks; c++) {
    if (first + c >= P::kChunksPerPass) break;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int t = 0; t < kColumnTiles; t++) {
        uint32_t(&b)[P::kWindowRegisters] = in.b[(first + c) * 2 + half][t];
        const int row = t * 8 + lane / 4;
        const uint8_t* from = (const uint8_t*)shared().x + (c * ROWS + row) * P::kXPitch;
        if (row >= ROWS) {
#pragma unroll
          for (int i = 0; i < P::kWindowRegisters; i++) b[i] = 0;
        } else if constexpr (P::kFormat == kFp8) {
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

// All chunks of a pass through the staging area: `stage(first)` writes chunks [first, first + kStageChunks).
template <class P, class F>
__device__ __forceinline__ void through_staging(Input<P>& in, F stage) {
#pragma unroll
  for (int first = 0; first < P::kChunksPerPass; first += P::kStageChunks) {
    if (first > 0) consumers_sync();
    stage(first);
    consumers_sync();
    if constexpr (P::kFormat == kInt4) take_staged_groups<P>(in, first);
    else take_staged_rows<P>(in, first);
  }
  consumers_sync();  // the staging area is free
}

// `stage(v, place, to)` writes the thread's vector v, its row of a chunk being at `to`. INT4: whole groups of lanes are here
// at a time, as all threads have vectors of the same row and chunk.
template <class P, class F>
__device__ __forceinline__ void distribute(Input<P>& in, F stage) {
  through_staging<P>(in, [&](int first) {
#pragma unroll
    for (int i = 0; i < Loaded<P>::kVectors; i++) {
      const Place<P> p(i);
      if (p.chunk >= first && p.chunk < min(first + P::kStageChunks, P::kChunksPerPass))
        stage(i, p, (uint8_t*)shared().x + ((p.chunk - first) * ROWS + p.row) * P::kXPitch);
    }
  });
}

// By all threads, between barriers of the block: of the rows whose squares' sums the warps left, the factors of the norm.
__device__ __forceinline__ void find_norms() {
  Shared& s = shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= ROWS) return;
  float sum = lane < kConsumerWarps ? s.squares[lane][warp] : 0.f;
#pragma unroll
  for (int off = kConsumerWarps / 2; off; off /= 2) sum += __shfl_xor_sync(~0u, sum, off);
  if (lane == 0) s.x_scale[warp] = rsqrtf(sum / HIDDEN + EPS);
}

// x = RMS norm of the residual stream times `norm`, once all blocks have arrived. Leaves the rows' scales in shared memory.
// INT4 has scales of groups: what the whole row decides, the norm's factor, is left to the epilogues in their stead.
template <class P>
__device__ __forceinline__ void load_normed(Input<P>& in, const uint16_t* norm, GridBarrier barrier) {
  static_assert(P::kPasses == 1, "the norm needs whole rows");
  constexpr int kVectors = Loaded<P>::kVectors, kRowSlots = P::kRowSlots;
  Shared& s = shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 weight[kVectors / kRowSlots > 0 ? kVectors / kRowSlots : 1];
#pragma unroll
  for (int i = 0; i < kVectors; i += kRowSlots) {
    const Place<P> p(i);
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
      if (P::kFormat != kInt4) largest[i % kRowSlots] = fmaxf(largest[i % kRowSlots], fabsf(x[e] * w[e]));
    }
  }
#pragma unroll
  for (int r = 0; r < kRowSlots; r++) {
#pragma unroll
    for (int off = 16; off; off /= 2) {
      squares[r] += __shfl_xor_sync(~0u, squares[r], off);
      if (P::kFormat != kInt4) largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], off));
    }
    if (lane == 0) s.squares[warp][r] = squares[r], s.largest[warp][r] = largest[r];
  }
  if constexpr (P::kFormat == kInt4) {
    distribute<P>(in, [&](int i, const Place<P>& p, uint8_t* to) {
      float x[8], w[8];
      unpack_bf16(loaded.v[i], x);
      unpack_bf16(weight[i / kRowSlots], w);
#pragma unroll
      for (int e = 0; e < 8; e++) x[e] *= w[e];
      stage_fixed_point<P>(x, p, to + p.element % P::kChunkElements);
    });
    find_norms();
    return;
  }
  consumers_sync();
  float rstd[kRowSlots], inverse_scale[kRowSlots];
#pragma unroll
  for (int r = 0; r < kRowSlots; r++) {
    // The warps that hold parts of the same row: all with ROWS = 1, else those as far into a sweep as this one.
    constexpr int kWarpsPerRow = P::kVectorsPerRow / 32;
    constexpr int kRowsShared = ROWS < P::kRowsPerSweep ? ROWS : P::kRowsPerSweep;
    float sum = 0.f, highest = 0.f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++)
      if (w / kWarpsPerRow % kRowsShared == warp / kWarpsPerRow % kRowsShared) sum += s.squares[w][r], highest = fmaxf(highest, s.largest[w][r]);
    rstd[r] = rsqrtf(sum / HIDDEN + EPS);
    const float scale = fmaxf(highest * rstd[r], kSmallestAmax) / kFp8Max;
    inverse_scale[r] = 1.f / scale;
    if (lane == 0) s.x_scale[Place<P>(r).row] = scale;
  }
  distribute<P>(in, [&](int i, const Place<P>& p, uint8_t* to) {
    float x[8], w[8];
    unpack_bf16(loaded.v[i], x);
    unpack_bf16(weight[i / kRowSlots], w);
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = x[e] * rstd[i % kRowSlots] * w[e];
    *(uint4*)(to + p.element % P::kChunkElements * 2) = staged<P::kFormat>(x, inverse_scale[i % kRowSlots]);
  });
}

// 1 / scale of the rows of a bf16 tensor whose largest magnitudes are known; leaves the scales in shared memory.
template <class P>
__device__ __forceinline__ void find_scales(const float* amax, float (&inverse_scale)[P::kRowSlots]) {
#pragma unroll
  for (int r = 0; r < P::kRowSlots; r++) {
    const int row = Place<P>(r).row;
    if (P::kFormat == kInt4) return;  // groups have scales
    const float scale = P::kFormat == kFp8 ? fmaxf(load_shared_state(amax + row), kSmallestAmax) / kFp8Max : 1.f;
    inverse_scale[r] = 1.f / scale;
    if (threadIdx.x % 32 == 0) shared().x_scale[row] = scale;
  }
}

template <class P>
__device__ __forceinline__ void take_plain(Input<P>& in, const Loaded<P>& loaded, const float (&inverse_scale)[P::kRowSlots]) {
  distribute<P>(in, [&](int i, const Place<P>& p, uint8_t* to) {
    const int at = p.element % P::kChunkElements;
    float x[8];
    unpack_bf16(loaded.v[i], x);
    if constexpr (P::kFormat == kInt4) {
      stage_fixed_point<P>(x, p, to + at);
    } else if constexpr (P::kFormat == kFp8) {
      *(uint4*)(to + at * 2) = staged<P::kFormat>(x, inverse_scale[i % P::kRowSlots]);
    } else {
      *(uint4*)(to + at * 2) = loaded.v[i];
    }
  });
}

template <class P>
__device__ __forceinline__ void take_plain(Input<P>& in, const GroupsOfX<P>& loaded, const float (&)[P::kRowSlots]) {
  through_staging<P>(in, [&](int first) {
#pragma unroll
    for (int f = 0; f < GroupsOfX<P>::kFours; f++) {
      const typename GroupsOfX<P>::Where w(f);
      if (w.chunk >= first && w.chunk < first + P::kStageChunks)
        loaded.stage(f, w, (uint8_t*)shared().x + ((w.chunk - first) * ROWS + w.row) * P::kXPitch);
    }
  });
}

// How plain x is loaded.
template <class P, bool GROUPS = GroupsOfX<P>::kServes>
struct PlainOf {
  typedef Loaded<P> Type;
};
template <class P>
struct PlainOf<P, true> {
  typedef GroupsOfX<P> Type;
};
