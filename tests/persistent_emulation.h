// The functions of appliance/kernels/persistent/primitives.cuh for a CPU, so that the persistent kernel runs there as C++: the threads of all
// blocks of all ranks as fibers that take turns. Copies into the ring arrive late and in any order, and so do the words that ranks write into
// each other's memory; shared memory is NaN at first: what does not wait computes nonsense. Comes in front of the kernel's other files.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct alignas(8) uint2 { uint32_t x = 0, y = 0; };
struct alignas(16) uint4 { uint32_t x = 0, y = 0, z = 0, w = 0; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  uint4 v;
  v.x = x, v.y = y, v.z = z, v.w = w;
  return v;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Dim { unsigned x; };

struct Layer;
struct Model;
extern "C" void decode_step(const Layer*, const Model*, const int64_t*, const int64_t*, const int64_t*, const int*, float*);

// ---------------------------------------------------------------- fibers

namespace emulation {

constexpr int kArguments = 7, kStackBytes = 48 << 10, kSweeps = 50000, kPause = 400;
typedef const void* Arguments[kArguments];

// Changes stacks. ucontext does too, with two calls of the system every time.
#ifdef __x86_64__
typedef void* Context;
extern "C" void emulation_switch(Context* save, Context load);
asm(".text\n.globl emulation_switch\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
inline void change(Context& from, Context& to) { emulation_switch(&from, to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = (void**)(((uintptr_t)stack + kStackBytes) & ~(uintptr_t)63);
  *--top = nullptr;
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
#else
typedef ucontext_t Context;
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Meeting {  // of some threads
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Meeting meeting[2];  // of all lanes; of some, while the others may be ahead
  uint32_t given[2][2][32][6];
};

struct Block {
  uint8_t* memory;
  Meeting barrier[2];
};

struct Fiber {
  Context context;
  Dim thread, block_index;
  const void* const* arguments;
  Block* block;
  Warp* warp;
  bool done = false;
  std::vector<char> stack;
};

struct Barrier {  // an mbarrier
  int32_t bytes;
  int8_t pending, count;
  uint8_t phase, unused;
};

struct Copy {
  uint8_t* memory;
  uint32_t to;
  const void* from;
  uint32_t bytes, barrier;
};

struct Word {
  uint64_t* to;
  uint64_t value;
};

static Fiber* current;
static Context scheduler;
static std::vector<Copy> copies;
static std::vector<Word> words;

inline void yield() { change(current->context, scheduler); }

inline unsigned meet(Meeting& meeting, int threads) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == threads) meeting.arrived = 0, meeting.generation++;
  else
    while (meeting.generation == generation) yield();
  return generation;
}

// What the lanes of this warp give, up to six numbers each.
inline auto& exchange(const uint32_t* numbers, int count, int lanes = 32) {
  Warp& warp = *current->warp;
  const int which = lanes < 32;
  auto& given = warp.given[which][warp.meeting[which].generation % 2];
  memcpy(given[current->thread.x % 32], numbers, count * 4);
  meet(warp.meeting[which], lanes);
  return given;
}

inline void advance(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count;
  if (barrier.pending < 0) abort();
}

inline void enter() {
  const void* const* a = current->arguments;
  decode_step((const Layer*)a[0], (const Model*)a[1], (const int64_t*)a[2], (const int64_t*)a[3], (const int64_t*)a[4], (const int*)a[5], (float*)a[6]);
  current->done = true;
  yield();
}

// A third of what is under way stays so.
inline void deliver() {
  std::vector<Copy> later;
  for (const Copy& copy : copies) {
    if (rand() % 3 == 0) {
      later.push_back(copy);
      continue;
    }
    memcpy(copy.memory + copy.to, copy.from, copy.bytes);
    Barrier& barrier = *(Barrier*)(copy.memory + copy.barrier);
    barrier.bytes -= copy.bytes;
    advance(barrier);
  }
  copies.swap(later);
  std::vector<Word> unsent;
  for (const Word& word : words) {
    if (rand() % 3 == 0) unsent.push_back(word);
    else *word.to = word.value;
  }
  words.swap(unsent);
}

// One launch on each of the first `ranks` ranks, at the same time. 0: all threads came to their end.
extern "C" int emulate(const Arguments* arguments, int ranks) {
  std::vector<Block> blocks(ranks * GRID);
  std::vector<Warp> warps(ranks * GRID * (THREADS / 32));
  std::vector<Fiber> fibers(ranks * GRID * THREADS);
  for (Block& block : blocks) {
    block.memory = (uint8_t*)aligned_alloc(1024, (SHARED_BYTES + 1023) / 1024 * 1024);
    memset(block.memory, 0xff, SHARED_BYTES);
  }
  for (size_t i = 0; i < fibers.size(); i++) {
    Fiber& fiber = fibers[i];
    const size_t block = i / THREADS;
    fiber.thread.x = i % THREADS, fiber.block_index.x = block % GRID;
    fiber.arguments = arguments[block / GRID];
    fiber.block = &blocks[block], fiber.warp = &warps[i / 32];
    fiber.stack.resize(kStackBytes);
    prepare(fiber.context, fiber.stack.data(), enter);
  }
  size_t left = fibers.size();
  int late = 0;  // a rank that stands still for a while, when there are others
  for (int sweep = 0; left > 0 && sweep < kSweeps; sweep++) {
    if (sweep % kPause == 0) late = rand() % (2 * ranks);
    for (Fiber& fiber : fibers) {
      if (fiber.done || (ranks > 1 && fiber.arguments == arguments[late % ranks] && late < ranks)) continue;
      current = &fiber;
      change(scheduler, fiber.context);
      left -= fiber.done;
    }
    deliver();
  }
  const bool lost = !copies.empty();
  copies.clear();
  while (!words.empty()) deliver();
  for (Block& block : blocks) free(block.memory);
  return left > 0 ? 1 : lost ? 2 : 0;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block_index)
#define dynamic_shared (emulation::current->block->memory)

// ---------------------------------------------------------------- what CUDA has without assembly

inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
template <class T>
inline T __shfl_xor_sync(unsigned lanes, T value, int offset) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  auto& given = emulation::exchange(&bits, 1, __builtin_popcount(lanes));
  memcpy(&value, &given[(threadIdx.x % 32) ^ offset][0], 4);
  return value;
}
template <class T>
inline T __shfl_sync(unsigned, T value, int from) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  auto& given = emulation::exchange(&bits, 1);
  memcpy(&value, &given[from % 32][0], 4);
  return value;
}
inline void __syncwarp() {
  const uint32_t nothing = 0;
  emulation::exchange(&nothing, 1);
}
inline void __syncthreads() { emulation::meet(emulation::current->block->barrier[0], THREADS); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline int atomicMax(int* p, int value) {
  const int before = *p;
  *p = max(before, value);
  return before;
}
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) {
  const uint32_t before = *p;
  *p += value;
  return before;
}

// ---------------------------------------------------------------- primitives.cuh

inline uint32_t shared_address(const void* p) { return (uint32_t)((const uint8_t*)p - dynamic_shared); }
inline emulation::Barrier& barrier_at(uint32_t address) { return *(emulation::Barrier*)(dynamic_shared + address); }
inline void mbarrier_init(uint32_t bar, uint32_t count) { barrier_at(bar) = {0, (int8_t)count, (int8_t)count, 0, 0}; }
inline void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  barrier_at(bar).bytes += bytes;
  barrier_at(bar).pending--;
  emulation::advance(barrier_at(bar));
}
inline void mbarrier_arrive(uint32_t bar) {
  barrier_at(bar).pending--;
  emulation::advance(barrier_at(bar));
}
inline bool mbarrier_done(uint32_t bar, uint32_t parity) { return barrier_at(bar).phase != parity; }
inline void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_done(bar, parity)) emulation::yield();
}
inline void fence_mbarrier_init() {}
inline uint64_t evict_first_policy() { return 0; }
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, uint64_t) {
  if ((uintptr_t)from % 16 || bytes % 16 || to % 16 || bytes == 0) abort();
  emulation::copies.push_back({dynamic_shared, to, from, bytes, bar});
}
inline void bulk_prefetch_l2(const void* from, uint32_t bytes) {
  if ((uintptr_t)from % 16 || bytes % 16) abort();
}
inline void prefetch_l2(const void*) {}
template <int COUNT>
inline void fewer_registers() {}
template <int COUNT>
inline void more_registers() {}
template <int BARRIER, int COUNT>
inline void named_barrier() { emulation::meet(emulation::current->block->barrier[BARRIER], COUNT); }
inline uint4 load_shared_state16(const void* p) { return *(const uint4*)p; }
inline uint2 load_shared_state8(const void* p) { return *(const uint2*)p; }
inline float load_shared_state(const float* p) { return *p; }
inline uint16_t load_shared_state(const uint16_t* p) { return *p; }
inline uint64_t load_word(const uint64_t* p) {
  emulation::yield();
  return *p;
}
inline void store_word(uint64_t* p, uint64_t value) { emulation::words.push_back({p, value}); }
inline int add_and_get(int* counter) { return ++*counter; }
inline void add_release(uint32_t* counter) { ++*counter; }
inline uint32_t load_acquire(const uint32_t* counter) {
  emulation::yield();
  return *counter;
}

