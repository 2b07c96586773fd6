// The functions of appliance/kernels/int4/primitives.cuh, cluster.cuh and warpgroup.cuh for a CPU, so that the kernels run there as C++:
// clusters (of one block, where there are none) one after the other, the threads of a cluster as fibers that take turns.
// Copies into shared memory and products of warpgroups happen as late as they may, when they are waited for, and shared memory
// is NaN before: what does not wait computes nonsense.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CLUSTER
#ifdef WARPGROUPS  // wide.cu
#define WARPS (4 * WARPGROUPS)
#endif
#ifndef SPLIT
#define SPLIT 0
#endif

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Dim { int x; };
static Dim threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kBlocks = SPLIT ? SPLIT : 1;  // of a cluster
constexpr int kBlockThreads = WARPS * 32, kSharedBytes = 232448, kStackBytes = 128 << 10;
alignas(1024) static uint8_t shared_of[kBlocks][kSharedBytes];
static uint8_t stacks[kBlocks * kBlockThreads][kStackBytes];

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  bool there;
};

struct Product {
  float* sum;
  const uint32_t* a;
  uint64_t described;
};

// Where some fibers wait for each other, again and again.
struct Barrier {
  int arrivals;
};

struct Fiber {
  ucontext_t context;
  bool done;
  int warp_products;
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> open;
  std::vector<std::vector<Product>> product_groups;
  std::vector<Product> open_products;
};
static Fiber fibers[kBlocks * kBlockThreads];
static int current;  // fiber that runs
static ucontext_t scheduler;
static Barrier whole_cluster, blocks[kBlocks], warpgroups[kBlocks * kBlockThreads / 128 + 1];
static int product_arrivals[kBlocks * WARPS][2];
static uint32_t operands[kBlocks * WARPS][2][32][6];

inline Fiber& self() { return fibers[current]; }
inline uint8_t* shared() { return shared_of[current / kBlockThreads]; }

// Gives the turn away until `ready`.
template <class Ready>
inline void wait(Ready ready) {
  while (!ready()) swapcontext(&self().context, &scheduler);
}

// Until all `count` of them have come as often as this one.
inline void meet(Barrier& barrier, int count) {
  const int wanted = (barrier.arrivals++ / count + 1) * count;
  wait([&] { return barrier.arrivals >= wanted; });
}

inline void perform(const Copy& copy) {
  if (copy.there) memcpy(shared() + copy.to, copy.from, copy.bytes);
  else memset(shared() + copy.to, 0, copy.bytes);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float v;
  memcpy(&v, &wide, 4);
  return v;
}

inline uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
  _Float16 v;
  memcpy(&v, &bits, 2);
  return (float)v;
}

inline uint16_t to_half(float v) {
  const _Float16 half = (_Float16)v;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline float number(uint16_t bits) { return BF16 ? from_bf16(bits) : from_half(bits); }
inline uint16_t rounded(float v) { return BF16 ? to_bf16(v) : to_half(v); }

}  // namespace emulation

inline uint64_t read_once_policy() { return 0; }
inline uint32_t shared_base() { return 0; }
inline void copy16(uint32_t to, const void* from, bool there) { emulation::self().open.push_back({to, from, 16, there}); }
inline void copy16_once(uint32_t to, const void* from, bool there, uint64_t) { copy16(to, from, there); }
inline void copy4(uint32_t to, const void* from, bool there) { emulation::self().open.push_back({to, from, 4, there}); }
inline void end_group() {
  emulation::self().groups.push_back(std::move(emulation::self().open));
  emulation::self().open.clear();
}
template <int PENDING>
inline void wait_group() {
  auto& groups = emulation::self().groups;
  while ((int)groups.size() > PENDING) {
    for (const auto& copy : groups.front()) emulation::perform(copy);
    groups.erase(groups.begin());
  }
}

