"""Steps of decodes for tests of the decode attention kernel, and what rotary embedding, cache write and attention in
plain torch make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from appliance.kernels.attention import (
    UNIT_SCALES,
    AttentionMetadata,
    HeadNorms,
    KvScales,
    ReferenceAttention,
    store_kv,
)
from appliance.kernels.decode_attention.kernel import Buffers, DecodeAttentionShape, DecodeInputs
from appliance.kernels.decode_attention.plan import FIELDS, Cutting, make_plan
from appliance.kernels.deferred_scale import DeferredScale
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.norm import qk_rms_norm_
from appliance.kernels.rope_cache import rope_and_write_reference

SCALES = KvScales(k=0.5, v=0.037)  # of FP8 caches


@dataclass
class Step:
    """`lens` of the first rows, the new token counted; the other rows are padding. `unwritten`: rows whose token goes
    nowhere."""

    shape: DecodeAttentionShape
    lens: list[int]
    rows: int
    window: int | None = None
    bias: bool = False
    unwritten: tuple[int, ...] = ()
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        shape, rng = self.shape, torch.Generator().manual_seed(self.seed)
        page, heads = shape.page_size, shape.heads + 2 * shape.kv_heads
        width = max(-(-max(self.lens, default=1) // page), 1)
        pages = self.rows * width + 3
        self.table = np.full((self.rows, width), 2**30, np.int32)  # what is not there must not be looked at
        order, taken = np.random.default_rng(self.seed).permutation(pages), 0
        self.slots = torch.full((self.rows,), -1, dtype=torch.int64)
        for row, length in enumerate(self.lens):
            used = -(-length // page)
            self.table[row, :used] = order[taken : taken + used]
            taken += used
            if length and row not in self.unwritten:
                self.slots[row] = int(self.table[row, (length - 1) // page]) * page + (length - 1) % page
        self.scales = SCALES if shape.kv_dtype == FP8 else UNIT_SCALES
        kv = torch.randn(pages, 2, page, shape.kv_heads, shape.head_dim, generator=rng)
        cache = torch.stack(
            [store_kv(kv[:, i], s, shape.kv_dtype) for i, s in enumerate((self.scales.k, self.scales.v))], 1
        )
        held = torch.zeros(pages, page, dtype=torch.bool)  # what no sequence has is NaN
        for row, length in enumerate(self.lens):
            for at in range(max(length - 1, 0)):
                held[int(self.table[row, at // page]), at % page] = True
        nan = torch.full_like(kv, float("nan")).to(shape.kv_dtype)
        self.cache = torch.where(held[:, None, :, None, None], cache.float(), nan.float()).to(shape.kv_dtype)
        angles = torch.rand(max(max(self.lens, default=1), 1), shape.head_dim // 2, generator=rng) * 6.3
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        size = heads * shape.head_dim
        wide = torch.randn(self.rows, size + 16, generator=rng)
        wide = (wide * 60).round().to(torch.int32) if shape.int32 else wide.to(shape.dtype)
        self.qkv: Tensor | DeferredScale = wide[:, :size]
        if shape.deferred:
            self.qkv = DeferredScale(
                wide[:, :size],
                torch.rand(self.rows, 1, generator=rng) * (0.05 if shape.int32 else 3) + 0.01,
                torch.rand(1, size, generator=rng) + 0.3,
                torch.randn(size, generator=rng).to(shape.dtype) if self.bias else None,
                shape.dtype if shape.int32 else None,
            )
        self.scale = shape.head_dim**-0.5
        self.norms = None
        if shape.normed:
            weights = (1 + 0.3 * torch.randn(2, shape.head_dim, generator=rng)).to(shape.dtype)
            self.norms = HeadNorms(weights[0].to(self.device), weights[1].to(self.device), 1e-5)

    def metadata(self) -> AttentionMetadata:
        lens = np.array(self.lens, np.int32)
        count = len(lens)
        padded = torch.zeros(self.rows, dtype=torch.int32)
        padded[:count] = torch.from_numpy(lens)
        return AttentionMetadata(
            num_seqs=self.rows,
            num_tokens=self.rows,
            max_query_len=1,
            max_seq_len=int(lens.max(initial=1)),
            query_start=torch.arange(self.rows + 1, dtype=torch.int32).to(self.device),
            seq_lens=padded.to(self.device),
            page_table=torch.from_numpy(self.table).to(self.device),
            slot_mapping=self.slots.to(self.device),
            query_start_host=np.arange(count + 1, dtype=np.int32),
            seq_lens_host=lens,
            page_table_host=self.table[:count],
        )

    def _heads(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of q, k and v of some rows."""
        values = self.qkv.values if isinstance(self.qkv, DeferredScale) else self.qkv
        heads = values[rows].clone().unflatten(-1, (-1, self.shape.head_dim))
        sizes = (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)
        q, k, v = heads.split(sizes, dim=1)
        if self.norms is not None:
            deferred = self._raw_deferred(rows)
            if deferred is not None:
                plain = deferred.scaled().to(self.shape.dtype)
                q, k, v = plain.unflatten(-1, (-1, self.shape.head_dim)).split(sizes, dim=1)
            q_weight, k_weight = self.norms.q_weight.cpu(), self.norms.k_weight.cpu()
            qk_rms_norm_(q, k, q_weight, k_weight, self.norms.eps, v, deferred)
        return q, k, v

    def _deferred(self, rows: slice = slice(None)) -> DeferredScale | None:
        """Scales that `_heads` left."""
        return None if self.norms is not None else self._raw_deferred(rows)

    def _raw_deferred(self, rows: slice) -> DeferredScale | None:
        if not isinstance(self.qkv, DeferredScale):
            return None
        return replace(self.qkv, values=self.qkv.values[rows].clone(), row_scales=self.qkv.row_scales[rows])

    def expected(self) -> tuple[Tensor, Tensor]:
        """(attention's output [rows, heads, head_dim] of rows that are there, float32; the cache), on the CPU."""
        shape, cache = self.shape, self.cache.clone()
        q, k, v = self._heads()
        deferred = self._deferred()
        positions = torch.tensor([max(length - 1, 0) for length in self.lens] + [0] * (self.rows - len(self.lens)))
        q = rope_and_write_reference(q, k, v, positions, self.cos_sin, cache, self.slots, self.scales, deferred)
        seen = cache.clone()
        for row in self.unwritten:  # a token sees itself, wherever it goes
            one, at = slice(row, row + 1), int(positions[row])
            slot = int(self.table[row, at // shape.page_size]) * shape.page_size + at % shape.page_size
            rope_and_write_reference(
                *self._heads(one),
                positions[one],
                self.cos_sin,
                seen,
                torch.tensor([slot]),
                self.scales,
                self._deferred(one),
            )
        metadata = self.metadata()
        metadata.page_table = torch.from_numpy(self.table)
        out = ReferenceAttention().attend(q.float(), seen, metadata, self.scale, self.window, self.scales)
        return out, cache

    def plan(self, cutting: Cutting) -> np.ndarray:
        return make_plan(np.array(self.lens), self.rows, self.window, cutting)

    def inputs(self, cache: Tensor, out: Tensor) -> DecodeInputs:
        """On the step's device; `cache` and `out` are there."""
        qkv = self.qkv
        if isinstance(qkv, DeferredScale):
            bias = None if qkv.bias is None else qkv.bias.to(self.device)
            moved = (qkv.row_scales.to(self.device), qkv.column_scales.to(self.device), bias)
            qkv = DeferredScale(qkv.values.to(self.device), *moved, qkv.result_dtype)
        else:
            qkv = qkv.to(self.device)
        metadata = self.metadata()
        return DecodeInputs(
            qkv=qkv,
            cos_sin=self.cos_sin.to(self.device),
            kv_cache=cache,
            page_table=metadata.page_table,
            slots=metadata.slot_mapping,
            out=out,
            scale=self.scale,
            kv_scales=self.scales,
            norms=self.norms,
        )

    def buffers(self, cutting: Cutting) -> Buffers:
        """With the plan of this step."""
        items = cutting.capacity(self.rows)
        plan = torch.from_numpy(self.plan(cutting))
        assert plan.shape == (items, FIELDS)
        return Buffers(
            plan.to(self.device),
            torch.full((items * self.shape.heads * self.shape.head_dim,), float("nan"), device=self.device),
            torch.full((items * self.shape.heads * 2,), float("nan"), device=self.device),
            torch.zeros(self.rows * self.shape.kv_heads, dtype=torch.int32, device=self.device),
        )

    def check(self, out: Tensor, cache: Tensor) -> None:
        """What a kernel gave against what plain torch gives."""
        expected, expected_cache = self.expected()
        count = len(self.lens)
        got = out.float().cpu()
        for row, length in enumerate(self.lens):
            if length:
                error = float((got[row] - expected[row]).norm() / expected[row].norm())
                assert error < (4e-3 if self.shape.dtype == torch.bfloat16 else 1e-3), (row, length, error)
            else:
                assert not got[row].any()
        assert not got[count:].any()  # rows of padding
        written, wanted = cache.float().cpu(), expected_cache.float()
        assert torch.equal(written.isnan(), wanted.isnan())
        # Products may be rounded once instead of twice: neighbours of 16-bit numbers, and rarely of 8-bit ones.
        tolerance = 0.13 if self.shape.kv_dtype == FP8 else 8e-3
        torch.testing.assert_close(written.nan_to_num(), wanted.nan_to_num(), rtol=tolerance, atol=1e-2)
        assert float((written != wanted).logical_and(~wanted.isnan()).float().mean()) < 1e-3
