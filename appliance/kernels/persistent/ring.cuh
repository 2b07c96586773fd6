// What the persistent decode kernel stands on: mbarriers, bulk copies, tensor-core products, the barrier across the grid.
//
// Compiled with NVRTC, without any header. Sizes come in as macros (see kernel.py); everything is sm_90 or newer.

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else  // nvcc, for a look at registers and machine code
#include <stdint.h>
#endif

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

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(bar), "r"(parity)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_done(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
  return done != 0;
}

// Weights are read once: they should not push activations and KV cache out of L2.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

// 640 threads start with 96 registers each; the producer group gives 64 of its own up, the consumers take 16 each.
__device__ __forceinline__ void few_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 32;"); }
__device__ __forceinline__ void many_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 112;"); }

__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kConsumerBarrier), "n"(kConsumers) : "memory");
}

// Reads that must see what other multiprocessors wrote during this launch: past L1, which is not coherent.
__device__ __forceinline__ uint4 load_shared_state16(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_state8(const void* p) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ float load_shared_state(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint16_t load_shared_state(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

// Eight bytes at once that another GPU reads or writes meanwhile.
__device__ __forceinline__ uint64_t load_word(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_word(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void bulk_prefetch_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}


// Non-negative floats order like their bits.
__device__ __forceinline__ void atomic_max(float* p, float v) { atomicMax((int*)p, __float_as_int(v)); }

// One more arrival: releases what the block wrote before a barrier of its own, and acquires what the others released.
__device__ __forceinline__ int add_and_get(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before + 1;
}

// One counter for the whole launch: it only grows, so a barrier needs no reset. All blocks are resident (cooperative launch).
struct GridBarrier {
  uint32_t* counter;
  uint32_t target;  // arrivals that were announced

  // By all consumer threads: what they wrote is visible to whoever waits.
  __device__ __forceinline__ void arrive() {
    target += GRID;
    consumers_sync();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    }
  }

  __device__ __forceinline__ void wait_all() {
    if (threadIdx.x == 0) {
      uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    consumers_sync();
  }
};

// ---------------------------------------------------------------- numbers

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16_value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

// Two floats, rounded to nearest even: `low` in the low half.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ __forceinline__ uint16_t bf16_bits(float v) { return (uint16_t)bf16_pair(v, 0.f); }
__device__ __forceinline__ float bf16_round(float v) { return bf16_value(bf16_bits(v)); }

// Four floats to e4m3, saturating, first one in the lowest byte.
__device__ __forceinline__ uint32_t e4m3_quad(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (uint32_t)low | ((uint32_t)high << 16);
}

__device__ __forceinline__ void e4m3_values(uint32_t quad, float* out) {
  uint32_t low, high;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((uint16_t)quad));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((uint16_t)(quad >> 16)));
  asm("{.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(out[0]), "=f"(out[1]) : "r"(low));
  asm("{.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(out[2]), "=f"(out[3]) : "r"(high));
}

// Two f16 registers of four e4m3 numbers: bytes 0 and 1, 2 and 3; exact.
__device__ __forceinline__ void widen(uint32_t word, uint32_t& first, uint32_t& second) {
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(first) : "h"((uint16_t)word));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(second) : "h"((uint16_t)(word >> 16)));
}

// c [16 rows of weight, 8 rows of x] += a * b. A thread's registers of a and b hold the same positions of the inner
// dimension, whichever they are: the sum over them is the same.
template <Format F>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (F == kFp8) {  // widened to float16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The same in integers: unsigned weights, signed x, 32 of the inner dimension.
__device__ __forceinline__ void mma_integer(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two float16 in a word, as floats.
__device__ __forceinline__ float2 f16_values(uint32_t pair) {
  float2 v;
  asm("{.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(v.x), "=f"(v.y) : "r"(pair));
  return v;
}

// Two floats as float16, rounded to nearest even: `low` in the low half.
__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
