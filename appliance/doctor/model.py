"""Checks of what is to be served: the model here or on the hub, the room that it takes, and where engines come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from appliance import checkpoint
from appliance.doctor.check import Check
from appliance.engines import EngineTransferError, is_local, reach
from appliance.engines.disk import ensure_writable, free_bytes, gib
from appliance.engines.manifest import MANIFEST_NAME
from appliance.engines.patience import OutOfPatience, Patience
from appliance.errors import ApplianceError
from appliance.settings import Settings

_DISK_NEEDED = 2 << 30  # bytes: less than this holds no model worth serving
_REMOTE_SECONDS = 5.0  # for another machine to answer


def check_model(settings: Settings) -> list[Check]:
    """The model and the room for it: the second needs what the first learned."""
    if settings.model == "builtin":
        return [Check("model", "ok", "the built-in model is part of the appliance"), check_disk(settings, 0, 64 << 20)]
    given = Path(settings.model).expanduser()
    if (given / MANIFEST_NAME).is_file():
        return [
            Check("model", "ok", f"{given} is an engine: nothing is downloaded or built"),
            check_disk(settings, 0, 0),
        ]
    if given.is_dir() or settings.offline:
        return _check_local(settings)
    return _check_hub(settings)


def _check_local(settings: Settings) -> list[Check]:
    try:
        path = checkpoint.resolve(settings.model, settings.cache_dir, offline=True)
        files = checkpoint.content_files(path)
        published = checkpoint.read_model_config(path).quantization
    except ApplianceError as error:
        return [
            Check("model", "failed", error.message, error.hint or "name another model"),
            check_disk(settings, 0, None),
        ]
    size = sum(file.stat().st_size for file in files)
    kind = "" if published is None else f", already quantized to {published.label}"
    return [Check("model", "ok", f"{path} has {gib(size)}{kind}"), check_disk(settings, 0, size)]


def _check_hub(settings: Settings) -> list[Check]:
    """Egress and token, by asking for the model that would be downloaded."""
    found = ask_hub(settings)
    if isinstance(found, Check):
        return [found, check_disk(settings, None, None)]
    siblings = found.siblings or []
    size = sum(file.size or 0 for file in siblings if file.rfilename.endswith(".safetensors"))
    try:
        checkpoint.resolve(settings.model, settings.cache_dir, offline=True)
        here = True
    except ApplianceError:
        here = False
    who = "with the token" if settings.hf_token else "without a token"
    state = "is in the cache" if here else "is to be downloaded"
    check = Check("model", "ok", f"{found.id} can be read {who}; {gib(size)} of weights, which {state}")
    return [check, check_disk(settings, 0 if here else size, size)]


def ask_hub(settings: Settings) -> Any:
    """What the hub says of the model, or the check that says why it does not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = settings.model.removeprefix("hf://").partition("@")
    api = HfApi(token=settings.hf_token)

    def ask() -> Any:
        return api.model_info(name, revision=revision or None, timeout=_REMOTE_SECONDS, files_metadata=True)

    try:
        return Patience(2 * _REMOTE_SECONDS).run([ask])[0]
    except GatedRepoError:
        return Check("model", "failed", f"{name} is gated", "accept its terms on its page, and set HF_TOKEN")
    except RevisionNotFoundError:
        return Check("model", "failed", f"{name} has no revision {revision!r}", "leave @... out")
    except RepositoryNotFoundError:
        who = "with the token" if settings.hf_token else "without a token"
        fix = "check the name; for a private model set HF_TOKEN to a token that may read it"
        return Check("model", "failed", f"{name} is not to be found {who}", fix)
    except OutOfPatience:
        problem = f"no answer within {2 * _REMOTE_SECONDS:g} s"
    except Exception as error:  # whatever the network does: it is said, not raised
        problem = f"{type(error).__name__}: {error}"
    fix = "allow HTTPS to the hub, set HTTPS_PROXY, or import a bundle made elsewhere and set HF_HUB_OFFLINE=1"
    return Check("model", "failed", f"the hub cannot be asked: {problem}", fix)


def check_disk(settings: Settings, download: int | None, checkpoint_bytes: int | None) -> Check:
    """Room for what is downloaded and for an engine, which takes no more than its checkpoint. None: not known."""
    free = free_bytes(settings.cache_dir)
    message = f"{gib(free)} free at {settings.cache_dir}"
    fix = "free some, mount a larger volume there, or choose another directory with --cache"
    if download is None or checkpoint_bytes is None:
        return Check("disk", "failed" if free < _DISK_NEEDED else "ok", message, fix)
    message += f"; {gib(download)} to download, {gib(checkpoint_bytes)} for an engine at most"
    if free < download:
        return Check("disk", "failed", message, fix)
    if free < download + checkpoint_bytes:
        return Check("disk", "warning", message, f"{fix}; an engine of a smaller precision may fit")
    return Check("disk", "ok", message)


def check_engine_source(settings: Settings) -> Check:
    """Whether the engine source answers, and takes engines if they are to be published there."""
    source = settings.engine_source
    if source is None:
        return Check("engine source", "skipped", "none is set: engines are built here")
    if settings.offline and not is_local(source):
        fix = "unset APPLIANCE_ENGINE_SOURCE, or name a directory"
        return Check("engine source", "warning", "offline: the engine source is not asked", fix)
    try:
        shown = reach(source, min(settings.engine_source_timeout, _REMOTE_SECONDS))
        if settings.engine_publish and "://" not in source:
            ensure_writable(Path(source))
    except ApplianceError as error:
        fix = error.hint or "check the URL; a start builds the engine all the same"
        status = "failed" if not isinstance(error, EngineTransferError) else "warning"
        return Check("engine source", status, error.message, fix)  # type: ignore[arg-type]
    return Check("engine source", "ok", f"{shown} answers")
