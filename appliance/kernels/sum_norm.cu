// The sum over ranks of a row-parallel product's rows, the residual add, the RMS norm and, where wanted, the rounding to
// 8 bits, as one kernel that pushes numbers into the other ranks' memory. What it computes and why it may wait as it does:
// sum_norm.py. Without headers, as NVRTC compiles it; compute capability 9.0.
//
// Compile-time constants: MODE, RANKS, HIDDEN (numbers of a row), PIECES (blocks that share a row, a cluster), INTEGERS
// (summands are int32 with scales still to be applied; else bf16, with scales or without), RESULT (0: bf16, 1: e4m3, 2:
// int8).

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

constexpr int kOneShot = 0, kDealt = 1;
constexpr int kThreads = HIDDEN / 8 / PIECES;         // each has 8 numbers of a row
constexpr int kThreadsPerSm = RANKS > 4 ? 512 : 1024;  // what its registers are shared out among
constexpr int kBlocksPerSm = kThreadsPerSm / kThreads > 8 ? 8 : kThreadsPerSm / kThreads;
constexpr int kParts = HIDDEN / 256;                  // warps that share a row
constexpr uint32_t kMissing = 0x80008000u;            // two minus zeros: has not come
constexpr int kLooksPerCheck = 256;                   // at what is not there, between looks at whether to give up
constexpr float kLargest = RESULT == 1 ? 448.f : 127.f;
constexpr float kSmallestAmax = 1e-12f;
static_assert(HIDDEN % (256 * PIECES) == 0 && kThreads <= kThreadsPerSm, "a row is cut into whole warps");

struct Arguments {
  const uint8_t* x;
  const float* row_scales;     // null: x has none to be applied
  const float* column_scales;
  const uint16_t* bias;        // null: none
  uint16_t* residual;
  const float* static_scale;   // null: each row has its own
  uint8_t* out;
  float* scales;
  const uint32_t* stopped;
  int rank, n;
  int64_t x_stride, residual_stride;
  uint64_t results_at, scales_at;  // in a buffer
  float eps;
  uint64_t buffer_bytes;
  uint32_t* counters;              // the epoch, and how many blocks of this launch have read it
  int column;                      // the first of this thread
  uint4 weight;
  // This rank first, then the others, in an order that sends what ranks send at a time to different ones: who, and where
  // its memory is.
  int peer[RANKS];
  uint64_t inbox[RANKS];
  uint32_t epoch, came_before;
};

__shared__ float2 shared_parts[2][kParts];

// ---------------------------------------------------------------- memory

