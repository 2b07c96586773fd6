"""The draw from what top-k, top-p and min-p leave in, without sorting the vocabulary.

Knows what `kernels/sampling.py` knows. The kernel takes a candidate from the unfiltered draw and asks whether it passes
the filters, which needs one pass over the row (how many tokens, of what mass, are more likely). If not, everything as
likely or less is out too, and the best remaining candidate is tried. The noise stays the same, so the outcome is the
one of drawing among the filtered tokens. The idea of rejection without sorting is FlashInfer's ("Sorting-free GPU
kernels for LLM sampling", 2025).
"""

from __future__ import annotations

from torch import Tensor

from appliance.kernels._triton import tl, triton
from appliance.kernels.sampling import (
    GREEDY_TEMPERATURE,
    draw,
    draw_triton,
    filter_thresholds,
    load_logits,
    log_noise,
    row_keys,
    scale_logits,
)

_BLOCK = 8192


def draw_filtered(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    num_sorted: int = 0,
) -> Tensor:
    """`sampling.draw` among the tokens that `sampling.filter_thresholds` leaves in; arguments as there.

    top_k int32, top_p and min_p float32, [m] with any stride. num_sorted > 0 promises what it does in
    `filter_thresholds`: looking at so many tokens is then the cheaper way on a GPU too.
    """
    if logits.is_cuda and num_sorted == 0:
        return draw_filtered_triton(logits, temperature, seeds, positions, top_k, top_p, min_p)
    thresholds = filter_thresholds(scale_logits(logits, temperature), top_k, top_p, min_p, num_sorted)
    return draw(logits, temperature, seeds, positions, thresholds)


@triton.jit
def _ordered(x):
    """float32 -> int32 of the same order; +0 and -0 alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _count_from(row_ptr, temperature, bound, top, vocab_size, BLOCK: tl.constexpr):
    """(number, mass relative to the most likely token's) of tokens whose ordered scaled logit is >= bound."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        scaled = tl.div_rn(load_logits(row_ptr, token, vocab_size), temperature)
        counted = (_ordered(scaled) >= bound) & (token < vocab_size)
        count += counted.to(tl.int32)
        mass += tl.where(counted, tl.exp(scaled - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _mass_of_top_k(row_ptr, temperature, k, top, vocab_size, BLOCK: tl.constexpr):
    """Mass of the k most likely tokens (relative to the first): bisection for the k-th, over ordered logits."""
    low = tl.full([], -2139095041, tl.int64)  # ordered -inf: all tokens reach it
    high = _ordered(top).to(tl.int64) + 1  # none does
    count = vocab_size + 0
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        reached, _ = _count_from(row_ptr, temperature, middle, top, vocab_size, BLOCK)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
    bound = low.to(tl.int32)
    reached, mass = _count_from(row_ptr, temperature, bound, top, vocab_size, BLOCK)
    value = tl.where(bound >= 0, bound, bound ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # Tokens equal to the k-th beyond k do not count. An early end (exactly k reached) leaves none of them.
    extra = tl.maximum(reached - k, 0)
    return mass - tl.where(extra > 0, extra.to(tl.float32) * tl.exp(value - top), 0.0)


@triton.jit
def _reject_kernel(
    logits_ptr,
    candidates_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab_size,
    logits_stride,
    temperature_stride,
    seeds_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    greedy_temperature,
    BLOCK: tl.constexpr,
):
    """Program: a row. candidates [m] holds the unfiltered draws and receives the filtered ones."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    k = tl.load(top_k_ptr + row * top_k_stride)
    p = tl.load(top_p_ptr + row * top_p_stride)
    floor = tl.load(min_p_ptr + row * min_p_stride)
    if (temperature < greedy_temperature) | ((k <= 0) & (p >= 1.0) & (floor <= 0.0)):
        return
    row_ptr = logits_ptr + row * logits_stride
    key, second = row_keys(seeds_ptr, positions_ptr, row, seeds_stride)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        largest = tl.maximum(largest, load_logits(row_ptr, start + tl.arange(0, BLOCK), vocab_size))
    top = tl.div_rn(tl.max(largest, 0), temperature)
    lowest = top + tl.log(floor)  # log(0) = -inf: off
    limit = tl.full([], float("inf"), tl.float32)
    if p < 1.0:
        if (k > 0) & (k < vocab_size):
            limit = p * _mass_of_top_k(row_ptr, temperature, k, top, vocab_size, BLOCK)
        else:
            _, mass = _count_from(row_ptr, temperature, -2139095041, top, vocab_size, BLOCK)
            limit = p * mass

    candidate = tl.load(candidates_ptr + row)
    passed = 0
    while passed == 0:
        scaled_candidate = tl.div_rn(tl.load(row_ptr + candidate), temperature)
        bound = _ordered(scaled_candidate)
        count = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.float32)
        best_score = tl.full([BLOCK], float("-inf"), tl.float32)
        best_token = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            scaled = tl.div_rn(load_logits(row_ptr, token, vocab_size), temperature)
            above = (_ordered(scaled) > bound) & (token < vocab_size)
            if tl.max(above.to(tl.int32), 0) > 0:  # seldom: spares the noise
                count += above.to(tl.int32)
                mass += tl.where(above, tl.exp(scaled - top), 0.0)
                score = tl.where(above, scaled - log_noise(token, key, second), float("-inf"))
                better = score > best_score
                best_token = tl.where(better, token, best_token)
                best_score = tl.where(better, score, best_score)
        number = tl.sum(count, 0)
        allowed = (tl.sum(mass, 0) < limit) & ((k <= 0) | (number < k)) & (scaled_candidate >= lowest)
        if allowed | (number == 0):
            passed = 1
        else:
            best = tl.max(best_score, 0)
            candidate = tl.min(tl.where(best_score == best, best_token, vocab_size), 0).to(tl.int64)
    tl.store(candidates_ptr + row, candidate)


def draw_filtered_triton(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """`draw_filtered` by rejection: a few passes over a row that lies in the L2 cache, one program a row."""
    candidates = draw_triton(logits, temperature, seeds, positions, None)
    if len(candidates) == 0:
        return candidates
    _reject_kernel[(len(candidates),)](
        logits,
        candidates,
        temperature,
        seeds,
        positions.contiguous(),
        top_k,
        top_p,
        min_p,
        logits.shape[1],
        logits.stride(0),
        temperature.stride(0),
        seeds.stride(0),
        top_k.stride(0),
        top_p.stride(0),
        min_p.stride(0),
        GREEDY_TEMPERATURE,
        BLOCK=_BLOCK,
        num_warps=16,
    )
    return candidates
