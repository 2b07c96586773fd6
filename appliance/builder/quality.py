"""What quantization did to a model's predictions: the engine's weights against the checkpoint's, before anybody serves.

Both models run over the same short text, one decoder block at a time: a block's weights of either side are read, the
hidden states of either side go through it, and it is dropped. Memory holds two blocks, however large the model. What
the numbers mean: runtime/divergence.py; what becomes of them: engines/quality.py. Knows nothing of how weights were
quantized; reads what was written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from appliance import registry
from appliance.builder.job import Job
from appliance.builder.quality_text import Prompt, default_prompts
from appliance.builder.shards import StoredEngine
from appliance.checkpoint import Checkpoint
from appliance.engines.key import engine_key
from appliance.engines.quality import Quality, judge, numbers, remember
from appliance.errors import EngineQualityError
from appliance.kernels.deferred_scale import materialize
from appliance.layers.decoder import Decoder
from appliance.layers.linear import Linear
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.divergence import Divergence
from appliance.runtime.prompt_batch import prompt_context
from appliance.runtime.weights import read_tensors
from appliance.types import ModelConfig, WeightSpec

_POSITIONS = 1024  # whose predictions are compared
_WINDOW = 513  # tokens of a prompt
_SECONDS = 8.0  # for the comparison, or
_SHARE = 0.5  # of the time that the build has taken so far, whichever is more
_LEAST = 32  # a comparison of fewer says little
_ROWS = 128  # logits computed at a time

Tensors = dict[str, Tensor]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Subject:
    """Whose predictions are compared: facts of the build."""

    config: ModelConfig
    architecture: ModuleType
    specs: Sequence[WeightSpec]
    scheme: PrecisionScheme
    dtype: torch.dtype  # the engine's, of what it leaves unquantized
    device: torch.device
    # Around what is computed there: somebody else may be timing.
    turn: Callable[[torch.device], AbstractContextManager[None]] = field(default=lambda device: nullcontext())


def check_quality(job: Job, rank_files: Sequence[Path], engines: Path, report: Callable[[str], None]) -> Quality | None:
    """Measure finished weight files beside its engine's tokenizer, and judge it by the limit of the request. None
    where the engine has the checkpoint's own numbers. EngineQualityError beyond the limit; `engines`, the store's
    directory, then remembers it."""
    if job.config.quantization is not None or _same_numbers(job):
        return None
    subject = Subject(job.config, job.architecture, job.specs, job.scheme, job.dtype, job.device, job.gpu_turn)
    seconds = max(_SECONDS, _SHARE * (time.monotonic() - job.started))
    quality = measure_quality(rank_files, rank_files[0].parent / "tokenizer", job.checkpoint, subject, seconds)
    report(f"against the checkpoint: {numbers(quality)}")
    engine = f"the {job.inputs.precision} engine of {job.checkpoint.path.name}"
    try:
        return judge(quality, job.request.max_kl, job.config.vocab_size, engine)
    except EngineQualityError:
        remember(engines, engine_key(job.inputs), quality)
        raise


def _same_numbers(job: Job) -> bool:
    """Whether nothing was rounded: no scheme quantizes, and the checkpoint has the engine's dtype."""
    linear = [spec for spec in job.specs if spec.kind == "linear"]
    return all(
        job.scheme.of(spec.name).facts["name"] == "none"
        and all(job.checkpoint.info(name).dtype == job.inputs.dtype for name in spec.sources)
        for spec in linear
    )