__device__ __forceinline__ void load(const void* from, uint4& v) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
}
__device__ __forceinline__ void load_system(uint64_t from, uint4& v) {
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
}
__device__ __forceinline__ void load_system(uint64_t from, uint2& v) {
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
}
__device__ __forceinline__ void load_system(uint64_t from, uint32_t& v) {
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
}
__device__ __forceinline__ void store_system(uint64_t to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_system(uint64_t to, uint2 v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_system(uint64_t to, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ bool missing(uint4 v) { return v.x == kMissing || v.y == kMissing || v.z == kMissing || v.w == kMissing; }
__device__ __forceinline__ bool missing(uint2 v) { return v.x == kMissing || v.y == kMissing; }
__device__ __forceinline__ bool missing(uint32_t v) { return v == kMissing; }
__device__ __forceinline__ void make_missing(uint4& v) { v = make_uint4(kMissing, kMissing, kMissing, kMissing); }
__device__ __forceinline__ void make_missing(uint2& v) { v = make_uint2(kMissing, kMissing); }
__device__ __forceinline__ void make_missing(uint32_t& v) { v = kMissing; }
__device__ __forceinline__ uint32_t sendable(uint32_t v) { return v == kMissing ? 0u : v; }
__device__ __forceinline__ uint4 sendable(uint4 v) { return make_uint4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w)); }
__device__ __forceinline__ uint2 sendable(uint2 v) { return make_uint2(sendable(v.x), sendable(v.y)); }

// Until all that is wanted of COUNT places has come; they are made empty for the call after the next.
template <int COUNT, class Word>
__device__ __forceinline__ void receive(const Arguments& a, const uint64_t (&from)[COUNT], const bool (&wanted)[COUNT], Word (&got)[COUNT]) {
  bool absent;
  int looks = 0;
  do {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (wanted[i]) load_system(from[i], got[i]);
    absent = false;
#pragma unroll
    for (int i = 0; i < COUNT; i++) absent = absent || (wanted[i] && missing(got[i]));
    if (absent && ++looks % kLooksPerCheck == 0) {
      uint32_t stop;
      load_system((uint64_t)a.stopped, stop);
      if (stop) break;
    }
  } while (absent);
  Word empty;
  make_missing(empty);
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (wanted[i]) store_system(from[i], empty);
}

// ---------------------------------------------------------------- numbers

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t bf16_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ void widen(uint4 v, float (&to)[8]) {
  to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
  to[4] = low(v.z), to[5] = high(v.z), to[6] = low(v.w), to[7] = high(v.w);
}

__device__ __forceinline__ uint4 narrow(const float (&v)[8]) {
  return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}

// This thread's numbers of a row of this rank's product, its scales applied, as they travel.
__device__ __forceinline__ uint4 summand(const Arguments& a, int row) {
  const int64_t at = row * a.x_stride + a.column;
  uint4 v;
  float x[8];
#if INTEGERS
#pragma unroll
  for (int half = 0; half < 2; half++) {
    load(a.x + at * 4 + half * 16, v);
    x[4 * half] = (float)(int)v.x, x[4 * half + 1] = (float)(int)v.y, x[4 * half + 2] = (float)(int)v.z, x[4 * half + 3] = (float)(int)v.w;
  }
#else
  load(a.x + at * 2, v);
  if (a.row_scales == nullptr) return sendable(v);
  widen(v, x);
#endif
  const float row_scale = a.row_scales[row];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    load(a.column_scales + a.column + 4 * half, v);
    x[4 * half] = __fmul_rn(__fmul_rn(x[4 * half], row_scale), __uint_as_float(v.x));
    x[4 * half + 1] = __fmul_rn(__fmul_rn(x[4 * half + 1], row_scale), __uint_as_float(v.y));
    x[4 * half + 2] = __fmul_rn(__fmul_rn(x[4 * half + 2], row_scale), __uint_as_float(v.z));
    x[4 * half + 3] = __fmul_rn(__fmul_rn(x[4 * half + 3], row_scale), __uint_as_float(v.w));
  }
  if (a.bias != nullptr) {
    float bias[8];
    load(a.bias + a.column, v);
    widen(v, bias);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __fadd_rn(x[j], bias[j]);
  }
  return sendable(narrow(x));
}

// The sum of a row's summands of all ranks, in their order, rounded: `mine` is this rank's.
__device__ __forceinline__ uint4 sum_of(const Arguments& a, const uint4 (&others)[RANKS], uint4 mine) {
  float total[8] = {};
#pragma unroll
  for (int r = 0; r < RANKS; r++) {
    float x[8];
    widen(r == a.rank ? mine : others[r], x);
#pragma unroll
    for (int j = 0; j < 8; j++) total[j] += x[j];
  }
  return narrow(total);
}

#if RESULT == 0
using Result = uint4;
#else
using Result = uint2;
#endif
constexpr int kResultBytes = sizeof(Result) / 8;  // of a number

__device__ __forceinline__ uint32_t rounded4(const float* y, float scale) {
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; j++) v[j] = fminf(fmaxf(__fdiv_rn(y[j], scale), -kLargest), kLargest);
  uint32_t word;
#if RESULT == 2
  int whole[4];
#pragma unroll
  for (int j = 0; j < 4; j++) whole[j] = __float2int_rn(v[j]) & 0xff;
  word = whole[0] | whole[1] << 8 | whole[2] << 16 | whole[3] << 24;
#else
  uint16_t first, second;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(first) : "f"(v[1]), "f"(v[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(second) : "f"(v[3]), "f"(v[2]));
  word = first | (uint32_t)second << 16;
#endif
  return word;
}

// ---------------------------------------------------------------- a row's norm

__device__ __forceinline__ uint32_t piece_of_row() { return PIECES == 1 ? 0 : blockIdx.x % PIECES; }

__device__ __forceinline__ void cluster_arrive() {
  if (PIECES > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  if (PIECES > 1)
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  else
    __syncthreads();
}

__device__ __forceinline__ void over_lanes(float& square, float& largest) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
}

