// The shape of the ring that weights pass through and of a block, the barrier across the grid, number formats. Sizes come in as
// macros (see kernel.py).

constexpr int kConsumerWarps = 16;
constexpr int kConsumers = kConsumerWarps * 32;
// One more warp feeds the ring. Registers are dealt to groups of four warps, so it comes with three that do nothing.
constexpr int kThreads = kConsumers + 128;
constexpr int kChunk = 2048;               // bytes of a weight row per copy: 1 KiB copies reach 3.8 TB/s, these 4.5
constexpr int kPitch = kChunk + 64;        // rows 64 bytes apart modulo 128: 16-byte reads of 8 rows meet no bank twice
constexpr int kTileRows = 16;              // weight rows of a slot, and of a product's tile
constexpr int kSideWarps = 8;              // INT4: two slots are multiplied at a time, each by half of the warps
// How weights are stored. INT4: two per byte (kernels/int4_layout.py), a scale and a zero point for every 128 of a row.
enum Format { kBf16, kFp8, kInt4 };
constexpr Format kLayerFormat = (Format)WEIGHTS, kHeadFormat = (Format)HEAD_WEIGHTS;
[[maybe_unused]] constexpr int kGroup = 128;  // INT4: elements of a row that share a scale; 64 bytes
// INT4: scales and zero points of a slot's weights lie behind them, as large as one weight row: 4 bytes for 64 of 16 rows.
constexpr int kSlotBytes = kTileRows * kPitch + (kLayerFormat == kInt4 ? kChunk : 0);
// Copies that have been issued and have not arrived: 64 KiB a block keep the memory busy. More of them would make everybody's
// small accesses, and with them the barriers, wait longer.
constexpr int kSlotsInFlight = 2;
// While the ring is full, weights of so many slots more are fetched into L2, one slot's every so many cycles: 0: none.
constexpr int kPrefetchSlots = 0, kPrefetchPace = 1800;
constexpr int kConsumerBarrier = 1;  // named barrier of the consumer warps; 0 is __syncthreads

// 640 threads start with 96 registers each; the producer group gives 64 of its own up, the consumers take 16 each.
__device__ __forceinline__ void few_registers() { fewer_registers<32>(); }
__device__ __forceinline__ void many_registers() { more_registers<112>(); }

__device__ __forceinline__ void consumers_sync() { named_barrier<kConsumerBarrier, kConsumers>(); }

// Non-negative floats order like their bits.
__device__ __forceinline__ void atomic_max(float* p, float v) { atomicMax((int*)p, __float_as_int(v)); }

// One counter for the whole launch: it only grows, so a barrier needs no reset. All blocks are resident (cooperative launch).
struct GridBarrier {
  uint32_t* counter;
  uint32_t target;  // arrivals that were announced

  // By all consumer threads: what they wrote is visible to whoever waits.
  __device__ __forceinline__ void arrive() {
    target += GRID;
    consumers_sync();
    if (threadIdx.x == 0) add_release(counter);
  }

  __device__ __forceinline__ void wait_all() {
    if (threadIdx.x == 0)
      while (load_acquire(counter) < target) {
      }
    consumers_sync();
  }
};

// ---------------------------------------------------------------- numbers

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16_value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
__device__ __forceinline__ uint16_t bf16_bits(float v) { return (uint16_t)bf16_pair(v, 0.f); }
__device__ __forceinline__ float bf16_round(float v) { return bf16_value(bf16_bits(v)); }

// c [16 rows of weight, 8 rows of x] += a * b. A thread's registers of a and b hold the same positions of the inner
// dimension, whichever they are: the sum over them is the same.
template <Format F>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (F == kFp8) mma_f16(c, a0, a1, a2, a3, b0, b1);  // widened to float16
  else mma_bf16(c, a0, a1, a2, a3, b0, b1);
}
