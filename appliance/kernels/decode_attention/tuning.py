"""Times decode attention by the own kernel against what else serves: rotary embedding, cache write and the library's.

Both are run as they are in a step, over caches that do not stay in L2, inside a CUDA graph, behind a kernel that writes
the fused product; for short and for longer contexts. A number of rows is served by the way whose times, relative to the
best, are the least in sum. Knows how a way is called; knows nothing of how it computes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.attention import Attention, AttentionMetadata, KvScales
from appliance.kernels.decode_attention.decode import OTHER, TIMED_ROWS, DecodeAttention, name_of, table_key
from appliance.kernels.decode_attention.kernel import DecodeAttentionShape
from appliance.kernels.rope_cache import rope_and_write
from appliance.kernels.tactics import TABLE, TimedChoice, Timer

log = logging.getLogger(__name__)

CONTEXTS = (192, 1536)  # tokens; less where memory has no room
_CACHE_BYTES = 512 << 20  # of all caches that a timing goes through
_CALLS = 12  # in a graph


def known(shape: DecodeAttentionShape) -> bool:
    """Whether `TABLE` has choices for this shape, whatever its warps and form."""
    return TABLE.chosen(*table_key(shape), 1) is not None


@torch.inference_mode()
def tune(own: DecodeAttention, other: Attention, timer: Timer, device: torch.device) -> list[TimedChoice]:
    """Time all ways for `TIMED_ROWS`; the choices are in `TABLE` afterwards, with the µs of all contexts together.
    `other` must serve these numbers of rows in graphs, contexts of up to max(CONTEXTS) tokens, without a window. Takes
    a second or two, and as much again where kernels are yet to be compiled."""
    with ThreadPoolExecutor() as pool:  # most of that is the compiler's
        able = [
            warps
            for warps, made in zip(own.warps, pool.map(partial(_made, own, device), own.warps), strict=True)
            if made
        ]
    chosen = []
    for rows in TIMED_ROWS:
        timed: dict[str, list[float]] = {}
        for context in CONTEXTS:
            case = _Case(own, rows, context, device)
            calls = {name_of(warps): partial(case.own_calls, warps) for warps in able}
            for name, make in (calls | {OTHER: partial(case.other_calls, other)}).items():
                timed.setdefault(name, []).append(_attempt(make, timer))
        chosen.append(_choose(own, rows, timed))
    for choice in chosen:
        TABLE.choose(choice.scheme, choice.out_features, choice.in_features, choice.rows, choice.tactic)
    return chosen


def _made(own: DecodeAttention, device: torch.device, warps: int) -> bool:
    torch.cuda.set_device(device)
    try:
        own.kernel(warps)
    except Exception as error:  # of the compiler or the driver
        log.warning("decode attention: %s is left out: %s", name_of(warps), str(error).partition("\n")[0])
        return False
    return True


def _attempt(make: Callable[[], list[Callable[[], Tensor]]], timer: Timer) -> float:
    try:
        calls = make()
        for call in calls[:1]:
            call()
        return timer(calls, _CALLS)
    except Exception as error:  # of the library's compiler, of the driver
        log.warning("decode attention: a way is left out: %s", str(error).partition("\n")[0])
        return math.inf


def _choose(own: DecodeAttention, rows: int, timed: dict[str, list[float]]) -> TimedChoice:
    best = [min(times) for times in zip(*timed.values(), strict=True)]
    ranked = sorted(timed, key=lambda name: sum(us / least for us, least in zip(timed[name], best, strict=True)))
    first, second = ranked[0], ranked[1] if len(ranked) > 1 else ""
    log.info(
        "decode attention of %d rows: %s; %s",
        rows,
        first,
        ", ".join(f"{name} {' and '.join(f'{us:.1f}' for us in times)} µs" for name, times in timed.items()),
    )
    scheme, out_features, in_features = table_key(own.shape)
    return TimedChoice(
        product="decode_attention",
        scheme=scheme,
        out_features=out_features,
        in_features=in_features,
        rows=rows,
        tactic=first,
        microseconds=round(sum(timed[first]), 2),
        runner_up=second,
        runner_up_microseconds=round(sum(timed.get(second, [0.0])), 2),
    )


class _Case:
    """A step of `rows` sequences of about `context` tokens, and the caches that its calls go through."""

    def __init__(self, own: DecodeAttention, rows: int, context: int, device: torch.device) -> None:
        self._own, shape = own, own.shape
        page_bytes = 2 * shape.page_size * shape.kv_heads * shape.head_dim * shape.kv_dtype.itemsize
        width = max(1, min(context // shape.page_size, _CACHE_BYTES // (2 * rows * page_bytes)))
        length = width * shape.page_size - 3
        pages = rows * width
        count = max(2, min(_CALLS, _CACHE_BYTES // (pages * page_bytes)))
        layout = (count, pages, 2, shape.page_size, shape.kv_heads, shape.head_dim)
        self._caches = torch.zeros(layout, dtype=shape.kv_dtype, device=device).unbind(0)
        order = np.random.default_rng(0).permutation(pages).reshape(rows, width).astype(np.int32)
        slots = order[:, -1].astype(np.int64) * shape.page_size + (length - 1) % shape.page_size
        lens = np.full(rows, length, np.int32)
        starts = np.arange(rows + 1, dtype=np.int32)
        self._metadata = AttentionMetadata(
            num_seqs=rows,
            num_tokens=rows,
            max_query_len=1,
            max_seq_len=length,
            query_start=torch.from_numpy(starts).to(device),
            seq_lens=torch.from_numpy(lens).to(device),
            page_table=torch.from_numpy(order).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            query_start_host=starts,
            seq_lens_host=lens,
            page_table_host=order,
        )
        self._positions = torch.full((rows,), length - 1, dtype=torch.int64, device=device)
        self._cos_sin = torch.ones(length, shape.head_dim, device=device)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._qkv = torch.zeros(rows, width, dtype=shape.dtype, device=device)

    def own_calls(self, warps: int) -> list[Callable[[], Tensor]]:
        own, scale = self._own, self._own.shape.head_dim**-0.5
        own.forced = warps
        try:
            own.plan(self._metadata)
        finally:
            own.forced = None

        def call(cache: Tensor) -> Tensor:
            self._qkv.zero_()
            return own.attend(self._qkv, self._cos_sin, cache, self._metadata, scale, None, KvScales())

        return [partial(call, cache) for cache in self._caches]

    def other_calls(self, other: Attention) -> list[Callable[[], Tensor]]:
        shape = self._own.shape
        other.plan(self._metadata)

        def call(cache: Tensor) -> Tensor:
            self._qkv.zero_()
            heads = self._qkv.unflatten(-1, (-1, shape.head_dim))
            q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
            q = rope_and_write(q, k, v, self._positions, self._cos_sin, cache, self._metadata.slot_mapping)
            return other.attend(q, cache, self._metadata, shape.head_dim**-0.5, None)

        return [partial(call, cache) for cache in self._caches]
