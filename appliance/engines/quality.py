"""What a build measured of an engine's predictions, and whether that is good enough to serve.

Part of engine.json, so that engines that are found or fetched are judged as those that were just built. Knows nothing
of how it was measured (builder/quality.py).
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import msgspec

from appliance.engines.disk import write_atomically
from appliance.errors import EngineQualityError
from appliance.types import Struct

# A model that predicts the text hardly better than by guessing among the vocabulary (random weights, or another
# language) says nothing about what quantization did to it.
_GUESSING = 0.5


class Quality(Struct, frozen=True):
    """The engine's next-token distributions q against the checkpoint's own, p, over a short text."""

    text: str  # which
    reference: str  # dtype in which the checkpoint's weights were multiplied
    tokens: int = 0  # positions at which they were compared; 0: nothing was measured, `note` says why
    kl_divergence: float | None = None  # mean KL(p || q), nats per token; None: not measured
    top1_agreement: float | None = None  # share of positions with the same most likely token
    perplexity: float | None = None
    reference_perplexity: float | None = None
    limit: float | None = None  # largest KL divergence that the profile allowed; None: none applied
    seconds: float = 0.0
    note: str = ""


def numbers(quality: Quality) -> str:
    """For people, on one line; the note where nothing was measured."""
    if quality.kl_divergence is None:
        return quality.note
    return (
        f"KL {quality.kl_divergence:.3g} nats/token, top-1 agreement {quality.top1_agreement or 0:.1%}, perplexity "
        f"{quality.perplexity or 0:.5g} against {quality.reference_perplexity or 0:.5g}, over {quality.tokens} tokens "
        f"of {quality.text}"
    )


def judge(quality: Quality, limit: float | None, vocab_size: int, engine: str) -> Quality:
    """Held against `limit`, in nats per token, which is written into what comes back; None: no limit.

    EngineQualityError, naming `engine` and the numbers, where KL is larger, or anything is not a finite number. No
    limit applies where the checkpoint itself does not predict the text."""
    kl, expected = quality.kl_divergence, quality.reference_perplexity
    if kl is None or expected is None:
        return quality
    if not math.isfinite(kl):
        raise EngineQualityError(
            f"{engine} computes numbers that are not finite",
            hint="are there NaN or infinite weights in the checkpoint? If not, choose another precision",
        )
    if limit is None:
        return quality
    if expected > _GUESSING * vocab_size:
        note = f"not judged: the checkpoint itself does not predict {quality.text} (perplexity {expected:.4g})"
        return msgspec.structs.replace(quality, note=note)
    if kl > limit:
        raise EngineQualityError(
            f"{engine} differs too much from its checkpoint: {numbers(quality)}; its profile allows KL {limit:g}",
            hint="choose a profile of another precision, for example bf16, or let --on-quality-failure do it",
        )
    return msgspec.structs.replace(quality, limit=limit)


# ---------------------------------------------------------------- engines that were refused


def remember(engines: Path, key: str, quality: Quality) -> None:
    """Keep what an engine was refused for, so that the next start need not build it to know. `engines`: the store's
    directory."""
    path = _path(engines, key)
    with contextlib.suppress(OSError):  # it is built once more, then
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(quality))


def recall(engines: Path, key: str) -> Quality | None:
    """What is known of an engine that was refused; None if nothing is."""
    try:
        return msgspec.json.decode(_path(engines, key).read_bytes(), type=Quality)
    except (OSError, msgspec.DecodeError):
        return None


def _path(engines: Path, key: str) -> Path:
    return engines / ".refused" / f"{key}.json"
