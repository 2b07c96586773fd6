// Clusters of SPLIT blocks, as functions: compute capability 9.0. tests/int4_emulation.h has the same functions for a CPU.

// Attribute of a kernel whose clusters have SPLIT blocks.
#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; what they wrote is seen by the others then.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// From the shared memory of block `rank` of the cluster; `from` is the address there, as every block counts its own.
__device__ __forceinline__ float4 load_cluster16(uint32_t from, uint32_t rank) {
  float4 v;
  asm volatile(
      "{.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(from), "r"(rank)
      : "memory");
  return v;
}
