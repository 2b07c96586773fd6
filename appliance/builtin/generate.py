"""Greedy generation with a KV cache, in batches, and the exact-match evaluation that ends a training run.

A plain loop over the training network: the quality benchmark of the appliance measures the served model instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from appliance.builtin import tasks
from appliance.builtin.attention import expand_heads
from appliance.builtin.network import Network
from appliance.builtin.tokenizer import ChatEncoder

RECALL_CHECKS = (256, 1024, 2048, 3072, 3800)  # prompt lengths that recall is evaluated at
_PROMPT_TOKENS_PER_BATCH = 131072


class _Cache:
    """Keys and values of a batch of sequences, and the two ways to attend over them."""

    def __init__(self, network: Network, batch: int, length: int, device: torch.device) -> None:
        c = network.config
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=network.dtype)
        self.values = torch.zeros_like(self.keys)

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Whole right-padded prompts: [batch * length, heads, head_dim]."""
        batch = self.keys.shape[1]
        heads = query.shape[1]
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (query, key, value))
        self.keys[layer, :, :, : k.shape[2]] = k
        self.values[layer, :, :, : v.shape[2]] = v
        k, v = (expand_heads(x.transpose(1, 2), heads).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

    def decoder(self, positions: Tensor) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
        """One token of each sequence, at `positions` int64 [batch]."""
        rows = torch.arange(len(positions), device=positions.device)
        visible = torch.arange(self.keys.shape[3], device=positions.device) <= positions[:, None]

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            self.keys[layer, rows, :, positions] = key
            self.values[layer, rows, :, positions] = value
            k, v = (
                x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (self.keys[layer], self.values[layer])
            )
            mask = visible[:, None, None, :]
            return F.scaled_dot_product_attention(query.unsqueeze(2), k, v, attn_mask=mask).squeeze(2)

        return attend


@torch.inference_mode()
def generate(network: Network, prompts: Sequence[list[int]], max_new_tokens: int, end: int) -> list[list[int]]:
    """Greedy continuations of one batch of prompts, each without its end token."""
    device = network.model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    max_new_tokens = min(max_new_tokens, network.config.max_position_embeddings - longest)
    tokens = torch.full((len(prompts), longest), end, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    cache = _Cache(network, len(prompts), longest + max_new_tokens, device)
    places = torch.arange(longest, device=device).repeat(len(prompts))
    hidden = network.hidden(tokens.flatten().to(device), places, cache.prefill).unflatten(0, (len(prompts), longest))
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    out: list[Tensor] = []
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        chosen = network.logits(last).argmax(-1)
        out.append(chosen)
        finished |= chosen == end
        if step + 1 == max_new_tokens or (step % 8 == 7 and bool(finished.all())):
            break
        positions = lengths + step
        last = network.hidden(chosen, positions, cache.decoder(positions))
    texts = torch.stack(out, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in texts]


@dataclass(frozen=True)
class Accuracy:
    """Exact matches of one task, with up to three failures to look at."""

    name: str
    correct: int
    total: int
    seconds: float
    failures: tuple[tuple[str, str, str], ...]  # end of the prompt, expected, got


def _evaluate_samples(network: Network, encoder: ChatEncoder, name: str, samples: Sequence[tasks.Sample]) -> Accuracy:
    started = time.monotonic()
    prompts = [encoder.prompt(s.messages) for s in samples]
    limit = 2 + max(len(encoder.encode(s.answer)) for s in samples)
    size = max(1, _PROMPT_TOKENS_PER_BATCH // max(map(len, prompts)))
    texts: list[str] = []
    for first in range(0, len(prompts), size):
        texts += [encoder.decode(ids) for ids in generate(network, prompts[first : first + size], limit, encoder.end)]
    wrong = [(s.messages[-1]["content"][-80:], s.answer, t) for s, t in zip(samples, texts) if not tasks.score(s, t)]
    return Accuracy(name, len(samples) - len(wrong), len(samples), time.monotonic() - started, tuple(wrong[:3]))


def evaluate(
    network: Network, encoder: ChatEncoder, per_task: int, seed: int = 0, recall_lengths: Sequence[int] = RECALL_CHECKS
) -> list[Accuracy]:
    """Accuracy per task on samples never trained on; recall per prompt length, each with a quarter of the samples."""
    out = []
    for task in tasks.TASKS:
        if task != "recall":
            samples = tasks.evaluation_set(task, per_task, seed)
            out.append(_evaluate_samples(network, encoder, task, samples))
            continue
        for length in recall_lengths:
            samples = tasks.evaluation_set(task, max(1, per_task // 4), seed, length=length)
            out.append(_evaluate_samples(network, encoder, f"recall@{length}", samples))
    return out


def print_table(results: Sequence[Accuracy]) -> None:
    """One line per task, then the first failures of each."""
    print(f"{'task':<16}{'correct':>9}{'of':>6}{'accuracy':>10}{'seconds':>9}")
    for r in results:
        print(f"{r.name:<16}{r.correct:>9}{r.total:>6}{r.correct / r.total:>10.1%}{r.seconds:>9.1f}")
    for r in results:
        for prompt, expected, got in r.failures:
            print(f"  {r.name}: ...{prompt!r} expected {expected!r} got {got!r}")