// Over a whole row: the sum of squares and the largest number. `turn` counts calls.
__device__ __forceinline__ void over_row(float& square, float& largest, int turn) {
  const uint32_t lane = threadIdx.x % 32, part = (piece_of_row() * kThreads + threadIdx.x) / 32;
  over_lanes(square, largest);
  if (lane < PIECES) {
    if (PIECES == 1) {
      shared_parts[turn & 1][part] = make_float2(square, largest);
    } else {
      const uint32_t here = (uint32_t)__cvta_generic_to_shared(&shared_parts[turn & 1][part]);
      asm volatile("{.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.v2.f32 [there], {%2, %3};\n}" ::"r"(here),
                   "r"(lane), "f"(square), "f"(largest)
                   : "memory");
    }
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  square = largest = 0.f;
  for (int i = lane; i < kParts; i += 32) {
    const float2 found = shared_parts[turn & 1][i];
    square += found.x, largest = fmaxf(largest, found.y);
  }
  over_lanes(square, largest);
}

// A sum (bf16) and the residual become the new stream, in `sum`; over_row's summands.
__device__ __forceinline__ void add_residual(const Arguments& a, uint4& sum, uint4 residual, float& square, float& largest) {
  float x[8], r[8], w[8];
  widen(sum, x), widen(residual, r), widen(a.weight, w);
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] += r[j];
  sum = narrow(x);
  widen(sum, x);
  square = largest = 0.f;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    square += x[j] * x[j];
    largest = fmaxf(largest, fabsf(x[j] * w[j]));
  }
}

// The stream's numbers normed, rounded; their scale, if they have one.
__device__ __forceinline__ Result normed(const Arguments& a, uint4 stream, float square, float largest, float& scale) {
  float x[8], w[8];
  widen(stream, x), widen(a.weight, w);
  const float factor = rsqrtf(square / HIDDEN + a.eps);
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] = x[j] * factor * w[j];
  scale = 1.f;
#if RESULT == 0
  return narrow(x);
#else
  scale = a.static_scale != nullptr ? *a.static_scale : fmaxf(largest * factor, kSmallestAmax) / kLargest;
  return make_uint2(rounded4(x, scale), rounded4(x + 4, scale));
#endif
}

__device__ __forceinline__ void put(const Arguments& a, int row, Result result, float scale) {
  *(Result*)(a.out + ((int64_t)row * HIDDEN + a.column) * kResultBytes) = result;
  if (RESULT != 0 && a.column == 0) a.scales[row] = scale;
}

__device__ __forceinline__ uint16_t* stream_of(const Arguments& a, int row) { return a.residual + row * a.residual_stride + a.column; }

// ---------------------------------------------------------------- places in the buffer of this call

// In this rank's memory (peer 0) or a peer's, this thread's words of ...
__device__ __forceinline__ uint64_t buffer_of(const Arguments& a, int peer) { return a.inbox[peer] + (a.epoch & 1) * a.buffer_bytes; }
// ... a line of summands,
__device__ __forceinline__ uint64_t summand_at(const Arguments& a, int peer, int line, int sender) {
  return buffer_of(a, peer) + ((uint64_t)(line * RANKS + sender) * HIDDEN + a.column) * 2;
}
// ... a row of results; and where the row's scale is.
__device__ __forceinline__ uint64_t result_at(const Arguments& a, int peer, int row) {
  return buffer_of(a, peer) + a.results_at + ((uint64_t)row * HIDDEN + a.column) * kResultBytes;
}
__device__ __forceinline__ uint64_t scale_at(const Arguments& a, int peer, int row) {
  return buffer_of(a, peer) + a.scales_at + (uint64_t)row * 4;
}

// What all ranks have sent for a line, added up; `mine` is this rank's.
__device__ __forceinline__ uint4 received_sum(const Arguments& a, int line, uint4 mine) {
  uint64_t from[RANKS];
  bool wanted[RANKS];
  uint4 others[RANKS];
#pragma unroll
  for (int r = 0; r < RANKS; r++) {
    from[r] = summand_at(a, 0, line, r);
    wanted[r] = r != a.rank;
  }
  receive(a, from, wanted, others);
  return sum_of(a, others, mine);
}

// ---------------------------------------------------------------- the two ways

// What each way does when its first numbers are under way. All threads know the epoch then, and one of them counts the block;
// all blocks of the cluster have begun: their shared memory is there.
__device__ __forceinline__ void sent(Arguments& a) {
  __syncthreads();
  if (threadIdx.x == 0) a.came_before = atomicAdd(a.counters + 1, 1u);
  __syncwarp();
  cluster_wait();
}

// Every rank's rows to all ranks, each of which adds up all and norms all.
__device__ __forceinline__ void one_shot(Arguments& a, int slot, int slots) {
  for (int row = slot; row < a.n; row += slots) {
    const uint4 mine = summand(a, row);
#pragma unroll
    for (int i = 1; i < RANKS; i++) store_system(summand_at(a, i, row, a.rank), mine);
  }
  sent(a);
  int turn = 0;
  for (int row = slot; row < a.n; row += slots, turn++) {
    uint4 residual, mine = summand(a, row);
    load(stream_of(a, row), residual);
    uint4 sum = received_sum(a, row, mine);
    float square, largest, scale;
    add_residual(a, sum, residual, square, largest);
    *(uint4*)stream_of(a, row) = sum;
    over_row(square, largest, turn);
    const Result result = normed(a, sum, square, largest, scale);
    put(a, row, result, scale);
  }
}