def measure_quality(
    rank_files: Sequence[Path],
    tokenizer_dir: Path,
    checkpoint: Checkpoint,
    subject: Subject,
    seconds: float,
    clock: Clock = time.monotonic,
) -> Quality:
    """Compare an engine's weight files, by rank, with the checkpoint that it was made from, in about `seconds` at most:
    over fewer tokens where the machine is slow, and not at all, with a note, where even few would take longer. `clock`
    is a seam for tests."""
    begin = clock()
    config = subject.config
    text, prompts = default_prompts(
        tokenizer_dir, config.vocab_size, _POSITIONS, min(_WINDOW, config.max_position_embeddings)
    )
    with (
        StoredEngine(rank_files, subject.specs, subject.scheme, subject.dtype) as stored,
        torch.inference_mode(),
    ):
        reference, engine = _reference_side(checkpoint, subject), _engine_side(stored, subject)
        comparison = _Comparison((reference, engine), prompts, subject, clock)
        note = comparison.run(begin + seconds)
    found, measured = comparison.divergence, not note
    return Quality(
        text=text,
        reference=str(reference.model.dtype).removeprefix("torch."),
        tokens=found.positions,
        kl_divergence=found.kl_divergence if measured else None,
        top1_agreement=found.top1_agreement if measured else None,
        perplexity=found.perplexity if measured else None,
        reference_perplexity=found.reference_perplexity if measured else None,
        seconds=round(clock() - begin, 3),
        note=note,
    )


# ---------------------------------------------------------------- one side


