"""A batching core over a real backend and a small random model, without a builder or a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_helpers import load_model

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.runtime.loading import LoadedModel, PhaseTimer
from appliance.types import EngineOptions, EngineOutput, EngineRequest, SamplingParams


def make_core(
    checkpoint: Path, *, backend: str = "cpu", dtype: torch.dtype = torch.float32, scheme: str = "none", **options: Any
) -> EngineCore:
    """`options`: fields of EngineOptions; the pool is small by default, so that pages run out."""
    device = "cuda" if backend == "cuda" else "cpu"
    model = load_model(checkpoint, dtype=dtype, device=device, scheme=scheme)
    defaults: dict[str, Any] = {"num_pages": 64, "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    settings = EngineOptions(engine_dir="", backend=backend, **{"max_model_len": 128, **defaults, **options})
    loaded = LoadedModel(model, model.config, "test")
    executor, _ = registry.load("backends", backend).assemble(loaded, settings, lambda *args: None, PhaseTimer())
    return EngineCore(executor, prefix_caching=settings.prefix_caching)


def greedy(name: str, prompt: list[int], max_tokens: int, **params: Any) -> EngineRequest:
    values = {"temperature": 0.0, "ignore_eos": True, **params}
    return EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **values))


def run_all(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[EngineOutput]]:
    """Outputs of each request, in order, until the core is idle."""
    for request in requests:
        core.add_request(request)
    outputs: dict[str, list[EngineOutput]] = {request.request_id: [] for request in requests}
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
