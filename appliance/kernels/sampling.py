"""Choosing tokens from logits: argmax, counter-based noise, the draw, thresholds of top-k / top-p / min-p, log
probabilities.

Knows tensors only; which row wants what is `runtime/sampler.py`'s business. Nothing here waits for the device.

A draw is the Gumbel-max trick (Gumbel, 1954; Maddison et al., "A* sampling", 2014): argmax of logit / T - log(E) with
E exponential noise from a hash of (seed, position, token). A row's sample therefore depends on its own logits and
these numbers only, not on its neighbours in the batch, and the CPU and GPU paths draw the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.deferred_scale import Product, apply_scales, as_float
from appliance.kernels.dependent_launch import launch_options

GREEDY_TEMPERATURE = 1e-5  # below it a row takes its most likely token (types.SamplingParams.greedy)
_BLOCK = 2048  # logits of a row that one program of the draw or of the argmax looks at

# ---------------------------------------------------------------- noise


def _signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - 2**32 if word >= 2**31 else word


def _mix(h: Tensor) -> Tensor:
    """Finalizer of MurmurHash3 (Appleby, 2011) on 32-bit words, in place: a bijection with full avalanche. int32,
    whose products wrap: vectorized on every CPU, unlike 64-bit ones."""
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(0x85EBCA6B)
    h ^= (h >> 13) & 0x7FFFF
    h *= _signed(0xC2B2AE35)
    h ^= (h >> 16) & 0xFFFF
    return h


def exponential_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard exponential noise, float32 [m, n], of seeds int32 [m, 2] (low and high word), positions int64 [m] and
    token ids int64 [n]. Between 2^-33 and about 16.6, 32 bits fine at the small end, which is where a draw is decided.
    """
    low, high = seeds.unbind(1)
    key = _mix(_mix(_mix(low ^ _signed(0x9E3779B9)) ^ high) ^ positions.int())
    second = _mix(key ^ 0x6A09E667)
    bits = _mix((tokens.int() * _signed(0x9E3779B9))[None, :] + key[:, None])
    bits = _mix(bits.bitwise_xor_(second[:, None]))
    # In float32: 1 - 2^-24 is the largest value under 1.
    u = (bits.long() & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    # -log(1 - u); by its series where 1 - u would lose the low bits of u.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * (0.25 + u * 0.2))))
    return torch.where(u < 2.0**-6, series, (1.0 - u).log_().neg_())


@triton.jit
def _mix32(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_keys(seeds_ptr, positions_ptr, row, seeds_stride):
    """The two hash keys of a row's noise."""
    low = tl.load(seeds_ptr + row * seeds_stride).to(tl.uint32, bitcast=True)
    high = tl.load(seeds_ptr + row * seeds_stride + 1).to(tl.uint32, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.uint32)
    key = _mix32(_mix32(_mix32(low ^ 0x9E3779B9) ^ high) ^ position)
    return key, _mix32(key ^ 0x6A09E667)


@triton.jit
def log_noise(token, key, second):
    """log of `exponential_noise` of token ids."""
    bits = _mix32(_mix32(token.to(tl.uint32) * 0x9E3779B9 + key) ^ second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * 0.2))))
    return tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def load_logits(row_ptr, token, vocab_size):
    """Logits of token ids, float32; -inf outside the vocabulary and for NaN."""
    logit = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(logit == logit, logit, float("-inf"))


@triton.jit
def _store_best(score, row, block, first_token, best_score_ptr, best_token_ptr, BLOCK: tl.constexpr):
    """The largest of BLOCK scores and the token it belongs to (the lowest of equals)."""
    best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    place = row * tl.num_programs(1) + block
    tl.store(best_score_ptr + place, best)
    tl.store(best_token_ptr + place, (first_token + block * BLOCK + index).to(tl.int64))


@triton.jit
def _best_of_blocks_kernel(best_score_ptr, best_token_ptr, out_ptr, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: the best of a row's blocks, the lowest of equals. BLOCK: `blocks`, as a power of two."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    score = tl.load(best_score_ptr + row * blocks + block, mask=block < blocks, other=float("-inf"))
    _, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out_ptr + row, tl.load(best_token_ptr + row * blocks + index))


