"""From what a user calls a model to a local directory: a path, the built-in model, or a hub id, which is downloaded.

Downloads resume per file, take only what is needed (safetensors, JSON, tokenizer), check free space first, and tell
what is wrong in words. Offline opens no socket. Torch-free.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.checkpoint.files import TOKENIZER_FILES
from appliance.engines.disk import ensure_writable, free_bytes, no_space
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import CheckpointError

BUILTIN = "builtin"
ALLOW_PATTERNS = ["*.safetensors", "*.json", *TOKENIZER_FILES]
# Copies of the same weights in other forms, and folders of them.
IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARGIN = 64 << 20  # bytes left free by a download


def resolve(
    model: str,
    cache: Path,
    *,
    offline: bool = False,
    token: str | None = None,
    progress: ProgressFn | None = None,
    endpoint: str | None = None,
    free: Callable[[Path], int] = free_bytes,
) -> Path:
    """The local directory of a model: "builtin", a directory, "org/name" or "hf://org/name", either with "@revision".

    Hub files lie in cache/hub, in huggingface_hub's own layout. `endpoint` is another hub than the public one, `free` a
    seam for tests. Raises CheckpointError (no such directory, repository or revision; gated; no network; offline and
    not downloaded), NoSpaceError, CacheNotWritableError.
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
    return _Hub(name, revision or "main", cache / "hub", token, endpoint).snapshot(offline, progress, free)


class _Hub:
    """One repository at one revision."""

    def __init__(self, name: str, revision: str, cache: Path, token: str | None, endpoint: str | None) -> None:
        self.name, self.revision, self.cache = name, revision, cache
        self._token, self._endpoint = token, endpoint

    def snapshot(self, offline: bool, progress: ProgressFn | None, free: Callable[[Path], int]) -> Path:
        if offline:
            return self._local()
        ensure_writable(self.cache)
        with self._explained():
            files = self._download(dry_run=True)
            missing = [f for f in files if f.will_download]
            needed = sum(f.file_size or 0 for f in missing) - self._partial_bytes()
            if missing and free(self.cache) < needed + _MARGIN:
                raise no_space(self.cache, needed + _MARGIN, free(self.cache), f"downloading {self.name}")
            if not any(f.filename == "config.json" for f in files):
                raise CheckpointError(f"{self.name} has no config.json", hint="is it a model in transformers' format?")
            with self._watched(sum(f.file_size or 0 for f in files), progress if missing else None):
                return Path(self._download())

    def _local(self) -> Path:
        """What is in the cache, without opening a socket."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(self._download(local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{self.name} (revision {self.revision}) is not (wholly) in {self.cache}, and downloading is off",
                hint="download it once with access to the network, or copy the cache directory from where it is",
            ) from error

    def _download(self, *, dry_run: bool = False, local_files_only: bool = False):  # type: ignore[no-untyped-def]
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()  # ours goes to the dashboard and the log
        return huggingface_hub.snapshot_download(
            self.name,
            revision=self.revision,
            cache_dir=self.cache,
            allow_patterns=ALLOW_PATTERNS,
            ignore_patterns=IGNORE_PATTERNS,
            token=False if local_files_only else self._token,
            endpoint=self._endpoint,
            dry_run=dry_run,
            local_files_only=local_files_only,
        )

    # -------------------------------------------------- progress

    @property
    def _blobs(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}" / "blobs"

    def _partial_bytes(self) -> int:
        return sum(p.stat().st_blocks * 512 for p in self._blobs.glob("*.incomplete")) if self._blobs.is_dir() else 0

    def _present_bytes(self) -> int:
        """Bytes on disk, finished or not. Blocks and not lengths: parallel downloads write out of order."""
        total = 0
        for path in self._blobs.glob("*") if self._blobs.is_dir() else []:
            try:
                stat = path.stat()
            except FileNotFoundError:  # renamed when it was finished; counted next time
                continue
            total += min(stat.st_size, stat.st_blocks * 512) if path.suffix == ".incomplete" else stat.st_size
        return total

    @contextmanager
    def _watched(self, total: int, progress: ProgressFn | None) -> Iterator[None]:
        """Look at the growing files, which no version of the library's own progress bars can take away."""
        done = threading.Event()
        with ByteMeter(total, progress, detail=f"downloading {self.name}") as meter:
            meter.skip(min(self._present_bytes(), total))

            def look() -> None:
                while not done.wait(0.5):
                    meter.move_to(min(self._present_bytes(), total))

            watcher = threading.Thread(target=look, name="download-progress", daemon=True)
            if progress is not None:
                watcher.start()
            try:
                yield
                meter.move_to(total)
            finally:
                done.set()
                if watcher.is_alive():
                    watcher.join()

    # -------------------------------------------------- errors

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the hub's errors into ours."""
        from huggingface_hub import errors

        try:
            yield
        except CheckpointError:
            raise
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.name} is gated: its owner must grant access to the account of the token",
                hint="accept its terms on its page, then " + self._token_hint(),
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self.name} has no revision {self.revision!r}", hint="leave @... out") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self.name} does not exist on the hub, or is private and "
                + ("no token is given" if self._token is None else "the token may not read it"),
                hint=f"check the spelling; for a private one {self._token_hint()}",
            ) from error
        except Exception as error:
            raise self._other(error) from error

    def _other(self, error: Exception) -> Exception:
        """HTTP statuses, a missing network, a full disk; what is none of these stays what it is."""
        from huggingface_hub import errors

        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        for cause in causes:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if isinstance(cause, errors.GatedRepoError | errors.RepositoryNotFoundError):
                try:
                    with self._explained():
                        raise cause
                except CheckpointError as explained:
                    return explained
            if status in (401, 403):
                return CheckpointError(
                    f"the hub refuses access to {self.name} (status {status})", hint=self._token_hint()
                )
        if isinstance(error, OSError | errors.DryRunError | errors.HfHubHTTPError) or "http" in type(error).__module__:
            return CheckpointError(
                f"downloading {self.name} failed: {type(causes[-1]).__name__}: {causes[-1]}",
                hint="check the network; what is downloaded is kept, start again and it goes on",
            )
        return error

    def _token_hint(self) -> str:
        return "set HF_TOKEN to a token that may read it" if self._token is None else "use another token in HF_TOKEN"
