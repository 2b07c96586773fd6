"""What the files of a checkpoint should be, where that is written down: by huggingface_hub, which names each large file
after its SHA-256, and by an imported bundle. For starts that cannot ask a hub. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance.engines.archive import MANIFEST, decode, sha256_files
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import CheckpointError, EngineDamagedError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def expected_sha256(path: Path) -> dict[str, str]:
    """SHA-256 by file name, of the files whose content is known. Raises CheckpointError naming a file that was there
    and is not any more."""
    known: dict[str, str] = {}
    listed = path / MANIFEST
    if listed.is_file():
        try:
            manifest = decode(listed.read_bytes())
        except (OSError, EngineDamagedError) as error:
            raise CheckpointError(f"{listed} is damaged: {error}", hint="import the bundle again") from error
        known = {Path(file.name).name: file.sha256 for file in manifest.files if file.name.startswith("models/")}
        missing = sorted(name for name in known if not (path / name).is_file())
        if missing:
            raise CheckpointError(f"{path / missing[0]} is missing", hint="import the bundle again")
    for file in path.iterdir():
        blob = file.resolve()
        if file.is_symlink() and not blob.exists():
            raise CheckpointError(
                f"{file} is missing: what it links to, {blob}, is not there",
                hint="download it again, import its bundle again, or copy the whole cache directory",
            )
        if file.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
            known[file.name] = blob.name
    return known


def check_sha256(known: Mapping[str, str], files: Sequence[Path], progress: ProgressFn | None) -> None:
    """Read those of `files` whose content is known and compare. Raises CheckpointError naming the first wrong one."""
    files = [file for file in files if file.name in known]
    try:
        with ByteMeter(sum(f.stat().st_size for f in files), progress if files else None, detail="checking") as meter:
            found = sha256_files(files, meter)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    for file, digest in zip(files, found):
        if digest != known[file.name]:
            raise CheckpointError(
                f"{file} is damaged: its content does not match its SHA-256",
                hint="remove it and download it again, or import its bundle again",
            )