@triton.jit(do_not_specialize=["first_token"])  # the same kernel on every rank
def _draw_kernel(
    logits_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    thresholds_ptr,
    best_score_ptr,
    best_token_ptr,
    first_token,
    vocab_size,
    logits_stride,
    temperature_stride,
    seeds_stride,
    greedy_temperature,
    DEFERRED: tl.constexpr,
    BIASED: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, block): the best score in BLOCK tokens of the row, and its token (the lowest of equals). GREEDY:
    of every row the logits themselves. There are logits of vocab_size tokens from first_token on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    logit = load_logits(logits_ptr + row * logits_stride, column, vocab_size)
    if DEFERRED:
        there = column < vocab_size
        scale = tl.load(row_scales_ptr + row)
        logit = apply_scales(logit, scale, column_scales_ptr, bias_ptr, column, there, BIASED)
        logit = tl.where(there & (logit == logit), logit, float("-inf"))
    score = logit
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row * temperature_stride)
        if temperature >= greedy_temperature:
            key, second = row_keys(seeds_ptr, positions_ptr, row, seeds_stride)
            scaled = tl.div_rn(logit, temperature)  # rounded as in torch: thresholds are compared exactly
            score = scaled - log_noise(first_token + column, key, second)
            if FILTERED:
                score = tl.where(scaled >= tl.load(thresholds_ptr + row), score, float("-inf"))
    _store_best(score, row, block, first_token, best_score_ptr, best_token_ptr, BLOCK)


# ---------------------------------------------------------------- draw


def draw(logits: Product, temperature: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None) -> Tensor:
    """One token id per row, int64 [m].

    logits [m, vocab] of any float dtype, or with scales still to be applied; NaN counts as -inf. temperature float32
    [m], under GREEDY_TEMPERATURE: the row takes its largest logit (the lowest id of equals); seeds int32 [m, 2]: low
    and high word; positions int64 [m]: where the new token will stand. thresholds float32 [m]: tokens with logit /
    temperature below it are out (None: all are in).
    """
    if logits.is_cuda:
        return draw_triton(logits, temperature, seeds, positions, thresholds)
    return draw_reference(logits, temperature, seeds, positions, thresholds)


def draw_reference(
    logits: Product, temperature: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None
) -> Tensor:
    """`draw` in plain torch, any device."""
    return draw_scores(logits, temperature, seeds, positions, thresholds).argmax(1)


def draw_scores(
    logits: Product,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    thresholds: Tensor | None,
    first_token: int = 0,
) -> Tensor:
    """float32 [m, columns], in plain torch: what the largest is drawn of. The logits are those of tokens from
    `first_token` on; no temperature: all rows are greedy; the rest as in `draw`."""
    logits = _numbers(logits)
    if temperature is None or seeds is None or positions is None:
        return logits
    random = (temperature >= GREEDY_TEMPERATURE)[:, None]
    scaled = scale_logits(logits, temperature)
    tokens = torch.arange(first_token, first_token + logits.shape[1], device=logits.device)
    score = scaled - exponential_noise(seeds, positions, tokens).log()
    if thresholds is not None:
        score.masked_fill_(scaled < thresholds[:, None], float("-inf"))
    return torch.where(random, score, logits)


def _numbers(logits: Product) -> Tensor:
    """float32, with -inf for NaN."""
    return as_float(logits).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def draw_triton(
    logits: Product, temperature: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None
) -> Tensor:
    """`draw` in one pass over the logits, plus a reduction over blocks."""
    return _best_of_blocks(*score_blocks(logits, temperature, seeds, positions, thresholds))


def argmax(logits: Product) -> Tensor:
    """The most likely token of each row, the lowest id of equals, int64 [m]: what `draw` gives at temperature 0, so
    that a greedy row's token does not depend on whether its neighbours are greedy too."""
    return argmax_triton(logits) if logits.is_cuda else argmax_reference(logits)


def argmax_reference(logits: Product) -> Tensor:
    """`argmax` in plain torch, any device."""
    return _numbers(logits).argmax(1)


def argmax_triton(logits: Product) -> Tensor:
    """`argmax` as `draw_triton` does it."""
    return _best_of_blocks(*score_blocks(logits, None, None, None, None))


