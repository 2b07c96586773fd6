"""Checks on the finished files of an engine, through the code that will load them: does it compute what the checkpoint
says? Their results stand in engine.json.

Products are compared with the weights that they stand for. Where a calibrated engine has no such weight, since scales
were moved from one to another, a layer is compared with the checkpoint's (`layercheck.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from appliance.builder.convert import StoredTensors
from appliance.builder.job import Job
from appliance.builder.layercheck import check_first_layer
from appliance.builder.shards import StoredEngine, joined_shape
from appliance.engines.manifest import SelfCheck
from appliance.errors import EngineBuildError
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.single_prompt import run_prompt
from appliance.runtime.weights import load_weights
from appliance.types import WeightSpec

_SAMPLES = 8  # products compared
_FORWARD_UP_TO = 200_000_000  # parameters; a larger model's forward pass on the CPU would delay the start
_TOKENS = 8
_STATIC_INPUT = 64  # times the static scale of an FP8 product's input, whose largest number is 448 times the scale
_PLAIN = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def self_check(job: Job, source: StoredTensors, rank_files: Sequence[Path]) -> tuple[SelfCheck, ...]:
    """What the source measured; some products against the weights that they stand for; for a small model a forward
    pass on the CPU as well. What ranks share is looked at as a whole. Raises EngineBuildError naming the check that
    failed."""
    results = list(source.checks())
    moved = False  # whether scales were moved within layers
    with StoredEngine(rank_files, job.specs, job.scheme, job.dtype) as stored:
        for spec in _sample([spec for spec in job.specs if spec.kind == "linear"]):
            reference = source.reference(spec, job.device)
            if reference is None:
                moved = True
            else:
                error = _product_error(job, stored, spec, reference)
                limit = _limit(job, job.scheme.of(spec.name), source.exact)
                name = f"{spec.name} against its checkpoint tensors"
                results.append(SelfCheck(name=name, passed=error <= limit, value=error, limit=limit))
        if moved:
            results += check_first_layer(job, stored)
    if job.config.num_parameters <= _FORWARD_UP_TO:
        problem = _forward_problem(job, rank_files)
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


def _limit(job: Job, scheme: PrecisionScheme, exact: bool) -> float:
    """The largest relative error of a product: of a scheme that rounds weights, or of one that was given exactly what
    it stores."""
    by_precision = scheme.facts["tolerance"]
    if exact:
        by_precision = scheme.facts.get("exact_tolerance", by_precision)
    precision: str = job.inputs.precision
    if precision not in by_precision:  # a layer that is stored otherwise than the model
        precision = _PLAIN[job.dtype] if scheme.facts["name"] == "none" else next(iter(by_precision))
    return float(by_precision[precision])


def _product_error(job: Job, stored: StoredEngine, spec: WeightSpec, weight: Tensor) -> float:
    """||y - reference|| / ||reference|| of the stored product with random input; infinite if it is not finite."""
    out_features, in_features = joined_shape(spec)
    scheme = job.scheme.of(spec.name)
    suffixes = scheme.tensors(out_features, in_features, job.dtype)
    tensors = {suffix: stored.read(f"{spec.name}.{suffix}", job.device) for suffix in suffixes}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, in_features, generator=generator)
    if "input_scale" in tensors:  # inputs of the size that the checkpoint was made for
        x = x * (_STATIC_INPUT * tensors["input_scale"].cpu())
    with job.gpu_turn(job.device):
        x = x.to(job.device, job.dtype)
        y = scheme.apply(scheme.prepare(tensors), x, None, job.dtype)[:, :out_features].float()
        reference = x.float() @ weight.t()
        error = float((y - reference).norm() / reference.norm().clamp_min(1e-30))
    return error if np.isfinite(error) else float("inf")


def _forward_problem(job: Job, rank_files: Sequence[Path]) -> str:
    """Load as the CPU backend does and run a few tokens; what is wrong with the logits, "" if nothing."""
    with torch.device("meta"):
        model = job.architecture.Model(job.config, job.scheme, torch.float32)
    if len(rank_files) == 1:
        load_weights(model, rank_files[0], "cpu")
    else:
        with StoredEngine(rank_files, job.specs, job.scheme, job.dtype) as stored:
            model.load(((name, stored.read(name)) for name in stored.names), "cpu")
    model.prepare(_TOKENS)
    token_ids = torch.arange(_TOKENS) * 7 % job.config.vocab_size
    with torch.inference_mode():
        logits: Tensor = model.logits(run_prompt(model, token_ids)[0])
    if tuple(logits.shape) != (_TOKENS, job.config.vocab_size):
        return f"logits have shape {list(logits.shape)}"
    return "" if bool(torch.isfinite(logits).all()) else "logits are not finite"
