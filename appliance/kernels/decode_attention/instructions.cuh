// What decode attention needs of the GPU beside persistent/primitives.cuh and dependent_launch.cuh, in assembly. tests/decode_attention_emulation.h is the
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