def score_blocks(
    logits: Product,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    thresholds: Tensor | None,
    first_token: int = 0,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest score in each block of a row, float32 [m, blocks], and its token (the lowest of equals), int64: each
    block by a program of its own. Arguments of `draw`; no temperature: all rows greedy. The logits are those of `count`
    tokens (None: as many as there are columns) from `first_token` on."""
    if seeds is not None and seeds.stride(1) != 1:
        raise ValueError("seeds must be contiguous in their last dimension")
    deferred = None if isinstance(logits, Tensor) else logits
    values = logits if isinstance(logits, Tensor) else logits.values
    if values.stride(1) != 1:
        raise ValueError("logits must be contiguous in their last dimension")
    bias = None if deferred is None else deferred.bias
    m, columns = values.shape
    best, tokens = _per_block(m, columns, values.device)
    if m == 0:
        return best, tokens
    _draw_kernel[tokens.shape](
        values,
        None if deferred is None else deferred.row_scales,
        None if deferred is None else deferred.column_scales,
        bias,
        temperature,
        seeds,
        None if positions is None else positions.contiguous(),
        None if thresholds is None else thresholds.contiguous(),
        best,
        tokens,
        first_token,
        columns if count is None else count,
        values.stride(0),
        0 if temperature is None else temperature.stride(0),
        0 if seeds is None else seeds.stride(0),
        GREEDY_TEMPERATURE,
        DEFERRED=deferred is not None,
        BIASED=bias is not None,
        GREEDY=temperature is None,
        FILTERED=thresholds is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(values.device),
    )
    return best, tokens


def _per_block(m: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for a score and a token of each block of each row."""
    blocks = triton.cdiv(vocab_size, _BLOCK)
    scores = torch.empty(m, blocks, dtype=torch.float32, device=device)
    return scores, torch.empty(m, blocks, dtype=torch.int64, device=device)


def _best_of_blocks(scores: Tensor, tokens: Tensor) -> Tensor:
    """int64 [m]: each row's token of the largest score."""
    m, blocks = scores.shape
    out = torch.empty(m, dtype=torch.int64, device=scores.device)
    if m == 0:
        return out
    _best_of_blocks_kernel[(m,)](
        scores,
        tokens,
        out,
        blocks,
        BLOCK=triton.next_power_of_2(blocks),
        num_warps=1,
        **launch_options(scores.device),
    )
    return out


def scale_logits(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature, rows under GREEDY_TEMPERATURE as they are."""
    return logits / torch.where(temperature >= GREEDY_TEMPERATURE, temperature, 1.0)[:, None]


# ---------------------------------------------------------------- top-k, top-p, min-p


def filter_thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, num_sorted: int = 0) -> Tensor:
    """float32 [m]: the smallest scaled logit of each row that top-k, then top-p, then min-p leave in.

    scaled float32 [m, vocab]: logits / temperature. top_k int [m]: 0 is off. top_p float32 [m]: the fewest most likely
    tokens of what top-k left that reach this share (Holtzman et al., 2020); >= 1 is off. min_p float32 [m]: tokens
    under this share of the most likely one's probability go (Nguyen et al., 2024); 0 is off. The most likely token
    always stays. Tokens equal to the threshold all stay, so that the outcome does not depend on the order of sorting.
    num_sorted: enough for every top_k, if every row with top_p on has a top_k; 0: sorts the whole vocabulary.
    """
    vocab_size = scaled.shape[1]
    if 0 < num_sorted < vocab_size:
        values = scaled.topk(num_sorted, dim=1).values
    else:
        values = scaled.sort(dim=1, descending=True).values
    k = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    counted = torch.arange(values.shape[1], device=scaled.device)[None, :] < k
    probs = values.masked_fill(~counted, float("-inf")).softmax(1)
    kept = counted & ((probs.cumsum(1) - probs < top_p[:, None]) | (top_p >= 1)[:, None])
    kept[:, 0] = True
    threshold = values.masked_fill(~kept, float("inf")).amin(1)
    threshold = threshold.masked_fill((top_k <= 0) & (top_p >= 1), float("-inf"))
    return torch.maximum(threshold, values[:, 0] + min_p.log())  # log(0) = -inf: off


# ---------------------------------------------------------------- penalties


def apply_penalties(
    logits: Tensor,
    tokens: Tensor,
    prompt_lens: Tensor,
    lens: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Penalized logits, float32 [m, vocab] (a new tensor).

    tokens int [m, width]: each row's tokens, those from lens [m] on are ignored; tokens[prompt_lens:] are output.
    repetition [m] (Keskar et al., "CTRL", 2019) divides positive and multiplies negative logits of tokens in prompt or
    output; then frequency [m] times the count in the output and, if that is not 0, presence [m] are subtracted.
    """
    index = torch.arange(tokens.shape[1], device=logits.device)[None, :]
    known = index < lens[:, None]
    output = known & (index >= prompt_lens[:, None])
    ids = torch.where(known, tokens, 0).long()
    seen = torch.zeros_like(logits).scatter_add_(1, ids, known.to(logits.dtype)) > 0
    counts = torch.zeros_like(logits).scatter_add_(1, ids, output.to(logits.dtype))
    factor = repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - (frequency[:, None] * counts + presence[:, None] * (counts > 0))


# ---------------------------------------------------------------- log probabilities


def pack_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """Log probabilities of one token per row and of the most likely ones, in one tensor for one copy to the host.

    logits float32 [m, vocab], raw; token_ids int64 [m]; num_top 0..vocab. Returns int32 [m, 3 + 2 * num_top]: token id,
    its rank (1: no token is more likely), its logprob (float32 bits), num_top token ids, num_top logprobs (bits).
    """
    chosen = logits.gather(1, token_ids[:, None])
    # Not by logsumexp, whose order of summation depends on the number of rows.
    logprobs = logits.log_softmax(1)
    rank = (logits > chosen).sum(1, keepdim=True) + 1
    top = logits.topk(num_top, dim=1)
    return torch.cat(
        (
            token_ids[:, None].int(),
            rank.int(),
            logprobs.gather(1, token_ids[:, None]).view(torch.int32),
            top.indices.int(),
            logprobs.gather(1, top.indices).view(torch.int32),
        ),
        dim=1,
    )
