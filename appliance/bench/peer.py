"""transformers as the peer of a comparison: its `generate`, with its own batching, on a checkpoint directory.

Greedy and without an end token, so that its outputs have the length asked for. Knows neither our engine nor how results
are shown.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Judgement:
    """What the peer says of an output when it is given the same prefix at every position."""

    positions: int
    same: int  # positions at which its own greedy choice is the output's token
    deficit: float  # the most by which its logit of the output's token is below its best, in deviations of its logits


class Peer:
    """A model loaded by transformers; `with` frees its memory in the end."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Raises what transformers raises for a checkpoint that it cannot load."""
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.version: str = transformers.__version__
        self._device = device
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
        self._model = self._model.to(device).eval()
        self._settings = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model
        release(self._device)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> tuple[list[list[int]], float]:
        """Outputs of `output_len` tokens for prompts of one length, as one batch; seconds that it took. Raises
        torch.OutOfMemoryError where the device is too small for the batch."""
        prompt = torch.tensor(prompts, device=self._device)
        self._wait()
        begin = time.perf_counter()
        output = self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self._settings,
            max_new_tokens=output_len,
        )
        self._wait()
        seconds = time.perf_counter() - begin
        return output[:, prompt.shape[1] :].tolist(), seconds

    @torch.inference_mode()
    def judge(self, prompt: Sequence[int], output: Sequence[int]) -> Judgement:
        """One forward pass over prompt and output."""
        tokens = torch.tensor([[*prompt, *output]], device=self._device)
        logits = self._model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=len(output)).logits[0].float()
        return judge(logits, torch.tensor(output, device=self._device))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def judge(logits: Tensor, output: Tensor) -> Judgement:
    """`logits` float32 [n, vocab] at the positions before `output` int64 [n]."""
    best = logits.max(-1)
    chosen = logits.gather(1, output[:, None])[:, 0]
    deficit = ((best.values - chosen) / logits.std(-1)).max()
    return Judgement(len(output), int((best.indices == output).sum()), float(deficit))


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
