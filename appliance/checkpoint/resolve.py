"""From what a user calls a model to a local directory: a path, the built-in model, or a hub id, which is downloaded.

Knows which name means what; `hub` knows how to download. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from appliance.checkpoint.hub import RESUMABLE_FROM, HubRepository
from appliance.checkpoint.hub_data import HubDataset
from appliance.engines.disk import free_bytes
from appliance.engines.meter import ProgressFn
from appliance.errors import CheckpointError

BUILTIN = "builtin"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    model: str,
    cache: Path,
    *,
    offline: bool = False,
    token: str | None = None,
    progress: ProgressFn | None = None,
    endpoint: str | None = None,
    free: Callable[[Path], int] = free_bytes,
    resumable_from: int = RESUMABLE_FROM,
) -> Path:
    """The local directory of a model: "builtin", a directory, "org/name" or "hf://org/name", either with "@revision".

    Hub files lie in cache/hub, in huggingface_hub's own layout. `endpoint` is another hub than the public one; `free`
    and `resumable_from` are seams for tests. Raises CheckpointError (no such directory, repository or revision; gated;
    no network; offline and not downloaded), NoSpaceError, CacheNotWritableError.
    """
    if model == BUILTIN:
        from appliance import builtin

        return builtin.checkpoint_dir()
    named = model.removeprefix("hf://")
    directory = Path(model).expanduser()
    if named == model and directory.is_dir():
        return directory
    name, _, revision = named.partition("@")
    if not _HUB_ID.fullmatch(name) or (named == model and model.startswith((".", "/", "~"))):
        raise CheckpointError(
            f"model {model!r} is neither a directory here nor a hub id",
            hint='allowed: a directory, "org/name" or "hf://org/name" (also with "@revision"), "builtin"',
        )
    repository = HubRepository(name, revision or "main", cache / "hub", token, endpoint)
    return repository.local() if offline else repository.snapshot(progress, free, resumable_from)


def model_name_of(checkpoint: Path) -> str:
    """What people call the model of a checkpoint's directory: the built-in one's name, the hub's id in its cache, else
    the directory's own name."""
    from appliance import builtin

    path = checkpoint.resolve()
    if path == builtin.checkpoint_dir().resolve():
        return builtin.MODEL_NAME
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def names_dataset(data: str) -> bool:
    """Whether `data`, which is no file or directory here, may name a data set of the hub."""
    named = data.removeprefix("hf://").removeprefix("datasets/")
    given_as_path = named == data and data.startswith((".", "/", "~"))
    return _HUB_ID.fullmatch(named.partition("@")[0]) is not None and not given_as_path


def resolve_text(
    data: str,
    cache: Path,
    *,
    offline: bool = False,
    token: str | None = None,
    progress: ProgressFn | None = None,
    endpoint: str | None = None,
) -> Path:
    """The local file or directory of a text: a path, or a data set of the hub, "org/name", "hf://org/name" or
    "hf://datasets/org/name", with "@revision" if wanted. `offline`: without opening a socket. Raises CheckpointError
    (neither, no text in it, no network, offline and not downloaded), NoSpaceError, CacheNotWritableError."""
    path = Path(data).expanduser()
    named = data.removeprefix("hf://").removeprefix("datasets/")
    if named == data and path.exists():
        return path
    name, _, revision = named.partition("@")
    if not names_dataset(data):
        raise CheckpointError(
            f"text {data!r} is neither a file or directory here nor a data set of the hub",
            hint='allowed: a file, a directory, "org/name" or "hf://org/name" (also with "@revision")',
        )
    dataset = HubDataset(name, revision or "main", cache / "hub", token, endpoint)
    return dataset.local() if offline else dataset.text(progress)