template <class T>
inline T load_shared(uint32_t from) {
  if (from % sizeof(T) || from + sizeof(T) > emulation::kSharedBytes) abort();
  T v;
  memcpy(&v, emulation::shared() + from, sizeof(T));
  return v;
}
inline uint32_t load_shared4(uint32_t from) { return load_shared<uint32_t>(from); }
inline uint2 load_shared8(uint32_t from) { return load_shared<uint2>(from); }
inline uint4 load_shared16(uint32_t from) { return load_shared<uint4>(from); }
inline void store_shared16(uint32_t to, uint4 v) { memcpy(emulation::shared() + to, &v, 16); }
inline void store_shared4(uint32_t to, float v) { memcpy(emulation::shared() + to, &v, 4); }
inline float4 load_floats16(uint32_t from) { return load_shared<float4>(from); }
inline uint4 load16(const void* from) {
  if ((uintptr_t)from % 16) abort();
  uint4 v;
  memcpy(&v, from, 16);
  return v;
}
inline float4 load_others(const float4* from) { return *from; }
inline uint32_t arrive(uint32_t* counter) { return (*counter)++; }
inline void wait_for_kernel_in_front() {}
inline void let_next_kernel_start() {}
inline void __threadfence() {}

inline void __syncthreads() { emulation::meet(emulation::blocks[emulation::current / emulation::kBlockThreads], emulation::kBlockThreads); }

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [&](uint32_t pair) { return emulation::number((uint16_t)(pair >> shift)); };
    out |= (uint32_t)emulation::rounded(half(a) * half(b) + half(c)) << shift;
  }
  return out;
}
inline uint32_t multiply(uint32_t a, uint32_t b) { return multiply_add(a, b, 0x80008000); }
inline float __uint_as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline float half_value(uint16_t bits) { return emulation::from_half(bits); }
inline uint32_t twice(float v) { return emulation::rounded(v) * 0x10001u; }
inline uint32_t both(float low, float high) { return emulation::rounded(low) | (uint32_t)emulation::rounded(high) << 16; }
inline float value(uint16_t bits) { return emulation::number(bits); }

// The fragments of mma.m16n8k16 as the PTX manual lays them out (Matrix Fragments for mma.m16n8k16).
inline void tensor_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int warp = emulation::current / 32, lane = emulation::current % 32;
  const int turn = emulation::self().warp_products++;
  auto& given = emulation::operands[warp][turn % 2];
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(given[lane], mine, sizeof(mine));
  int& arrived = emulation::product_arrivals[warp][turn % 2];
  arrived++;
  const int wanted = (turn / 2 + 1) * 32;
  emulation::wait([&] { return arrived >= wanted; });
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const int quad = k % 8 / 2;
      const uint32_t left = given[row % 8 * 4 + quad][row / 8 + k / 8 * 2], right = given[column * 4 + quad][4 + k / 8];
      sum[i] += emulation::number((uint16_t)(left >> k % 2 * 16)) * emulation::number((uint16_t)(right >> k % 2 * 16));
    }
  }
}

#ifdef WARPGROUPS

inline void show_to_tensor_cores() {}
inline void warpgroup_fence() {}
inline void hold(float*) {}
inline uint64_t describe(uint32_t at) {
  if (at % 32 || at / 1024 * 1024 + 1024 > emulation::kSharedBytes) abort();
  return at >> 4;
}
inline void begin_product(float (&sum)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t described) {
  emulation::self().open_products.push_back({sum, a, described});
}
inline void warpgroup_commit() {
  emulation::self().product_groups.push_back(std::move(emulation::self().open_products));
  emulation::self().open_products.clear();
}

namespace emulation {

// This thread's part of the warpgroup's `index`th product under way. The right operand's pieces of 16 bytes have changed places
// by bits of their address, as with a swizzle of 128 bytes (PTX manual, "Swizzling Modes").
inline void perform(int group, int index) {
  const int lane = current % 32, warp = current / 32 * 32;
  const Product& product = self().product_groups[group][index];
  for (int i = 0; i < COLUMNS / 2; i++) {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const Product& left = fibers[warp + row % 8 * 4 + k % 8 / 2].product_groups[group][index];
      uint32_t at = (uint32_t)(product.described << 4) + column / 8 * 1024 + column % 8 * 128 + k * 2;
      at ^= at / 128 % 8 * 16;
      uint16_t right;
      memcpy(&right, shared() + at, 2);
      product.sum[i] += number((uint16_t)(left.a[row / 8 + k / 8 * 2] >> k % 2 * 16)) * number(right);
    }
  }
}

}  // namespace emulation

