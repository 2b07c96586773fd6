// What the links alone take: every rank moves `count` chunks of 16 bytes to (push, bulk) or from (pull) every other rank,
// and nobody waits for anybody. tests/perf/sum_norm.py times it.

using uint8_t = unsigned char;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int64_t = long long;

constexpr int kBulk = BULK_BYTES;
__shared__ __align__(128) uint8_t buffer[kBulk];

// Where every rank's memory is, and this one's; the kernel in front has ended then.
__device__ __forceinline__ uint64_t places(const uint64_t* addresses, int64_t rank, uint64_t (&at)[RANKS]) {
  for (int r = 0; r < RANKS; r++) at[r] = addresses[r];
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
  uint64_t own = at[0];
#pragma unroll
  for (int r = 1; r < RANKS; r++) own = r == rank ? at[r] : own;
  return own;
}

// Local memory -> registers -> the same place in every peer's.
extern "C" __global__ void push(const uint64_t* addresses, int64_t rank, int64_t offset, int64_t count) {
  uint64_t at[RANKS];
  const uint64_t own = places(addresses, rank, at);
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    uint4 v[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (r != rank) v[r] = *(const uint4*)(own + (r * count + i) * 16);
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (r != rank)
        asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at[r] + offset + (rank * count + i) * 16), "r"(v[r].x), "r"(v[r].y),
                     "r"(v[r].z), "r"(v[r].w)
                     : "memory");
  }
}

// Every peer's memory -> registers -> local memory.
extern "C" __global__ void pull(const uint64_t* addresses, int64_t rank, int64_t offset, int64_t count) {
  uint64_t at[RANKS];
  const uint64_t own = places(addresses, rank, at);
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    uint4 v[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (r != rank)
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[r].x), "=r"(v[r].y), "=r"(v[r].z), "=r"(v[r].w)
                     : "l"(at[r] + (rank * count + i) * 16)
                     : "memory");
#pragma unroll
    for (int r = 0; r < RANKS; r++)
      if (r != rank) *(uint4*)(own + offset + (r * count + i) * 16) = v[r];
  }
}

// Shared memory -> peers' memory by bulk copies, and until they have arrived.
extern "C" __global__ void bulk(const uint64_t* addresses, int64_t rank, int64_t offset, int64_t count) {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(buffer);
  const int64_t chunks = count * 16 / kBulk;
  if (threadIdx.x == 0) {
    for (int64_t i = blockIdx.x; i < chunks * RANKS; i += gridDim.x) {
      const int r = (int)((i + rank) % RANKS);
      if (r == rank) continue;
      const uint64_t to = addresses[r] + offset + (rank * chunks + i / RANKS) * kBulk;
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(kBulk) : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
  }
}
