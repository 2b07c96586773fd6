// Shares of the inner dimension of a tile, added up in their order within a cluster, and results written. ROWS by COLUMNS_ sums are
// a tile; PROBLEM has m, n, bias and out. Plain C++ over primitives.cuh and cluster.cuh: tests include it too.

// Where the sum of a row of the weight and a row of x (column) is left: the sums that a warp leaves at once, 8 rows of 4 other
// columns, lie in different banks.
template <int ROWS>
constexpr int kSumStride = ROWS + 4;
template <int ROWS>
__device__ __forceinline__ uint32_t sum_place(int row, int column) {
  return shared_base() + (column * kSumStride<ROWS> + row) * 4;
}

template <class PROBLEM>
__device__ __forceinline__ void write4(const PROBLEM& p, int column, int row, float4 v) {
  const int count = p.n - row < 4 ? p.n - row : 4;
  float4 bias{0.f, 0.f, 0.f, 0.f};
  if (p.bias != nullptr) {
    bias.x = value(p.bias[row]);
    if (count > 1) bias.y = value(p.bias[row + 1]);
    if (count > 2) bias.z = value(p.bias[row + 2]);
    if (count > 3) bias.w = value(p.bias[row + 3]);
  }
  const uint32_t low = both(v.x + bias.x, v.y + bias.y), high = both(v.z + bias.z, v.w + bias.w);
  uint16_t* to = p.out + (int64_t)column * p.n + row;
  if (p.n % 4 == 0) {
    *(uint2*)to = uint2{low, high};
  } else {
    to[0] = (uint16_t)low;
    if (count > 1) to[1] = (uint16_t)(low >> 16);
    if (count > 2) to[2] = (uint16_t)high;
    if (count > 3) to[3] = (uint16_t)(high >> 16);
  }
}

// The sums of a tile, of which every block of the cluster has left its share (all of its threads have), are added up and
// written: by each block for its part of the tile's rows.
template <int ROWS, int COLUMNS_, int THREADS, class PROBLEM>
__device__ __forceinline__ void add_shares(const PROBLEM& p, int first_row, int first_column, int rank) {
  if (SPLIT == 1) __syncthreads();
  else cluster_barrier();
  constexpr int kFours = ROWS / 4;
  const int first = kFours * rank / SPLIT, fours = kFours * (rank + 1) / SPLIT - first;
  const int columns = p.m - first_column < COLUMNS_ ? p.m - first_column : COLUMNS_;
  for (int i = threadIdx.x; i < columns * fours; i += THREADS) {
    const int column = i / fours, row = (first + i % fours) * 4;
    if (first_row + row >= p.n) continue;
    const uint32_t at = sum_place<ROWS>(row, column);
    float4 part[SPLIT];
#pragma unroll
    for (int share = 0; share < SPLIT; share++) part[share] = SPLIT == 1 ? load_floats16(at) : load_cluster16(at, share);
    float4 total = part[0];
#pragma unroll
    for (int share = 1; share < SPLIT; share++)
      total.x += part[share].x, total.y += part[share].y, total.z += part[share].z, total.w += part[share].w;
    write4(p, first_column + column, first_row + row, total);
  }
  if (SPLIT > 1) cluster_barrier();  // a block's shared memory stays as long as others read it
}