template <int PENDING>
inline void warpgroup_wait() {
  auto& groups = emulation::self().product_groups;
  emulation::Barrier& warpgroup = emulation::warpgroups[emulation::current / 128];
  emulation::meet(warpgroup, 128);  // operands of others are as they are at their wait
  while ((int)groups.size() > PENDING) {
    for (size_t i = 0; i < groups.front().size(); i++) emulation::perform(0, i);
    emulation::meet(warpgroup, 128);
    groups.erase(groups.begin());
    emulation::meet(warpgroup, 128);
  }
}

#endif

inline uint32_t cluster_rank() { return emulation::current / emulation::kBlockThreads; }
inline void cluster_barrier() { emulation::meet(emulation::whole_cluster, emulation::kBlocks * emulation::kBlockThreads); }
inline float4 load_cluster16(uint32_t from, uint32_t rank) {
  float4 v;
  if (from % 16 || rank >= emulation::kBlocks || emulation::fibers[rank * emulation::kBlockThreads].done) abort();
  memcpy(&v, emulation::shared_of[rank] + from, 16);
  return v;
}

namespace emulation {

static std::function<void()> body;

inline void fiber_main() {
  body();
  self().done = true;
  swapcontext(&self().context, &scheduler);
}

inline void run_cluster(int first) {
  memset(shared_of, 0xff, sizeof(shared_of));
  whole_cluster = Barrier{};
  for (auto& barrier : blocks) barrier = Barrier{};
  for (auto& barrier : warpgroups) barrier = Barrier{};
  memset(product_arrivals, 0, sizeof(product_arrivals));
  constexpr int kFibers = kBlocks * kBlockThreads;
  for (int i = 0; i < kFibers; i++) {
    Fiber& fiber = fibers[i];
    fiber.done = false, fiber.warp_products = 0;
    fiber.groups.clear(), fiber.open.clear(), fiber.product_groups.clear(), fiber.open_products.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i];
    fiber.context.uc_stack.ss_size = sizeof(stacks[i]);
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < kFibers; i++)
      if (!fibers[i].done) {
        running = true;
        current = i, threadIdx.x = i % kBlockThreads, blockIdx.x = first + i / kBlockThreads;
        swapcontext(&scheduler, &fibers[i].context);
      }
  }
}

}  // namespace emulation

#include "shares.cuh"
#include KERNEL

#ifdef DEQUANTIZE
extern "C" void emulate(int blocks, const uint32_t* weight, const uint32_t* scale_zero, uint4* out, int64_t words) {
  emulation::body = [=] { int4_dequantize(weight, scale_zero, out, words); };
  for (int block = 0; block < blocks; block++) emulation::run_cluster(block);
}
#elif defined(WARPGROUPS)
extern "C" void emulate(int blocks, const uint8_t* weight, const uint8_t* scale_zero, const uint16_t* x, const uint16_t* bias,
                        uint16_t* out, int64_t m, int64_t n, int64_t k, int64_t x_stride) {
  if (STAGES * kStageBytes > emulation::kSharedBytes || COLUMNS * kSumStride<kRows> * 4 > emulation::kSharedBytes) abort();
  gridDim.x = blocks;
  emulation::body = [=] { int4_linear(weight, scale_zero, x, bias, out, m, n, k, x_stride); };
  for (int first = 0; first < blocks; first += SPLIT) emulation::run_cluster(first);
}
#else
// Blocks, or clusters of them, in the order given, each number once.
extern "C" void emulate(const int* order, int blocks, const uint8_t* weight, const uint8_t* scale_zero, const uint16_t* x,
                        const uint16_t* bias, uint16_t* out, float4* partial, uint32_t* counters, int64_t m, int64_t n, int64_t k,
                        int64_t x_stride) {
  if (STAGES * kStageBytes > emulation::kSharedBytes) abort();
  gridDim.x = blocks;
  emulation::body = [=] { int4_linear(weight, scale_zero, x, bias, out, partial, counters, m, n, k, x_stride); };
  for (int i = 0; i < blocks / emulation::kBlocks; i++) emulation::run_cluster(order[i] * emulation::kBlocks);
}
#endif
