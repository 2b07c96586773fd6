// out = (value - zero point) * scale of packed 4-bit weights, in 16 bits: exact but for the rounding to BF16 (else float16).
//
// Words lie one after the other, group after group and row after row, and so do their groups' scales and the results: there is
// one index. A thread makes 16 bytes of a word, so a warp reads a line and writes four. GROUP: inner positions of a scale.

constexpr int kThreads = 256;
constexpr int kWords = 4;  // of a thread, their reads under way together
constexpr int kGroupWords = GROUP / 8;

// Nibble `place` of a word as a float, plus 2^23: in the last bits of the mantissa.
__device__ __forceinline__ float raised(uint32_t word, int place) {
  return __uint_as_float(and_or(word >> 4 * place, 0xf, 0x4b000000));
}

extern "C" __global__ void __launch_bounds__(kThreads)
int4_dequantize(const uint32_t* weight, const uint32_t* scale_zero, uint4* out, int64_t words) {
  const uint32_t first = (uint32_t)blockIdx.x * (kThreads * kWords) + threadIdx.x;
  uint32_t word[kWords], pair[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    const uint32_t at = first + i * kThreads;
    if (at < words) word[i] = weight[at], pair[i] = scale_zero[at / kGroupWords];
  }
  wait_for_kernel_in_front();  // it may still read what `out` was before
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    const uint32_t at = first + i * kThreads;
    if (at >= words) continue;
    const float scale = half_value((uint16_t)pair[i]), zero = 8388608.f + half_value((uint16_t)(pair[i] >> 16));
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; j++)  // positions 2 j and 2 j + 1 are nibbles j and j + 4
      v[j] = both((raised(word[i], j) - zero) * scale, (raised(word[i], j + 4) - zero) * scale);
    out[at] = uint4{v[0], v[1], v[2], v[3]};
  }
}