class _Side:
    """A model of which only the part at work has weights. `read`: the tensors of a part, named as in an engine."""

    def __init__(self, model: Decoder, read: Callable[[str], Tensors]) -> None:
        self.model = model
        self._read = read

    def embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self._fill(self.model.embedding, "embedding.")(token_ids)
        del self.model.embedding.weight
        return embedded

    def layer(self, index: int) -> nn.Module:
        """With its weights, which go when it is dropped."""
        layer = self.model.layers[index]
        self.model.layers[index] = nn.Identity()
        return self._fill(layer, f"layers.{index}.")

    def head(self, x: Tensor, residual: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Hidden states that left the last layer -> a function that gives the logits [n, vocab] of rows, float32."""
        hidden: Tensor = self._fill(self.model.norm, "norm.")(x, residual)
        self._fill(self.model.lm_head, "lm_head.")
        return lambda rows: self.model.logits(hidden[rows])

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        """The module, its parameters read and its products prepared."""
        tensors = self._read(prefix)
        for name, parameter in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            value = tensors.pop(prefix + name)
            value = value.to(parameter.dtype) if value.dtype != parameter.dtype else value
            module.get_submodule(owner).register_parameter(attribute, nn.Parameter(value, requires_grad=False))
        for part in module.modules():
            if isinstance(part, Linear):
                part.prepare()
        return module


def _reference_side(checkpoint: Checkpoint, subject: Subject) -> _Side:
    """The checkpoint's weights as they are, multiplied in their own dtype; on the CPU in float32."""
    first = next(spec for spec in subject.specs if spec.kind == "linear")
    on_cpu = subject.device.type == "cpu"
    dtype = torch.float32 if on_cpu else getattr(torch, checkpoint.info(first.sources[0]).dtype)

    def read(prefix: str) -> Tensors:
        wanted = [spec for spec in subject.specs if f"{spec.name}.".startswith(prefix)]
        names = [name for spec in wanted for name in (*spec.sources, *spec.bias_sources)]
        sources = _read(checkpoint, names, subject.device)
        found: Tensors = {}
        for spec in wanted:
            weight = spec.name if spec.kind == "plain" else f"{spec.name}.weight"
            found[weight] = torch.cat([sources[name] for name in spec.sources]).to(dtype)
            if spec.bias_sources:
                found[f"{spec.name}.bias"] = torch.cat([sources[name] for name in spec.bias_sources]).to(dtype)
        return found

    return _Side(_on_meta(subject, registry.load("quantization", "none").Scheme(), dtype), read)


def _engine_side(stored: StoredEngine, subject: Subject) -> _Side:
    """What was written, computed as the backend of this device does."""
    dtype = torch.float32 if subject.device.type == "cpu" else subject.dtype

    def read(prefix: str) -> Tensors:
        return stored.read_all([name for name in stored.names if name.startswith(prefix)], subject.device)

    return _Side(_on_meta(subject, subject.scheme, dtype), read)


def _on_meta(subject: Subject, scheme: PrecisionScheme, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model: Decoder = subject.architecture.Model(subject.config, scheme, dtype)
    return model


def _read(checkpoint: Checkpoint, names: Iterable[str], device: torch.device) -> Tensors:
    return read_tensors([checkpoint.info(name) for name in dict.fromkeys(names)], device)


# ---------------------------------------------------------------- both sides


class _Comparison:
    """The hidden states of both sides, from the embedding to the logits."""

    def __init__(self, sides: tuple[_Side, _Side], prompts: Sequence[Prompt], subject: Subject, clock: Clock) -> None:
        device = subject.device
        self._turn = subject.turn
        self.divergence = Divergence()
        self._clock = clock
        self._sides = sides
        self._device = device
        self._config = sides[0].model.config
        self._lengths = [len(prompt.ids) for prompt in prompts]
        self._ids = torch.tensor([token for prompt in prompts for token in prompt.ids], device=device)
        starts = itertools.accumulate(self._lengths, initial=0)
        counted = [start + at for start, prompt in zip(starts, prompts, strict=False) for at in range(prompt.positions)]
        self._counted = torch.tensor(counted, device=device)  # rows whose predictions are compared, ascending
        self._following = self._ids[self._counted + 1]
        self._streams: list[tuple[Tensor, Tensor | None]] = []  # (x, residual) of either side
        for side in sides:
            side.model.rotary.build(max(self._lengths), device)

    def run(self, deadline: float) -> str:
        """Through all layers and the logits; why not, or "". `deadline`: of the clock."""
        self._streams = [(side.embed(self._ids), None) for side in self._sides]
        layers = self._config.num_hidden_layers
        for index in range(layers):
            reading, computing = self._layer(index)
            if index == 0 and layers > 1 and self._device.type != "cpu":
                continue  # kernels were loaded besides, which tells nothing of the layers to come
            left = layers - 1 - index + _head_share(self._config)
            allowed = (deadline - self._clock()) / left
            if reading + computing <= allowed:
                continue
            if not self._shorten(int(len(self._ids) * (allowed - reading) / computing)):
                return f"not measured: on this machine it would have taken another {left * (reading + computing):.0f} s"
        self._compare()
        return ""

    def _layer(self, index: int) -> tuple[float, float]:
        """Both sides through a layer; seconds of reading its weights, and of computing with them."""
        reading = computing = 0.0
        for i, side in enumerate(self._sides):
            begin = self._clock()
            layer = side.layer(index)
            self._wait()
            read = self._clock()
            with self._turn(self._device):
                context = prompt_context(self._config, self._lengths, side.model.dtype, self._device)
                x, residual = layer(*self._streams[i], context)
                self._streams[i] = materialize(x, side.model.dtype), residual
                self._wait()
            reading, computing = reading + read - begin, computing + self._clock() - read
        return reading, computing

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _shorten(self, keep: int) -> bool:
        """Go on with the first `keep` tokens: nothing of them depends on those behind. Whether enough are left."""
        count = int((self._counted < keep).sum())
        if count < min(_LEAST, len(self._counted)):
            return False
        self._streams = [(x[:keep], None if r is None else r[:keep]) for x, r in self._streams]
        self._ids = self._ids[:keep]
        self._counted, self._following = self._counted[:count], self._following[:count]
        ends = itertools.accumulate(self._lengths)
        cut = [length - max(0, end - keep) for length, end in zip(self._lengths, ends, strict=True)]
        self._lengths = [length for length in cut if length > 0]
        return True

    def _compare(self) -> None:
        reference, engine = (side.head(*stream) for side, stream in zip(self._sides, self._streams, strict=True))
        for begin in range(0, len(self._counted), _ROWS):
            rows = self._counted[begin : begin + _ROWS]
            with self._turn(self._device):
                self.divergence.add(reference(rows), engine(rows), self._following[begin : begin + _ROWS])


def _head_share(config: ModelConfig) -> float:
    """What the logits cost, in layers."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.vocab_size / (attention + 3 * config.intermediate_size)
