// Sums of ranks: each GPU has a share of the inner dimension of the output and down products, and the sums of all of them are
// added up here, one GPU a rank, by writing into each other's memory (NVLink). With one rank nothing of this is there.
//
// A *word* is a pair of a product's sums, rounded to bf16, and the epoch, the number of the all-reduce since the kernel was
// made: eight bytes that are written and read at once (a naturally aligned 64-bit access is single-copy atomic). So data need
// no flag behind them, no fence and no round trip: a rank writes its words into the inbox of every rank, itself included, as
// its tiles become ready, and whoever needs them reads until the epoch is there. (NCCL's LL protocol does the same.) All ranks
// add the same bf16 numbers up in float32, in the order of ranks, and round once to bf16, as kernels/all_reduce.py does: they
// get the same bits.
//
// Inbox: [epoch % 2][writer][row][pair of columns]. What a block reads is what it writes itself: a tile belongs to the same
// block for both products, on every rank. So two halves are enough, for any column and any two ranks A and B: A's block writes
// the word of epoch e + 2 over that of e in B's inbox only after it has read B's word of e + 1; B's block has written that only
// after it had read A's word of e, with a barrier of the block between reading and writing on either rank. Where epochs wrap
// around, the word that is overwritten is that of two epochs before all the same: kernels for different numbers of rows have
// inboxes and epochs of their own, so every word of an inbox is written every second time.
//
// What the grid then needs is its own barrier only: each block puts the residual stream of its tiles into local memory, as
// with one rank. A rank waits for all ranks in every sum, so none runs ahead by more than a product.

constexpr int kInboxRow = HIDDEN / 2;  // words
constexpr int kLooksPerCheck = 256;    // at words that are not there, between looks at whether to give up

__device__ __forceinline__ uint64_t* inbox(int reader, int writer, int row, int column) {
  const Shared& s = shared();
  return s.model.inbox[reader] + (((s.epoch & 1) * RANKS + writer) * ROWS + row) * kInboxRow + column / 2;
}

// By threads side by side, each with the number of one column of a row; `lanes`: those of the warp that are here.
__device__ __forceinline__ void tell_ranks(unsigned lanes, int row, int column, float v) {
  const Shared& s = shared();
  const float other = __shfl_xor_sync(lanes, v, 1);
  const int odd = column % 2, rank = (int)s.model.rank;
  const uint64_t word = (uint64_t)s.epoch << 32 | (odd ? bf16_pair(other, v) : bf16_pair(v, other));
  // A thread of the pair tells every second rank, and each rank begins with itself, so that not all write to the same one.
#pragma unroll
  for (int i = 0; i < RANKS; i += 2) store_word(inbox((rank + i + odd) % RANKS, rank, row, column), word);
}

// What the ranks told, added up. Gives up with rubbish once the host says that ranks are gone.
__device__ __forceinline__ float sum_of_ranks(int row, int column) {
  const Shared& s = shared();
  const uint32_t epoch = s.epoch;
  const uint64_t* from = inbox((int)s.model.rank, 0, row, column);
  uint64_t word[RANKS];
  bool there;
  int looks = 0;
  do {
    there = true;
#pragma unroll
    for (int r = 0; r < RANKS; r++) word[r] = load_word(from + r * (ROWS * kInboxRow));
#pragma unroll
    for (int r = 0; r < RANKS; r++) there = there && (uint32_t)(word[r] >> 32) == epoch;
    if (++looks % kLooksPerCheck == 0 && load_word(s.model.abandoned) != 0) break;
  } while (!there);
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < RANKS; r++) sum += column % 2 ? bf16_high((uint32_t)word[r]) : bf16_low((uint32_t)word[r]);
  return sum;
}
