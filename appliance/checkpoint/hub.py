"""Downloads from the Hugging Face hub into huggingface_hub's own cache layout.

Takes only what is needed (safetensors, JSON, tokenizer), checks free space first, and says in words what is wrong.
Large files are fetched here, since the library begins a file anew in every process: bytes gather in
`blobs/<etag>.part`, are gone on with by the next start, checked, and renamed to the blob that the library then finds.
Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from appliance.checkpoint.files import TOKENIZER_FILES
from appliance.engines.disk import ensure_writable, full, is_full, no_space
from appliance.engines.meter import ByteMeter, ProgressFn
from appliance.errors import CheckpointError, NoSpaceError

ALLOW_PATTERNS = ["*.safetensors", "*.json", *TOKENIZER_FILES]
# Copies of the same weights in other forms, and folders of them.
IGNORE_PATTERNS = ["*/*", "consolidated*.safetensors"]
RESUMABLE_FROM = 8 << 20  # bytes; smaller files are not worth a partial one
_MARGIN = 64 << 20  # bytes left free by a download
_PARALLEL_FILES = 8
_ATTEMPTS = 8  # of a file without a new byte
_CONNECT_TIMEOUT = 10.0  # seconds
_STALL_TIMEOUT = 60.0  # seconds without a byte


class HubRepository:
    """One repository at one revision."""

    def __init__(self, name: str, revision: str, cache: Path, token: str | None, endpoint: str | None) -> None:
        self.name, self.revision, self.cache = name, revision, cache
        self._token, self._endpoint = token, endpoint

    def snapshot(self, progress: ProgressFn | None, free: Callable[[Path], int], resumable_from: int) -> Path:
        """Download what is missing; the local directory. Without a network, what is there if it is whole. Raises
        CheckpointError, NoSpaceError, CacheNotWritableError."""
        ensure_writable(self.cache)
        try:
            with self._explained():
                files = self._download(dry_run=True)
        except NoNetworkError:
            try:
                return self.local()
            except CheckpointError:
                pass
            raise
        missing = [file for file in files if file.will_download]
        needed = sum(file.file_size or 0 for file in missing) - self._partial_bytes()
        if missing and free(self.cache) < needed + _MARGIN:
            raise no_space(self.cache, needed + _MARGIN, free(self.cache), f"downloading {self.name}")
        if not any(file.filename == "config.json" for file in files):
            raise CheckpointError(f"{self.name} has no config.json", hint="is it a model in transformers' format?")
        total = sum(file.file_size or 0 for file in files)
        with self._explained(), self._watched(total, total - needed, progress if missing else None):
            large = [file for file in missing if (file.file_size or 0) >= resumable_from]
            with ThreadPoolExecutor(_PARALLEL_FILES, thread_name_prefix="download") as pool:
                try:
                    for job in [pool.submit(self._fetch, file.filename, file.commit_hash) for file in large]:
                        job.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            return Path(self._download())

    def local(self) -> Path:
        """What is in the cache, without opening a socket. Raises CheckpointError if it is not all there."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(self._download(local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{self.name} (revision {self.revision}) is not in the cache, and downloading is off: "
                f"{self._missing()} is missing",
                hint="import a bundle of it, download it once with access to the network, or copy the cache directory",
            ) from error

    def _missing(self) -> Path:
        """What of the repository's directory is looked for first and not there."""
        repository = self._blobs.parent
        reference = repository / "refs" / self.revision
        if not repository.is_dir():
            return repository
        if (repository / "snapshots" / self.revision).is_dir() or not reference.is_file():
            return reference
        return repository / "snapshots" / reference.read_text(encoding="utf-8").strip()

    def _download(self, *, dry_run: bool = False, local_files_only: bool = False) -> Any:
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

    # -------------------------------------------------- large files

    def _fetch(self, filename: str, commit: str) -> None:
        """One large file into its blob, going on with what an earlier start left."""
        import huggingface_hub
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = huggingface_hub.hf_hub_url(self.name, filename, revision=commit, endpoint=self._endpoint)
        facts = huggingface_hub.get_hf_file_metadata(url, token=self._token, endpoint=self._endpoint)
        if not facts.etag or not facts.size:
            return  # nothing to check it by: left to the library
        blob, part = self._blobs / facts.etag, self._blobs / f"{facts.etag}.part"
        self._blobs.mkdir(parents=True, exist_ok=True)
        with _locked(part) as sink:  # another process with the same file: wait, then find its blob
            if blob.exists():
                part.unlink(missing_ok=True)
                return
            failures = 0
            while (have := part.stat().st_size) < facts.size:
                try:
                    self._append(url, build_hf_headers(token=self._token), sink, have)
                except Exception as error:
                    failures = failures + 1 if part.stat().st_size <= have else 1
                    if failures >= _ATTEMPTS or _is_final(error) or is_full(error):
                        raise
                    time.sleep(min(0.1 * 2**failures, 8.0))
            _check_content(part, facts.etag, facts.size, f"{self.name}/{filename}")
            part.rename(blob)

    def _append(self, url: str, headers: dict[str, str], sink: Any, have: int) -> None:
        """Append the file's bytes from `have` on. Raises the library's and the HTTP client's errors."""
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

        if have:
            headers = headers | {"Range": f"bytes={have}-"}
        timeout = (_CONNECT_TIMEOUT, _STALL_TIMEOUT, _STALL_TIMEOUT, _CONNECT_TIMEOUT)  # connect, read, write, pool
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()  # the error's text is in the body
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # no ranges here: in one piece
                sink.truncate(0)
            for data in response.iter_bytes():
                sink.write(data)
                sink.flush()

    # -------------------------------------------------- progress

    @property
    def _blobs(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}" / "blobs"

    def _partial_bytes(self) -> int:
        return sum(p.stat().st_size for p in self._blobs.glob("*.part")) if self._blobs.is_dir() else 0

    def _present_bytes(self) -> int:
        """Bytes on disk, finished or not. The library may write a file out of order: blocks count, not its length."""
        total = 0
        for path in self._blobs.glob("*") if self._blobs.is_dir() else []:
            try:
                stat = path.stat()
            except FileNotFoundError:  # renamed when it was finished; counted next time
                continue
            total += min(stat.st_size, stat.st_blocks * 512) if path.suffix == ".incomplete" else stat.st_size
        return total

    @contextmanager
    def _watched(self, total: int, there: int, progress: ProgressFn | None) -> Iterator[None]:
        """Look at the growing files, which no version of the library's progress bars can take away. Of `total` bytes
        `there` are on disk already; other revisions may be too."""
        done = threading.Event()
        before = self._present_bytes()
        with ByteMeter(total, progress, detail=f"downloading {self.name}") as meter:
            meter.skip(there)

            def look() -> None:
                while not done.wait(0.5):
                    meter.move_to(min(there + self._present_bytes() - before, total))

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
        except (CheckpointError, NoSpaceError):
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

        if is_full(error):
            return full(self.cache, f"the download of {self.name}")
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
            return NoNetworkError(
                f"downloading {self.name} failed: {type(causes[-1]).__name__}: {causes[-1]}",
                hint="check the network; what is downloaded is kept, start again and it goes on",
            )
        return error

    def _token_hint(self) -> str:
        return "set HF_TOKEN to a token that may read it" if self._token is None else "use another token in HF_TOKEN"


class NoNetworkError(CheckpointError):
    """The hub does not answer, or not to the end."""


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """`path`, made if it is missing, open for appending and locked. Who held the lock before may have removed or
    renamed the file: then the one that is there now."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _is_final(error: Exception) -> bool:
    """An HTTP status that asking again does not change."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _check_content(part: Path, etag: str, size: int, name: str) -> None:
    """Size, and where the etag is the file's SHA-256 (as it is of all large files) the content. What is wrong is
    removed, so that the next start begins anew."""
    problem = None
    if part.stat().st_size != size:
        problem = f"{part.stat().st_size} bytes instead of {size}"
    elif len(etag) == 64:
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != etag:
                problem = "its content does not match its SHA-256"
    if problem is not None:
        part.unlink()
        raise CheckpointError(f"{name} was damaged in the download: {problem}", hint="start again")
