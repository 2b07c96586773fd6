"""Builds the image with buildah on a Debian base made by debootstrap, as root, without a daemon.

Everything lies in WORK and is kept between runs: the base, the wheels, buildah's layers. So a second run, where only
the code changed, takes seconds. Knows buildah and pip; what the image should do is in test_image.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from lock_local import ROOT, lines, resolve

WORK = Path(os.environ.get("IMAGE_TEST_DIR", "/var/tmp/appliance-image-test"))
SUITE, PYTHON = "bookworm", (3, 11)  # what Debian 12 has
BASE, IMAGE = f"localhost/appliance-test-{SUITE}", "localhost/appliance-test"
LOCK = ROOT / "requirements-local.lock"


def why_not() -> str | None:
    """One line that says what the test lacks on this machine; None when it can run."""
    if os.geteuid() != 0:
        return "needs root: debootstrap, buildah and crun make file systems and namespaces"
    missing = [tool for tool in ("buildah", "crun", "debootstrap", "unshare", "gcc") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing; on Debian: apt-get install --no-install-recommends {' '.join(missing)}"
    if sys.version_info[:2] != PYTHON:
        return f"the wheels are resolved for this Python, and Debian {SUITE} has {'.'.join(map(str, PYTHON))}"
    free, needed = shutil.disk_usage(_existing(WORK)).free, 12 if driver() == "overlay" else 40
    if free < needed << 30:
        return f"needs {needed} GiB at {WORK} (IMAGE_TEST_DIR chooses another place), {free / 2**30:.0f} GiB are free"
    return None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


@cache
def driver() -> str:
    """overlay, or vfs where that cannot be mounted: in a container, say. vfs copies whole layers and is slow."""
    WORK.mkdir(parents=True, exist_ok=True)
    probe = Path(tempfile.mkdtemp(prefix="probe-", dir=WORK))  # test processes beside this one look, too
    for name in ("lower", "upper", "work", "merged"):
        (probe / name).mkdir()
    options = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/work"
    mount = f"mount -t overlay overlay -o {options} {probe}/merged"
    works = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode == 0
    shutil.rmtree(probe)
    return "overlay" if works else "vfs"


def buildah(*words: str, quiet: bool = True) -> str:
    """Its standard output. Raises CalledProcessError; then its messages are on stderr."""
    storage = ["--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "--storage-driver", driver()]
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(["buildah", *storage, *words], env=environment, capture_output=quiet, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return (done.stdout or "").strip()


def make_base() -> None:
    """A Debian with nothing but what is essential and certificates; no Python."""
    if BASE in buildah("images", "--format", "{{.Name}}"):
        return
    directory = WORK / "base"
    shutil.rmtree(directory, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr, file=sys.stderr)
        done.check_returncode()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(directory), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(directory)


def make_lock_and_wheels() -> Path:
    """`requirements-local.lock` for the index at hand, and a directory with exactly these wheels, their digests
    checked."""
    text = "\n".join(lines(resolve(ROOT))) + "\n"
    if not LOCK.is_file() or LOCK.read_text() != text:  # a lock that is older makes buildah install everything anew
        LOCK.write_text(text)
    wheels = WORK / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "-r", str(LOCK), "-d", str(wheels)], check=True)
    return wheels


def build() -> dict[str, Any]:
    """Build IMAGE from the working tree; the image's configuration, as `docker inspect` has it."""
    WORK.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(WORK).free < 20 << 30:
        buildah("rmi", "--prune", "--force")  # layers of earlier runs; they also save time, so not always
    make_base()
    wheels = make_lock_and_wheels()
    arguments = {"BASE": BASE, "TARGET": "local", "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1", "VERSION": "9.9"}
    flags = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    options = ["--format", "docker", "--network", "host", "--pull-never", "-v", f"{wheels}:/wheels:ro"]
    if driver() == "overlay":
        options.append("--layers")  # kept for the next run; with vfs every step would be a copy of everything
    buildah("bud", *options, *flags, "--tag", IMAGE, str(ROOT))
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]
    return found


if __name__ == "__main__":
    print(why_not() or "")
