"""Text from a data set of the Hugging Face hub, for calibration: its text and jsonl files, as far as they are needed,
into huggingface_hub's own cache layout. No code of a data set is run. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from appliance.checkpoint.hub import HubRepository
from appliance.engines.disk import ensure_writable, free_bytes, no_space
from appliance.engines.meter import ProgressFn
from appliance.errors import CheckpointError

PATTERNS = ["*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz", "*.ndjson", "*.json.gz"]
ENOUGH = 64 << 20  # bytes: files are taken until there are so many
_LARGEST = 2 << 30  # bytes of a file; only its beginning would be used
_MARGIN = 64 << 20  # bytes left free


class HubDataset(HubRepository):
    """One data set at one revision."""

    _files: list[str] | None = None  # that were chosen

    def text(self, progress: ProgressFn | None, free: Callable[[Path], int] = free_bytes) -> Path:
        """Download what is missing; the directory with the files. Raises CheckpointError, NoSpaceError,
        CacheNotWritableError."""
        ensure_writable(self.cache)
        with self._explained():
            files = _enough(self._download(dry_run=True), self.name)
        total = sum(file.file_size or 0 for file in files)
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        if missing and free(self.cache) < missing + _MARGIN:
            raise no_space(self.cache, missing + _MARGIN, free(self.cache), f"downloading {self.name}")
        self._files = [file.filename for file in files]
        with self._explained(), self._watched(total, total - missing, progress if missing else None):
            return Path(self._download())

    def _download(self, *, dry_run: bool = False, local_files_only: bool = False) -> Any:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        return huggingface_hub.snapshot_download(
            self.name,
            repo_type="dataset",
            revision=self.revision,
            cache_dir=self.cache,
            allow_patterns=self._files or PATTERNS,
            token=False if local_files_only else self._token,
            endpoint=self._endpoint,
            dry_run=dry_run,
            local_files_only=local_files_only,
        )

    @property
    def _blobs(self) -> Path:
        return self.cache / f"datasets--{self.name.replace('/', '--')}" / "blobs"


def _enough(files: Iterable[Any], name: str) -> list[Any]:
    """Files for training first, by name, until there is enough text. Raises CheckpointError if there is none."""
    chosen: list[Any] = []
    for file in sorted(files, key=lambda file: ("train" not in file.filename, file.filename)):
        if sum(one.file_size or 0 for one in chosen) >= ENOUGH:
            break
        if (file.file_size or 0) <= _LARGEST:
            chosen.append(file)
    if not chosen:
        raise CheckpointError(
            f"data set {name} has no text that can be read: {', '.join(PATTERNS)} of at most 2 GiB each",
            hint='other formats (parquet, say): convert some of it to lines of {"text": "..."} and name that file',
        )
    return chosen