// Row g * RANKS + r is rank r's: the others send it theirs. `groups` of rows, of which this slot has some.
__device__ __forceinline__ void send_to_owners(Arguments& a, int slot, int slots, int groups) {
  for (int g = slot; g < groups; g += slots) {
    uint4 x[RANKS];
#pragma unroll
    for (int i = 1; i < RANKS; i++)
      if (g * RANKS + a.peer[i] < a.n) x[i] = summand(a, g * RANKS + a.peer[i]);
#pragma unroll
    for (int i = 1; i < RANKS; i++)
      if (g * RANKS + a.peer[i] < a.n) store_system(summand_at(a, i, g, a.rank), x[i]);
  }
  sent(a);
}

// Owners add up and norm their rows of the stream, and hand the results to all.
__device__ __forceinline__ void dealt(Arguments& a, int slot, int slots) {
  const int groups = (a.n + RANKS - 1) / RANKS;
  send_to_owners(a, slot, slots, groups);
  int turn = 0;
  for (int g = slot; g < groups; g += slots, turn++) {
    const int row = g * RANKS + a.rank;
    if (row >= a.n) continue;
    uint4 residual, mine = summand(a, row);
    load(stream_of(a, row), residual);
    uint4 sum = received_sum(a, g, mine);
    float square, largest, scale;
    add_residual(a, sum, residual, square, largest);
    over_row(square, largest, turn);
    const Result result = sendable(normed(a, sum, square, largest, scale));
#pragma unroll
    for (int i = 1; i < RANKS; i++) {
      store_system(result_at(a, i, row), result);
      if (RESULT != 0 && a.column == 0) store_system(scale_at(a, i, row), __float_as_uint(scale));
    }
    *(uint4*)stream_of(a, row) = sum;
    put(a, row, result, scale);
  }
  for (int g = slot; g < groups; g += slots) {
    uint64_t from[RANKS], scale_from[RANKS];
    bool wanted[RANKS];
    Result results[RANKS];
    uint32_t factors[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      const int row = g * RANKS + r;
      wanted[r] = r != a.rank && row < a.n;
      from[r] = result_at(a, 0, row);
      scale_from[r] = scale_at(a, 0, row);
    }
    receive(a, from, wanted, results);
    if (RESULT != 0 && a.column == 0) receive(a, scale_from, wanted, factors);
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (wanted[r]) put(a, g * RANKS + r, results[r], __uint_as_float(factors[r]));
  }
}

// ---------------------------------------------------------------- kernel

#if PIECES > 1
#define CLUSTER __cluster_dims__(PIECES, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(kThreads, kBlocksPerSm)
sum_norm(const uint8_t* x, const float* row_scales, const float* column_scales, const uint16_t* bias, uint16_t* residual,
         const uint16_t* weight, const float* static_scale, uint8_t* out, float* scales, const uint64_t* addresses,
         uint32_t* counters, const uint32_t* stopped, int64_t rank, int64_t n, int64_t x_stride, int64_t residual_stride,
         uint64_t results_at, uint64_t scales_at, uint64_t buffer_bytes, uint64_t eps_bits) {
  Arguments a{x, row_scales, column_scales, bias, residual, static_scale, out, scales, stopped, (int)rank, (int)n, x_stride,
              residual_stride, results_at, scales_at, __uint_as_float((uint32_t)eps_bits), buffer_bytes, counters};
  const int slot = blockIdx.x / PIECES, slots = gridDim.x / PIECES;
  a.column = (int)(piece_of_row() * kThreads + threadIdx.x) * 8;
  // Neither addresses nor weights change: they may be read while the kernel in front still runs.
#pragma unroll
  for (int i = 0; i < RANKS; i++) {
    a.peer[i] = i == 0 ? a.rank : (a.rank + 1 + (i - 1 + slot) % (RANKS - 1)) % RANKS;
    a.inbox[i] = addresses[a.peer[i]];
  }
  load(weight + a.column, a.weight);
  cluster_arrive();
  wait_for_kernel_in_front();
  let_next_kernel_start();
  load_system((uint64_t)counters, a.epoch);
  if (MODE == kOneShot) one_shot(a, slot, slots);
  if (MODE == kDealt) dealt(a, slot, slots);
  if (threadIdx.x == 0 && a.came_before == gridDim.x - 1) {  // all blocks have read the epoch
    counters[1] = 0;
    counters[0] = a.epoch + 1;
  }
}
