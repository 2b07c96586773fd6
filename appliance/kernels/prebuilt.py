"""Triton's own C code, compiled ahead: a machine or an image with this needs no C compiler to launch kernels.

Triton (3.7 to 3.9) has one C module that talks to the driver, `cuda_utils`; it compiles it on first use, with gcc and
Python's headers. `python -m appliance.kernels.prebuilt DIRECTORY` does that beforehand, with no GPU and no driver; the
image is built with it. `install` makes Triton take what lies there, found by a digest of the source, and compile only
what does not. Triton 3.6 also writes a C launcher for every kernel signature: these are not known before.
Knows how Triton asks for C code to be compiled; knows no kernel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[2] / "prebuilt"  # beside the package, in the image only


def path_of(source: Path, directory: Path) -> Path:
    """Where the module compiled from a C file belongs: named by the source's digest, for one version of Python."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return directory / f"{digest[:32]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(directory: Path) -> Path:
    """Compile Triton's driver module into `directory`. Needs a C compiler and Python's headers, no GPU. Raises
    subprocess.CalledProcessError, or RuntimeError where there is no compiler."""
    from triton.backends.nvidia import driver

    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler; install gcc")
    source = Path(str(driver.__file__)).with_name("driver.c")
    directory.mkdir(parents=True, exist_ok=True)
    target = path_of(source, directory)
    with tempfile.TemporaryDirectory() as scratch:
        # The driver's library comes with the machine. An empty one of that name is enough to link against, but the
        # linker must be told to keep it: nothing is resolved from it here.
        stub = Path(scratch) / "libcuda.so.1"
        shared = [compiler, "-shared", "-fPIC"]
        subprocess.check_call([*shared, "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", str(stub)])
        headers = [*driver.include_dirs, sysconfig.get_path("include", scheme="posix_prefix")]
        compile_ = [*shared, "-O3", "-Wno-psabi", *(f"-I{path}" for path in headers), str(source)]
        link = ["-Wl,--no-as-needed", f"-L{scratch}", "-l:libcuda.so.1", "-o", str(target)]
        subprocess.check_call([*compile_, *link])
    return target


def install(directory: Path = DIRECTORY) -> None:
    """Let Triton take modules from `directory`; without such a directory, nothing changes."""
    if not directory.is_dir():
        return
    from triton import knobs

    def take(name: str, src: str, srcdir: str, *args: Any, **options: Any) -> str:
        found = path_of(Path(src), directory)
        if found.is_file():
            target = Path(srcdir) / found.name
            shutil.copyfile(found, target)
            return str(target)
        return _compile(name, src, srcdir, *args, **options)

    def _compile(*args: Any, **options: Any) -> str:
        from triton.runtime.build import _build

        knobs.build.impl = None  # it would ask us again
        try:
            return str(_build(*args, [], **options))  # []: flags of the compiler, which we are not given
        finally:
            knobs.build.impl = take

    knobs.build.impl = take


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
