"""Steps whose attention is one launch a layer: the layers' side on the CPU with plain torch in the kernel's place, and
the kernel's own in CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_attention_cases import Step
from model_helpers import PagedRunner, PagedSequence, load_model, make_checkpoint
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from appliance.kernels.attention import AttentionMetadata, HeadNorms, KvScales, ReferenceAttention
from appliance.kernels.decode_attention import tuning
from appliance.kernels.decode_attention.decode import (
    OTHER,
    DecodeAttention,
    attention_shape,
    name_of,
    table_key,
)
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.kernels.norm import qk_rms_norm_
from appliance.kernels.rope_cache import rope_and_write
from appliance.kernels.tactics import TABLE

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=13),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
PROMPTS = [list(range(3, 40)), [5, 9], [7]]


class FusedReference(ReferenceAttention):
    """Plain torch with a `fused` of its own."""

    def __init__(self) -> None:
        self.fused: FusedReference.Fused | None = None
        self.calls = 0

    def plan(self, metadata: AttentionMetadata) -> None:
        self.fused = self.Fused(self) if metadata.max_query_len == 1 else None

    class Fused:
        def __init__(self, owner: FusedReference) -> None:
            self._owner = owner

        def attend(
            self,
            qkv: Product,
            cos_sin: Tensor,
            kv_cache: Tensor,
            metadata: AttentionMetadata,
            scale: float,
            window: int | None,
            kv_scales: KvScales,
            norms: HeadNorms | None = None,
        ) -> Tensor:
            self._owner.calls += 1
            values = qkv.values if isinstance(qkv, DeferredScale) else qkv
            kv_heads, dim = kv_cache.shape[3:]
            heads = values.unflatten(-1, (-1, dim))
            q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
            deferred = qkv if isinstance(qkv, DeferredScale) else None
            if norms is not None:
                qk_rms_norm_(q, k, norms.q_weight, norms.k_weight, norms.eps, v, deferred)
                deferred = None
            positions = metadata.seq_lens.long() - 1
            q = rope_and_write(q, k, v, positions, cos_sin, kv_cache, metadata.slot_mapping, kv_scales, deferred)
            return self._owner.attend(q, kv_cache, metadata, scale, window, kv_scales)


@pytest.mark.parametrize("scheme", ["none", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_is_the_other(name: str, scheme: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, MODELS[name])
    logits = []
    for attention in (ReferenceAttention(), FusedReference()):
        runner = PagedRunner(load_model(tmp_path, scheme=scheme, dtype=torch.bfloat16), attention=attention)
        sequences = [PagedSequence() for _ in PROMPTS]
        runner.step(list(zip(sequences, PROMPTS, strict=True)))
        steps = [torch.cat(runner.step([(s, [t]) for s in sequences])) for t in (11, 12, 13)]
        logits.append(torch.stack(steps))
        if isinstance(attention, FusedReference):
            assert attention.calls == 3 * SHAPE["num_hidden_layers"]
    assert torch.equal(*logits)


def test_the_table_says_what_serves() -> None:
    own = object.__new__(DecodeAttention)  # without a GPU: what asks the table
    own._shape, own.warps, own.forced = attention_shape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16), (4, 8), None
    TABLE.clear()
    try:
        assert own.way(1) is None and not tuning.known(own.shape)
        for rows, name in ((1, OTHER), (8, name_of(8)), (512, name_of(4))):
            TABLE.choose(*table_key(own.shape), rows, name)
        assert tuning.known(own.shape)
        assert [own.way(rows) for rows in (1, 2, 8, 9, 512, 3000)] == [None, 8, 8, 4, 4, 4]
        TABLE.choose(*table_key(own.shape), 8, name_of(16))  # what this GPU has no room for
        assert own.way(8) is None
    finally:
        TABLE.clear()


def test_the_quickest_in_all_contexts_is_chosen() -> None:
    own = object.__new__(DecodeAttention)
    own._shape = attention_shape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16)
    inf = float("inf")
    chosen = tuning._choose(own, 8, {name_of(4): [10.0, 20.0], name_of(8): [8.0, 30.0], OTHER: [9.0, inf]})
    assert (chosen.tactic, chosen.runner_up, chosen.rows, chosen.microseconds) == (name_of(4), name_of(8), 8, 30.0)


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [4, 8, 16])
def test_a_graph_serves_all_lengths(warps: int) -> None:
    shape = attention_shape(16, 2, 128, 16, torch.bfloat16, torch.bfloat16)
    device = torch.device("cuda", torch.cuda.current_device())
    own = DecodeAttention(shape, windows=(None, 100), max_rows=8, device=device)
    if warps not in own.warps:
        pytest.skip("no kernel with so many warps on this GPU")
    own.forced = warps
    steps = [
        Step(shape, lens, 8, device="cuda", seed=seed)
        for seed, lens in enumerate(([1] * 8, [3000, 5], [17, 0, 150, 16, 2000, 1, 33, 800], [700] * 8))
    ]
    pages = max(step.cache.shape[0] for step in steps)
    width, positions = max(step.table.shape[1] for step in steps), max(len(step.cos_sin) for step in steps)
    cache = torch.zeros(pages, *steps[0].cache.shape[1:], dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(8, width, dtype=torch.int32, device="cuda")
    slots = torch.zeros(8, dtype=torch.int64, device="cuda")
    cos_sin = torch.zeros(positions, 128, device="cuda")
    qkv = torch.zeros(8, 20 * 128, dtype=torch.bfloat16, device="cuda")

    def bring(step: Step, window: int | None) -> AttentionMetadata:
        step.window = window
        cache[: len(step.cache)].copy_(step.cache)
        table[:, : step.table.shape[1]].copy_(torch.from_numpy(step.table))
        slots.copy_(step.slots)
        cos_sin[: len(step.cos_sin)].copy_(step.cos_sin)
        assert isinstance(step.qkv, Tensor)
        qkv.copy_(step.qkv)
        metadata = step.metadata()
        metadata.page_table, metadata.slot_mapping = table, slots
        own.plan(metadata)
        return metadata

    for window in (None, 100):
        metadata = bring(steps[0], window)
        outs, graph = [], torch.cuda.CUDAGraph()
        own.attend(qkv, cos_sin, cache, metadata, 128**-0.5, window, KvScales())
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outs.append(own.attend(qkv, cos_sin, cache, metadata, 128**-0.5, window, KvScales()))
        for step in [*steps, *steps[::-1]]:
            bring(step, window)
            outs[0].fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            step.check(outs[0], cache[: len(step.cache)])