// ---------------------------------------------------------------- numbers, products

inline uint32_t bf16_of(float f) {
  const uint32_t bits = __float_as_uint(f);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t bf16_pair(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline float f16_value(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float v = exponent == 0 ? ldexpf(fraction, -24) : ldexpf(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -v : v;
}
inline uint32_t f16_of(float f) {  // to nearest even; numbers in reach only
  int exponent;
  frexpf(f, &exponent);
  exponent = f == 0 ? -13 : max(exponent, -13);
  const int fraction = (int)lrintf(ldexpf(fabsf(f), 11 - exponent));
  return (f < 0 ? 0x8000 : 0) | (uint32_t)((exponent + 13) * 1024 + fraction);
}
inline float2 f16_values(uint32_t pair) { return {f16_value(pair & 0xffff), f16_value(pair >> 16)}; }
inline uint32_t f16_pair(float low, float high) { return f16_of(low) | f16_of(high) << 16; }
inline float e4m3_value(uint32_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float v = exponent == 0 ? ldexpf(fraction, -9) : ldexpf(8 + fraction, exponent - 10);
  return bits & 128 ? -v : v;
}
inline uint32_t e4m3_of(float f) {
  const float magnitude = std::min(fabsf(f), 448.f);
  int exponent;
  frexpf(magnitude, &exponent);
  exponent = magnitude == 0 ? -5 : max(exponent, -5);
  const int fraction = (int)lrintf(ldexpf(magnitude, 4 - exponent));
  return (f < 0 ? 128 : 0) | (uint32_t)((exponent + 5) * 8 + fraction);
}
inline uint32_t e4m3_quad(float a, float b, float c, float d) { return e4m3_of(a) | e4m3_of(b) << 8 | e4m3_of(c) << 16 | e4m3_of(d) << 24; }
inline void widen(uint32_t word, uint32_t& first, uint32_t& second) {
  first = f16_pair(e4m3_value(word & 255), e4m3_value(word >> 8 & 255));
  second = f16_pair(e4m3_value(word >> 16 & 255), e4m3_value(word >> 24));
}

// Rows of a and columns of b stand where the tensor cores have them: row and column lane / 4, four lanes for the inner dimension.
template <class T, class F>
inline void multiply_tiles(T (&c)[4], const uint32_t (&given)[6], F dot) {
  auto& all = emulation::exchange(given, 6);
  const int lane = threadIdx.x % 32;
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 2; i++)
      for (int q = 0; q < 4; q++)
        for (int k = 0; k < 2; k++) c[half * 2 + i] += dot(all[lane / 4 * 4 + q][k * 2 + half], all[(lane % 4 * 2 + i) * 4 + q][4 + k]);
}
inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_tiles(c, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    const float2 x = f16_values(a), y = f16_values(b);
    return x.x * y.x + x.y * y.y;
  });
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_tiles(c, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) + __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
  });
}
inline void mma_integer(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_tiles(c, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    int sum = 0;
    for (int i = 0; i < 4; i++) sum += (int)(uint8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
    return sum;
  });
}
inline long clock() { return 0; }
