// What the kernel asks of the machine, as functions: instructions of compute capability 8.0 and newer. Without headers, as
// NVRTC compiles it. tests/int4_emulation.h has the same functions for a CPU.

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

extern __shared__ __align__(1024) uint8_t shared_memory[];

// ---------------------------------------------------------------- copies into shared memory

// Weights are read once: they should not push activations and KV cache out of L2.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Shared memory goes by its own 32-bit addresses.
__device__ __forceinline__ uint32_t shared_base() { return (uint32_t)__cvta_generic_to_shared(shared_memory); }

// 16 bytes past L1, or zeros in their place; `from` is not read then.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy16_once(uint32_t to, const void* from, bool there, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(there ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy4(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---------------------------------------------------------------- other memory

__device__ __forceinline__ uint32_t load_shared4(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

__device__ __forceinline__ uint2 load_shared8(uint32_t from) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
  return v;
}

__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

__device__ __forceinline__ void store_shared16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_shared4(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}

__device__ __forceinline__ float4 load_floats16(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load16(const void* from) { return *(const uint4*)from; }

// Past L1: what other blocks wrote during this launch.
__device__ __forceinline__ float4 load_others(const float4* from) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}

// One more arrival, counted from 0: releases what this thread has seen written, acquires what the others released.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---------------------------------------------------------------- numbers

// (word & mask) | bits, one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

// Two 16-bit floats at a time: a * b + c, rounded once.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
#endif
  return out;
}

// Two at a time: a * b, rounded once.
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) { return multiply_add(a, b, 0x80008000); }

__device__ __forceinline__ float half_value(uint16_t bits) {
  float v;
  asm("{.reg .f16 h;\nmov.b16 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(v) : "h"(bits));
  return v;
}

// A float, rounded to nearest even, as 16 bits of the activations' type; in both halves of a word.
__device__ __forceinline__ uint32_t twice(float v) {
  uint32_t out;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(out) : "f"(v));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(out) : "f"(v));
#endif
  return out;
}

// Two floats, each rounded to 16 bits.
__device__ __forceinline__ uint32_t both(float low, float high) {
  uint32_t out;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
  return out;
}

// The value of 16 bits of the activations' type.
__device__ __forceinline__ float value(uint16_t bits) {
#if BF16
  return __uint_as_float((uint32_t)bits << 16);
#else
  return half_value(bits);
#endif
}

// sum [16 rows of a, 8 columns of b] += a [16, 16] * b [16, 8].
__device__ __forceinline__ void tensor_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
