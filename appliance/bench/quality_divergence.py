"""How far each column's predictions are from the first column's, over a text: perplexity, KL divergence, top-1
agreement, as runtime/divergence.py defines them.

The first model runs over all prompts once; what is kept of it are its last hidden states, on the host, and the product
that makes logits of them. The others are compared with that one prompt batch at a time, so the whole vocabulary counts
however long the text is. Attention is the plain reference: what is measured are numbers, not kernels. Knows loaded
models and the cache's precision; knows nothing of tasks.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from appliance import registry
from appliance.bench.quality_columns import tokenizer_dir
from appliance.builder.quality_text import Prompt, default_prompts, windows
from appliance.errors import SettingsError
from appliance.kernels.fp8_linear import FP8
from appliance.layers.decoder import Decoder
from appliance.runtime.divergence import Divergence
from appliance.runtime.kv_scales import set_kv_scales
from appliance.runtime.loading import KV_DTYPES, PhaseTimer
from appliance.runtime.prompt_batch import prompt_context
from appliance.types import EngineOptions

_TOKENS_AT_ONCE = 4096  # of prompts run together
_ROWS = 256  # logits computed at a time


def prompts_of(
    options: EngineOptions, vocab_size: int, text: str | None, tokens: int, window: int, seed: int
) -> tuple[str, list[Prompt]]:
    """What the text is, and its prompts: of the file `text`, or of the model's default (`seed`: which conversations,
    for the built-in model). SettingsError for a file that cannot be read or has too little text."""
    directory = tokenizer_dir(options)
    if text is None:
        return default_prompts(directory, vocab_size, tokens, window, seed)
    from appliance.server.tokenizer import load_tokenizer

    try:
        content = Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--text {text} cannot be read: {error}", hint="name a file of text in UTF-8") from None
    ids = load_tokenizer(Path(options.engine_dir)).encode(content)
    prompts = windows(ids[: tokens + 1], window)
    if not prompts:
        raise SettingsError(f"--text {text} has {len(ids)} tokens; at least 2 are needed")
    return Path(text).name, prompts


@dataclass
class Compared:
    """What differs at all positions of the prompts, and at those alone that predict answers of the assistant; running
    text has none."""

    everywhere: Divergence = field(default_factory=Divergence)
    answers: Divergence = field(default_factory=Divergence)


class Reference:
    """What is kept of the model that the others are compared with."""

    def __init__(self, model: Decoder, options: EngineOptions, prompts: list[Prompt]) -> None:
        self._prompts = prompts
        self._hidden = [batch.hidden.cpu() for batch in _hidden_states(model, options, prompts)]
        model.layers = nn.ModuleList()  # the logits need the last product only
        del model.embedding.weight
        self._logits: Callable[[Tensor], Tensor] = model.logits

    def compare(self, model: Decoder, options: EngineOptions) -> Compared:
        found = Compared()
        for kept, batch in zip(self._hidden, _hidden_states(model, options, self._prompts), strict=True):
            for at in range(0, len(kept), _ROWS):
                rows = slice(at, at + _ROWS)
                reference = self._logits(kept[rows].to(batch.hidden.device))
                logits, following = model.logits(batch.hidden[rows]), batch.following[rows]
                answers = batch.answers[rows]
                found.everywhere.add(reference, logits, following)
                if answers.any():
                    found.answers.add(reference[answers], logits[answers], following[answers])
        return found


@dataclass(frozen=True)
class _Batch:
    """Of prompts run together, the n positions that are compared; all on the model's device."""

    hidden: Tensor  # [n, hidden], the model's dtype
    following: Tensor  # int64 [n]: the tokens behind them
    answers: Tensor  # bool [n]: whether those belong to an answer


@torch.inference_mode()
def _hidden_states(model: Decoder, options: EngineOptions, prompts: list[Prompt]) -> Iterator[_Batch]:
    device = next(iter(model.norm.parameters())).device
    name = options.kv_cache_dtype
    kv_dtype = model.dtype if name == "auto" else KV_DTYPES[name]
    longest = max(len(prompt.ids) for prompt in prompts)
    for batch in _batches(prompts):
        lengths = [len(prompt.ids) for prompt in batch]
        context = prompt_context(model.config, lengths, kv_dtype, device, longest=longest)
        ids = torch.tensor([token for prompt in batch for token in prompt.ids], device=device)
        positions: list[int] = []
        answers: list[bool] = []
        for start, prompt in zip(itertools.accumulate(lengths, initial=0), batch, strict=False):
            positions += range(start, start + prompt.positions)
            answers += [any(at in answer for answer in prompt.answers) for at in range(prompt.positions)]
        rows = torch.tensor(positions, device=device)
        yield _Batch(model(ids, context)[rows], ids[rows + 1], torch.tensor(answers, device=device))


def _batches(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and sum(len(p.ids) for p in batch) + len(prompt.ids) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def load_model(options: EngineOptions, longest: int) -> Decoder:
    """The engine's model on its device, ready for prompts of up to `longest` tokens, with no batching around it."""
    plugin = registry.load("backends", options.backend)
    model: Decoder = plugin.load(options, lambda *_: None, PhaseTimer()).model
    model.prepare(longest)
    if options.kv_cache_dtype != "auto" and KV_DTYPES[options.kv_cache_dtype] == FP8:
        set_kv_scales(model, options.engine_dir)
    return model


def release() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
