// The decode attention kernel on a CPU: what persistent_emulation.h has, and the functions of
// appliance/kernels/decode_attention/instructions.cuh. Comes in front of the kernel's other files.

#include "persistent_emulation.h"

template <int N>
inline void load_if(bool there, const void* p, uint32_t (&w)[N]) {
  for (int i = 0; i < N; i++) w[i] = there ? ((const uint32_t*)p)[i] : 0;
}
inline void wait_for_kernel_in_front() {}
inline void let_next_kernel_start() {}

extern "C" void decode_attention(const void*, const float*, const float*, const uint16_t*, const float*, uint8_t*, const int*, const int64_t*, const int*,
                                 uint16_t*, float*, float*, int*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const uint16_t*, const uint16_t*, int64_t);

// What the emulation runs: its first argument is all of this kernel's.
inline void decode_step(const Layer* all, const Model*, const int64_t*, const int64_t*, const int64_t*, const int*, float*) {
  const int64_t* a = (const int64_t*)all;
  decode_attention((const void*)a[0], (const float*)a[1], (const float*)a[2], (const uint16_t*)a[3], (const float*)a[4], (uint8_t*)a[5],
                   (const int*)a[6], (const int64_t*)a[7], (const int*)a[8], (uint16_t*)a[9], (float*)a[10], (float*)a[11], (int*)a[12], a[13],
                   a[14], a[15], a[16], a[17], a[18], a[19], (const uint16_t*)a[20], (const uint16_t*)a[21], a[22]);
}
