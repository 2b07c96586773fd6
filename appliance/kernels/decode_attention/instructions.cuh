// What decode attention needs of the GPU beside persistent/primitives.cuh, in assembly. tests/decode_attention_emulation.h is the
// same for a CPU. Knows nothing of attention.

// Bytes of the cache, zeros unless `there`. They are read once: not by way of L1.
__device__ __forceinline__ void load_if(bool there, const void* p, uint32_t (&w)[4]) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.b32 there, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@there ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(w[0]), "=&r"(w[1]), "=&r"(w[2]), "=&r"(w[3])
      : "l"(p), "r"((int)there)
      : "memory");
}

__device__ __forceinline__ void load_if(bool there, const void* p, uint32_t (&w)[2]) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.b32 there, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@there ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(w[0]), "=&r"(w[1])
      : "l"(p), "r"((int)there)
      : "memory");
}

// The kernel in front has ended, and what it wrote is visible. The next one may be set up.
__device__ __forceinline__ void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
