// From the running softmax of each warp to a block's result, and from those of several blocks to a sequence's. Blocks that share
// a sequence write theirs to memory; the one that comes last merges them, in the order of the tokens (Dao et al., Flash-Decoding,
// 2023), whichever it is.

constexpr int kOutRow = HEAD_DIM + 4;

struct Scratch {  // shared memory
  uint16_t queries[kOctets * 8][kQueryRow];
  uint8_t new_k[kRowBytes], new_v[kRowBytes];  // as the cache has them
  float highest[WARPS][kOctets * 8], sum[WARPS][kOctets * 8];
  float out[WARPS][kGroup][kOutRow];
  int last;
};

struct Work {  // of a block; as the host's plan has it
  int row;     // of the step; -1: none
  int begin, end, length, first;  // tokens: begin, end, first as in Span; length of the sequence, the newest one counted
  int chunk, chunks;                      // blocks' shares of the sequence, for each K/V head
  int place;                              // of the row's first chunk's results
};

struct Results {
  uint16_t* out;      // [rows][HEADS][HEAD_DIM]
  float* partial;     // [items * KV_HEADS][kGroup][HEAD_DIM]
  float* statistics;  // [items * KV_HEADS][kGroup][2]: maximum, sum
  int* arrived;       // [rows][KV_HEADS], zero between launches
  float factor;       // of V
};

__device__ __forceinline__ void store_warp(Scratch& s, Softmax& softmax) {
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
  for (int o = 0; o < kOctets; o++) {
    float sum = softmax.sum[o];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quarter == 0) s.highest[warp][o * 8 + group] = softmax.highest[o], s.sum[warp][o * 8 + group] = sum;
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const int head = o * 8 + quarter * 2 + column;
      if (head >= kGroup) continue;
#pragma unroll
      for (int set = 0; set < kSets; set++)
#pragma unroll
        for (int e = 0; e < kNumbers; e += 4) {
          const int i = set * (kNumbers / 2) + e / 2;
          *(float4*)(s.out[warp][head] + Values::element(set) + e) = make_float4(
              softmax.out[o][i][column], softmax.out[o][i][column + 2], softmax.out[o][i + 1][column], softmax.out[o][i + 1][column + 2]);
        }
    }
  }
}

__device__ __forceinline__ void add_scaled(float4& to, float4 x, float factor) {
  to.x += x.x * factor, to.y += x.y * factor, to.z += x.z * factor, to.w += x.w * factor;
}

__device__ __forceinline__ void write_out(const Results& results, int row, int head, int d, float4 x, float factor) {
  uint2 words;
  words.x = rounded(x.x * factor, x.y * factor), words.y = rounded(x.z * factor, x.w * factor);
  *(uint2*)(results.out + ((int64_t)row * HEADS + head) * HEAD_DIM + d) = words;
}

// Four numbers of a head, from the softmax of the first `warps` warps in scratch, or of what stands in their place.
struct Combined {
  float highest = kNoScore, sum = 0.f;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);

  // What stands beyond the last warp's may be anything. Loads do not wait for each other.
  __device__ __forceinline__ Combined(const Scratch& s, int warps, int g, int d) {
    float weight[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      weight[w] = w < warps ? s.highest[w][g] : kNoScore;
      highest = fmaxf(highest, weight[w]);
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      weight[w] = w < warps ? exp2f(weight[w] - highest) : 0.f;
      sum += weight[w] * (w < warps ? s.sum[w][g] : 0.f);
      add_scaled(total, w < warps ? *(const float4*)(s.out[w][g] + d) : make_float4(0.f, 0.f, 0.f, 0.f), weight[w]);
    }
  }
};

constexpr int kTasks = kGroup * HEAD_DIM / 4;  // four numbers of a head each
constexpr int kShares = kThreads >= 2 * kTasks ? kThreads / kTasks : 1;

// What the row's blocks for this K/V head found, after a barrier of the last block: each share of the threads takes as many blocks,
// and leaves in scratch what a warp would.
__device__ inline void gather_chunks(Scratch& s, const Work& work, int kv_head, const Results& results) {
  constexpr int kBatch = 12;  // loads in flight
  const int each = (work.chunks + kShares - 1) / kShares;
  for (int task = threadIdx.x; task < kTasks * kShares; task += kThreads) {
    const int share = task / kTasks, g = task % kTasks / (HEAD_DIM / 4), d = task % (HEAD_DIM / 4) * 4;
    const int end = min((share + 1) * each, work.chunks);
    const int64_t first = (int64_t)work.place * KV_HEADS + kv_head;
    float highest = kNoScore, sum = 0.f;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int begin = share * each; begin < end; begin += kBatch) {
      uint2 statistic[kBatch];
      uint4 part[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int64_t at = (first + (int64_t)min(begin + i, end - 1) * KV_HEADS) * kGroup + g;
        statistic[i] = load_shared_state8(results.statistics + at * 2);
        part[i] = load_shared_state16(results.partial + at * HEAD_DIM + d);
      }
      float seen = highest;
#pragma unroll
      for (int i = 0; i < kBatch; i++) seen = fmaxf(seen, __uint_as_float(statistic[i].x));
      const float keep = exp2f(highest - seen);
      highest = seen;
      sum *= keep;
      total.x *= keep, total.y *= keep, total.z *= keep, total.w *= keep;
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const float weight = begin + i < end ? exp2f(__uint_as_float(statistic[i].x) - highest) : 0.f;
        sum += weight * __uint_as_float(statistic[i].y);
        add_scaled(total, make_float4(__uint_as_float(part[i].x), __uint_as_float(part[i].y), __uint_as_float(part[i].z), __uint_as_float(part[i].w)),
                   weight);
      }
    }
    *(float4*)(s.out[share][g] + d) = total;
    if (d == 0) s.highest[share][g] = highest, s.sum[share][g] = sum;
  }
}

// From the softmax of the first `warps` warps in scratch, after a barrier, to the output. All threads.
__device__ inline void finish(Scratch& s, const Work& work, int kv_head, int warps, const Results& results) {
  if (work.chunks > 1) {
    for (int task = threadIdx.x; task < kTasks; task += kThreads) {
      const int g = task / (HEAD_DIM / 4), d = task % (HEAD_DIM / 4) * 4;
      const Combined found(s, warps, g, d);
      const int64_t at = ((int64_t)(work.place + work.chunk) * KV_HEADS + kv_head) * kGroup + g;
      *(float4*)(results.partial + at * HEAD_DIM + d) = found.total;
      if (d == 0) results.statistics[at * 2] = found.highest, results.statistics[at * 2 + 1] = found.sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrived = results.arrived + work.row * KV_HEADS + kv_head;
      s.last = add_and_get(arrived) == work.chunks;
      if (s.last) *arrived = 0;
    }
    __syncthreads();
    if (!s.last) return;
    gather_chunks(s, work, kv_head, results);
    __syncthreads();
    warps = min(kShares, work.chunks);
  }
  for (int task = threadIdx.x; task < kTasks; task += kThreads) {
    const int g = task / (HEAD_DIM / 4), d = task % (HEAD_DIM / 4) * 4;
    const Combined found(s, warps, g, d);
    const float factor = warps == 0 ? 0.f : results.factor / found.sum;  // a row of padding: zeros
    write_out(results, work.row, kv_head * kGroup + g, d, found.total, factor);
  }
}
