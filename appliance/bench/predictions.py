"""What the selection predicts for what a benchmark measures: its own functions, with the same facts of the machine.

Knows how the rows of `bench offline` and `bench serve` are asked of `profiles/speed.py`; measures nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from appliance import hardware
from appliance.engines.manifest import EngineManifest
from appliance.profiles import capabilities, facts_of, load_gpu_facts, predict, speed
from appliance.profiles.places import worst_link
from appliance.settings import cuda_visible_devices
from appliance.types import Hardware


class Limits(Protocol):
    """Of an engine: `EngineInfo` or `EngineOptions`."""

    @property
    def kv_cache_dtype(self) -> str:
        """ "auto": that of the activations."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def max_num_batched_tokens(self) -> int: ...


@dataclass(frozen=True)
class Predictions:
    """Of one engine on this machine, with the limits that it was loaded with. Seconds."""

    ranks: speed.Ranks
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int | None = None  # that the KV cache holds; None: not known, taken for enough

    def decode(self, batch: int, context: float) -> float:
        """One token for each of `batch` sequences that hold `context` tokens each; every stage has a part in hand."""
        return speed.decode_seconds(self.ranks, math.ceil(batch / self.ranks.pp_size), round(context))

    def prefill(self, prompts: int, length: int) -> float:
        """All of the prompts."""
        return speed.prompt_seconds(self.ranks, prompts, length, self.max_num_batched_tokens)

    def output_rate(self, requests: int, input_len: int, output_len: int) -> float:
        """Output tokens/s, with as many requests running as can."""
        running = min(requests, self.max_num_seqs)
        if self.kv_tokens is not None:
            running = min(running, self.kv_tokens // (input_len + output_len // 2))
        return speed.tokens_per_second(
            self.ranks,
            max(1, running),
            self.max_num_batched_tokens,
            prompt_tokens=input_len,
            output_tokens=output_len,
        )


def predictions_of(
    manifest: EngineManifest,
    limits: Limits,
    devices: tuple[str, ...] = (),
    machine: Hardware | None = None,
    replicas: int = 1,
    kv_tokens: int | None = None,
) -> Predictions | None:
    """For one of `replicas` engines as they are loaded; None where the GPUs that it is on cannot be told. `devices`:
    indices or UUIDs of its ranks' GPUs, by default the first ones."""
    machine = machine or hardware.detect(cuda_visible_devices())
    facts = capabilities()
    backend, scheme = facts.backends[manifest.backend], facts.scheme_of(manifest.precision, manifest.scheme)
    on_cpu = backend.device == "cpu"
    stored = predict.stored_as(
        manifest.precision,
        on_cpu=on_cpu,
        head=None if scheme is None else scheme.head_on(manifest.compute_capability),
        packed=backend.packed,
    )
    need = predict.memory(
        manifest.model,
        stored=stored,
        kv_cache=limits.kv_cache_dtype if limits.kv_cache_dtype != "auto" else _plain(manifest, on_cpu),
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        on_cpu=on_cpu,
    )
    ranks = manifest.tp_size * manifest.pp_size
    if on_cpu:
        device = speed.cpu_device(machine.cpu_cores, ranks * replicas)
    else:
        named = [gpu for gpu in machine.gpus if str(gpu.index) in devices or gpu.uuid in devices]
        gpus = named or list(machine.usable_gpus[:ranks])
        if not gpus:
            return None
        known, capability = facts_of(gpus[0], load_gpu_facts()), gpus[0].compute_capability
        device = speed.gpu_device(known, manifest.precision, worst_link(gpus), manifest.tp_size, capability)
    shape = speed.Ranks(manifest.model, stored, need.kv_per_token, device, manifest.tp_size, manifest.pp_size)
    return Predictions(shape, limits.max_num_seqs, limits.max_num_batched_tokens, kv_tokens)


def _plain(manifest: EngineManifest, on_cpu: bool) -> str:
    """The precision of the activations."""
    return "fp32" if on_cpu else {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[manifest.dtype]
