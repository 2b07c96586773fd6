// The functions of appliance/kernels/int4/primitives.cuh for a CPU, so that linear.cu runs there as C++: blocks one after the
// other, the threads of a block as fibers that take turns. Copies into shared memory happen as late as they may, when they are
// waited for, and shared memory is NaN before: what does not wait computes nonsense.

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

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Dim { int x; };
static Dim threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kThreads = WARPS * 32, kSharedBytes = 232448;
alignas(128) static uint8_t shared[kSharedBytes];
static uint8_t stacks[kThreads][256 << 10];

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  bool there;
};

struct Fiber {
  ucontext_t context;
  bool done;
  int block_barriers, warp_products;
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> open;
};
static Fiber fibers[kThreads];
static ucontext_t scheduler;
static int block_arrivals[2], product_arrivals[WARPS][2];
static uint32_t operands[WARPS][2][32][6];

inline Fiber& self() { return fibers[threadIdx.x]; }

// Gives the turn away until `ready`.
template <class Ready>
inline void wait(Ready ready) {
  while (!ready()) {
    const int me = threadIdx.x;
    swapcontext(&fibers[me].context, &scheduler);
  }
}

inline void perform(const Copy& copy) {
  if (copy.there) memcpy(shared + copy.to, copy.from, copy.bytes);
  else memset(shared + copy.to, 0, copy.bytes);
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
  memcpy(&v, emulation::shared + from, sizeof(T));
  return v;
}
inline uint32_t load_shared4(uint32_t from) { return load_shared<uint32_t>(from); }
inline uint2 load_shared8(uint32_t from) { return load_shared<uint2>(from); }
inline uint4 load_shared16(uint32_t from) { return load_shared<uint4>(from); }
inline void store_shared16(uint32_t to, uint4 v) { memcpy(emulation::shared + to, &v, 16); }
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

inline void __syncthreads() {
  const int turn = emulation::self().block_barriers++;
  int& arrived = emulation::block_arrivals[turn % 2];
  if (++arrived % emulation::kThreads == 0) return;
  const int wanted = (turn / 2 + 1) * emulation::kThreads;
  emulation::wait([&] { return arrived >= wanted; });
}

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [&](uint32_t pair) { return emulation::number((uint16_t)(pair >> shift)); };
    out |= (uint32_t)emulation::rounded(half(a) * half(b) + half(c)) << shift;
  }
  return out;
}
inline float half_value(uint16_t bits) { return emulation::from_half(bits); }
inline uint32_t twice(float v) { return emulation::rounded(v) * 0x10001u; }
inline float value(uint16_t bits) { return emulation::number(bits); }

// The fragments of mma.m16n8k16 as the PTX manual lays them out (Matrix Fragments for mma.m16n8k16).
inline void tensor_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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

namespace emulation {

static std::function<void()> body;

inline void fiber_main() {
  body();
  self().done = true;
  swapcontext(&self().context, &scheduler);
}

inline void run_block() {
  memset(shared, 0xff, sizeof(shared));
  memset(block_arrivals, 0, sizeof(block_arrivals));
  memset(product_arrivals, 0, sizeof(product_arrivals));
  for (int i = 0; i < kThreads; i++) {
    Fiber& fiber = fibers[i];
    fiber.done = false, fiber.block_barriers = fiber.warp_products = 0;
    fiber.groups.clear(), fiber.open.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i];
    fiber.context.uc_stack.ss_size = sizeof(stacks[i]);
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < kThreads; i++)
      if (!fibers[i].done) {
        running = true;
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
      }
  }
}

}  // namespace emulation

#include KERNEL

// Blocks in the order given, each number from 0 to blocks - 1 once.
extern "C" void emulate(const int* order, int blocks, const uint8_t* weight, const uint8_t* scale_zero, const uint16_t* x,
                        const uint16_t* bias, uint16_t* out, float4* partial, uint32_t* counters, int64_t m, int64_t n, int64_t k,
                        int64_t x_stride) {
  if (STAGES * kStageBytes > emulation::kSharedBytes) abort();
  gridDim.x = blocks;
  emulation::body = [=] { int4_linear(weight, scale_zero, x, bias, out, partial, counters, m, n, k, x_stride); };
  for (int i = 0; i < blocks; i++) {
    blockIdx.x = order[i];
    emulation::run_block();
  }
}
