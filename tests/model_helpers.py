"""Small random checkpoints, models loaded from them without the builder, and a tiny paged runner.

For tests that compare the model side with `transformers`, or that need a model and no runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from appliance import registry
from appliance.checkpoint import read_model_config
from appliance.kernels.attention import Attention, AttentionMetadata, ReferenceAttention
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder
from appliance.quantization.scheme import PrecisionScheme
from appliance.types import ModelConfig, WeightSpec


def make_checkpoint(path: Path, hf_config: Any, seed: int = 0) -> Any:
    """A random float32 checkpoint in `path`; returns the `transformers` model. Weights are larger than usual, and
    biases and norms random too, so that every part of the model shows in its logits."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else 2.0 / parameter.shape[1] ** 0.5))
    model.save_pretrained(path)
    return model


def engine_tensors(
    specs: list[WeightSpec], checkpoint: dict[str, Tensor], scheme: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """What a builder would store, tensor by tensor."""
    for spec in specs:
        weight = torch.cat([checkpoint[source] for source in spec.sources]).to(dtype)
        assert tuple(checkpoint[s].shape for s in spec.sources) == spec.shapes, spec.name
        if spec.kind == "plain":
            yield spec.name, weight
            continue
        for suffix, tensor in scheme.of(spec.name).quantize(weight).items():
            yield f"{spec.name}.{suffix}", tensor
        if spec.bias_sources:
            yield f"{spec.name}.bias", torch.cat([checkpoint[s] for s in spec.bias_sources]).to(dtype)


def load_model(
    path: Path,
    *,
    scheme: str | PrecisionScheme = "none",
    dtype: torch.dtype = torch.float32,
    stored_dtype: torch.dtype | None = None,
    device: str = "cpu",
    config: ModelConfig | None = None,
) -> Decoder:
    """A checkpoint's model, ready to run. `dtype`: of its arithmetic; `stored_dtype`: of the engine it would come from
    (default: the same). `config` replaces what the checkpoint's config.json says."""
    config = config or read_model_config(path)
    plugin = registry.load("models", registry.architectures()[config.architecture].name)
    precision = registry.load("quantization", scheme).Scheme() if isinstance(scheme, str) else scheme
    with torch.device("meta"):
        model = plugin.Model(config, precision, dtype)
    checkpoint: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        checkpoint.update(load_file(file))
    model.load(engine_tensors(plugin.weight_specs(config), checkpoint, precision, stored_dtype or dtype), device)
    model.prepare(config.max_position_embeddings)
    return model


@dataclass
class PagedSequence:
    """A sequence in the runner's cache."""

    length: int = 0  # tokens in the cache
    pages: list[int] = field(default_factory=list)


class PagedRunner:
    """Runs a model over a paged KV cache whose pages are handed out in random order."""

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int = 256,
        page_size: int = 4,
        attention: Attention | None = None,
        kv_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.device = model.device
        self.page_size = page_size
        self.attention = attention or ReferenceAttention()
        shape = (num_pages, 2, page_size, model.num_kv_heads, model.config.head_dim)
        # Finite, as runtimes promise, but large: whoever does not mask a slot that was never written shows it.
        self.caches = [
            torch.full(shape, 100.0, device=self.device).to(kv_dtype or model.dtype)
            for _ in range(model.config.num_hidden_layers)
        ]
        self._free = np.random.default_rng(seed).permutation(num_pages).tolist()

    def step(self, batch: list[tuple[PagedSequence, list[int]]]) -> list[Tensor]:
        """Run new tokens of some sequences in one pass; float32 logits [tokens, vocab] of each. Of several pipeline
        stages all run the same; the others than the last give nothing."""
        positions, slots = [], []
        for sequence, tokens in batch:
            new = range(sequence.length, sequence.length + len(tokens))
            sequence.length += len(tokens)
            while len(sequence.pages) * self.page_size < sequence.length:
                sequence.pages.append(self._free.pop())
            positions += new
            slots += [sequence.pages[p // self.page_size] * self.page_size + p % self.page_size for p in new]
        token_ids = [token for _, tokens in batch for token in tokens]
        metadata = self.metadata(batch, slots)
        self.attention.plan(metadata)
        ctx = ForwardContext(self._tensor(positions), self.caches, metadata, self.attention)
        received, stage = None, self.model.stage
        if not stage.is_first:
            received = torch.empty(len(token_ids), self.model.config.hidden_size, dtype=self.model.dtype)
            stage.receive(received)
        hidden = self.model(self._tensor(token_ids), ctx, received)
        if not stage.is_last:
            stage.send(hidden)
            return []
        logits = self.model.logits(hidden)
        return list(logits.split([len(tokens) for _, tokens in batch]))

    def greedy(self, prompt: list[int], num_tokens: int, chunk: int = 1 << 30) -> list[int]:
        """The greedy continuation of a prompt that is prefilled in chunks."""
        sequence, output = PagedSequence(), []
        for start in range(0, len(prompt), chunk):
            logits = self.step([(sequence, prompt[start : start + chunk])])[0]
        while True:
            output.append(int(logits[-1].argmax()))
            if len(output) == num_tokens:
                return output
            logits = self.step([(sequence, output[-1:])])[0]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def metadata(self, batch: list[tuple[PagedSequence, list[int]]], slots: list[int]) -> AttentionMetadata:
        lengths = [len(tokens) for _, tokens in batch]
        query_start = np.cumsum([0, *lengths], dtype=np.int32)
        seq_lens = np.array([sequence.length for sequence, _ in batch], dtype=np.int32)
        table = np.zeros((len(batch), max(len(sequence.pages) for sequence, _ in batch)), dtype=np.int32)
        for row, (sequence, _) in zip(table, batch, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return AttentionMetadata(
            num_seqs=len(batch),
            num_tokens=len(slots),
            max_query_len=max(lengths),
            max_seq_len=int(seq_lens.max()),
            query_start=torch.from_numpy(query_start).to(self.device),
            seq_lens=torch.from_numpy(seq_lens).to(self.device),
            page_table=torch.from_numpy(table).to(self.device),
            slot_mapping=self._tensor(slots),
            query_start_host=query_start,
            seq_lens_host=seq_lens,
            page_table_host=table,
        )
