// Products of a warpgroup, as functions: sm_90a only. tests/int4_emulation.h has the same functions for a CPU.

// What this thread wrote to shared memory, copies that it waited for among it, may be read by the tensor cores (their reads
// go another way than a thread's); a barrier of all who wrote has to follow.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that were written are seen by the products that follow.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING committed groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of `sum` to the other side.
__device__ __forceinline__ void hold(float (&sum)[COLUMNS / 2]) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

// Describes a right operand [COLUMNS, 16] at `at` in shared memory, inner positions consecutive: rows of 128 bytes, whose
// 16-byte pieces changed places (the piece's number xor the row's, modulo 8), groups of 8 rows aligned to 1024 bytes. PTX
// manual, "Matrix Descriptor Format" of wgmma.
__device__ __forceinline__ uint64_t describe(uint32_t at) {
  return (uint64_t)((at & 0x3ffff) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#if BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
           "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define PRODUCT(n, names, sums, a0, a1, a2, a3, b)                                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16." KIND " {" names "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b         \
               ", 1, 1, 1, 0;"                                                                                                           \
               : sums                                                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(described))

// sum [64 rows of a, COLUMNS of b] += a [64, 16] * b [16, COLUMNS], begun: until it is waited for, `a`, `sum` and b must stay.
// Fragments as of mma.sync, 16 rows of a warp: PTX manual, "Register Fragments for wgmma.mma_async.m64nNk16".
__device__ __forceinline__ void begin_product(float (&sum)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t described) {
#if COLUMNS == 8
  PRODUCT(8, NAMES_4, SUMS_4(0), 4, 5, 6, 7, 8);
#elif COLUMNS == 16
  PRODUCT(16, NAMES_8, SUMS_8(0), 8, 9, 10, 11, 12);
#elif COLUMNS == 32
  PRODUCT(32, NAMES_16, SUMS_16(0), 16, 17, 18, 19, 20);
#elif COLUMNS == 64
  PRODUCT(64, NAMES_32, SUMS_32(0), 32, 33, 34, 35, 36);
#elif COLUMNS == 128
  PRODUCT(128, NAMES_64, SUMS_64(0), 64, 65, 66, 67, 68);
#else
#error "COLUMNS: 8, 16, 32, 64 or 128"
#endif
}
