"""Checks on the finished files of an engine, through the code that will load them: does it compute what the checkpoint
says? Their results stand in engine.json."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from appliance.builder.convert import join, joined_shape
from appliance.checkpoint import Checkpoint
from appliance.engines.key import scheme_of
from appliance.engines.manifest import SelfCheck
from appliance.errors import EngineBuildError
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.single_prompt import run_prompt
from appliance.runtime.weights import load_weights
from appliance.types import ModelConfig, Precision, WeightSpec

_SAMPLES = 8  # products compared
_FORWARD_UP_TO = 200_000_000  # parameters; a larger model's forward pass on the CPU would delay the start
_TOKENS = 8


def self_check(
    engine_dir: Path,
    rank_file: str,
    checkpoint: Checkpoint,
    config: ModelConfig,
    specs: list[WeightSpec],
    architecture: ModuleType,
    scheme: PrecisionScheme,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[SelfCheck, ...]:
    """Some products against the checkpoint's own tensors; for a small model a forward pass on the CPU as well. Raises
    EngineBuildError naming the check that failed."""
    limit = float(scheme_of(precision).facts["tolerance"][precision])
    results = []
    with Checkpoint(engine_dir / rank_file) as stored:
        for spec in _sample([spec for spec in specs if spec.kind == "linear"]):
            error = _product_error(stored, checkpoint, spec, scheme, dtype, device)
            name = f"{spec.name} against its checkpoint tensors"
            results.append(SelfCheck(name=name, passed=error <= limit, value=error, limit=limit))
    if config.num_parameters <= _FORWARD_UP_TO:
        problem = _forward_problem(engine_dir / rank_file, config, architecture, scheme)
        results.append(SelfCheck(name="forward pass on the CPU", passed=not problem, note=problem))
    for check in results:
        if not check.passed:
            measured = check.note or f"relative error {check.value:.2g}, allowed {check.limit:g}"
            raise EngineBuildError(
                f"the built engine fails its self-check, {check.name}: {measured}",
                hint="are there NaN or infinite weights in the checkpoint? If not, please report it",
            )
    return tuple(results)


def _sample(specs: list[WeightSpec]) -> list[WeightSpec]:
    """Evenly spaced, first and last included."""
    count = min(_SAMPLES, len(specs))
    return [specs[round(i * (len(specs) - 1) / max(count - 1, 1))] for i in range(count)]


def _product_error(
    stored: Checkpoint,
    checkpoint: Checkpoint,
    spec: WeightSpec,
    scheme: PrecisionScheme,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """||y - reference|| / ||reference|| of the stored product with random input; infinite if it is not finite."""
    out_features, in_features = joined_shape(spec)
    suffixes = scheme.tensors(out_features, in_features, dtype)
    tensors = {suffix: stored.read(f"{spec.name}.{suffix}").to(device, copy=True) for suffix in suffixes}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, in_features, generator=generator).to(device, dtype)
    y = scheme.apply(scheme.prepare(tensors), x, None, dtype)[:, :out_features].float()
    reference = x.float() @ join(checkpoint, spec.sources, device, torch.float32).t()
    error = float((y - reference).norm() / reference.norm().clamp_min(1e-30))
    return error if np.isfinite(error) else float("inf")


def _forward_problem(rank_file: Path, config: ModelConfig, architecture: ModuleType, scheme: PrecisionScheme) -> str:
    """Load as the CPU backend does and run a few tokens; what is wrong with the logits, "" if nothing."""
    with torch.device("meta"):
        model = architecture.Model(config, scheme, torch.float32)
    load_weights(model, rank_file, "cpu")
    model.prepare(_TOKENS)
    token_ids = torch.arange(_TOKENS) * 7 % config.vocab_size
    with torch.inference_mode():
        logits: Tensor = model.logits(run_prompt(model, token_ids)[0])
    if tuple(logits.shape) != (_TOKENS, config.vocab_size):
        return f"logits have shape {list(logits.shape)}"
    return "" if bool(torch.isfinite(logits).all()) else "logits are not finite"
