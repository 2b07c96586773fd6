"""Compiled kernels in layers: engine, cache, compiler. Triton compiles for Hopper here, which needs no GPU."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from appliance.kernels import compiled
from appliance.kernels.compiled import CompiledKernels

# Compiles one small kernel twice over; the last line counts where it came from.
_PROGRAM = """
import sys, triton, triton.language as tl
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.cache import get_cache_manager
from appliance.kernels import compiled

@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)

engine = Path(sys.argv[1])
kernels = compiled.CompiledKernels()
built_with = compiled.versions() | ({"triton": sys.argv[3]} if len(sys.argv) > 3 else {})
kernels.open(*((engine, built_with) if engine.exists() else ()))
source = ASTSource(double, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 128})
kernel = compile(source, target=GPUTarget("cuda", 90, 32))
launcher = get_cache_manager("ab" * 32)
if launcher.get_file("launcher.so") is None:
    launcher.put(b"code", "launcher.so")
if sys.argv[2] == "gather":
    kernels.gather(engine / "kernels")
print(len(kernel.asm["cubin"]), kernels.from_engine, kernels.from_cache, kernels.compiled)
"""


@pytest.fixture(autouse=True)
def triton_as_before() -> Iterator[None]:
    yield
    with contextlib.suppress(ImportError):
        from triton import knobs

        del knobs.cache.manager_class


def run_program(engine: Path, cache: Path, *arguments: str) -> tuple[list[int], str]:
    """(cubin bytes, from the engine, from the cache, compiled), and what was logged."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    program = engine.parent / "program.py"
    program.write_text("import logging; logging.basicConfig(level='INFO')\n" + _PROGRAM)
    command = [sys.executable, str(program), str(engine), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()], done.stderr


def test_kernels_come_from_the_engine_then_the_cache_then_the_compiler(tmp_path: Path) -> None:
    engine, cache = tmp_path / "engine", tmp_path / "cache"
    (size, *built), _ = run_program(engine, cache, "gather")
    assert size > 0 and built == [0, 0, 2], "a kernel and a launcher"
    packaged = {path.suffix for path in (engine / "kernels" / "triton").rglob("*") if path.is_file()}
    assert packaged == {".json", ".cubin", ".so"}, "no intermediate forms"

    fresh = tmp_path / "fresh"
    assert run_program(engine, fresh, "use")[0] == [size, 2, 0, 0]
    assert not fresh.exists(), "nothing is written where the engine has all"

    counts, text = run_program(engine, cache, "use", "triton 1.0")
    assert counts == [size, 0, 2, 0] and text.count("compiled with triton 1.0, here is triton") == 1

    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache directory should be")
    counts, text = run_program(tmp_path / "none", blocked, "use")
    assert counts == [size, 0, 0, 2] and "lost with this process" in text


def test_native_code_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_native_cache", lambda: tmp_path / "cache")
    made: list[str] = []

    def make() -> bytes:
        made.append("x")
        return b"cubin"

    first, second, third = CompiledKernels(), CompiledKernels(), CompiledKernels()
    assert first.native("decode-1234", make) == second.native("decode-1234", make) == b"cubin" and made == ["x"]
    assert (first.compiled, second.from_cache) == (1, 1)
    found = second.gather(tmp_path / "engine" / "kernels")
    assert found == {"native": compiled.versions()["native"]}
    first.forget_launched()
    assert first.gather(tmp_path / "none") == {}, "nothing was launched since"
    first.used_native("decode-1234", b"cubin")
    assert first.gather(tmp_path / "again") == found
    assert (tmp_path / "again" / "native" / "decode-1234").read_bytes() == b"cubin"
    monkeypatch.setattr(compiled, "_native_cache", lambda: tmp_path / "elsewhere")
    third.open(tmp_path / "engine", found)
    assert third.native("decode-1234", make) == b"cubin" and made == ["x"] and third.from_engine == 1
    assert third.summary() == "1 from the engine, 0 from the cache, 0 compiled"


def test_unwritable_cache_costs_only_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled, "_native_cache", lambda: tmp_path / "file")
    assert CompiledKernels().native("name", lambda: b"code") == b"code"


def test_flashinfer_modules_are_gathered_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the parts of FlashInfer that are used: its registry of modules, and the directory of prebuilt ones."""
    library = tmp_path / "cache" / "batch_decode.so"
    library.parent.mkdir()
    library.write_bytes(b"module")
    specs = {
        "batch_decode": SimpleNamespace(get_library_path=lambda: library),
        "never_built": SimpleNamespace(get_library_path=lambda: tmp_path / "cache" / "never_built.so"),
    }
    core, environment = ModuleType("flashinfer.jit.core"), ModuleType("flashinfer.jit.env")
    jit = ModuleType("flashinfer.jit")
    core.jit_spec_registry = SimpleNamespace(get_all_specs=lambda: specs)  # type: ignore[attr-defined]
    jit.core, jit.env = core, environment  # type: ignore[attr-defined]
    modules = {"flashinfer": ModuleType("flashinfer"), "flashinfer.jit": jit}
    modules |= {"flashinfer.jit.core": core, "flashinfer.jit.env": environment}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compiled, "versions", lambda: {"flashinfer": "flashinfer 0.7", "native": "sm_90"})

    engine = tmp_path / "engine"
    kernels = CompiledKernels()
    kernels.attach_flashinfer()
    assert not hasattr(environment, "FLASHINFER_AOT_DIR"), "there is no engine yet"
    assert kernels.gather(engine / "kernels") == {"flashinfer": "flashinfer 0.7"}
    assert [p.name for p in (engine / "kernels").rglob("*.so")] == ["batch_decode.so"]

    other = CompiledKernels()
    other.open(engine, {"flashinfer": "flashinfer 0.7"})
    other.attach_flashinfer()
    directory = environment.FLASHINFER_AOT_DIR
    assert (directory / "batch_decode" / "batch_decode.so").read_bytes() == b"module"


def test_flashinfer_is_imported_without_the_rest_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.kernels import flashinfer

    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("whole = True")
    for part in ("decode", "prefill", "utils"):
        (package / f"{part}.py").write_text("from . import shared" if part != "utils" else "")
    (package / "shared.py").write_text("")
    names = ("flashinfer", *(f"flashinfer.{part}" for part in ("decode", "prefill", "utils", "shared")))
    for name in names:  # so that they are gone again afterwards
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    flashinfer.import_lean()
    assert "flashinfer" not in sys.modules or not hasattr(sys.modules["flashinfer"], "whole"), "there may be none"
    for name in names:
        sys.modules.pop(name, None)

    monkeypatch.syspath_prepend(tmp_path)
    flashinfer.import_lean()
    assert set(names) <= sys.modules.keys() and not hasattr(sys.modules["flashinfer"], "whole")
    for name in names:
        del sys.modules[name]
    (package / "prefill.py").write_text("import a_module_that_is_not_there")
    flashinfer.import_lean()
    assert not [name for name in sys.modules if name.startswith("flashinfer")]
    import flashinfer as whole

    assert whole.whole


def test_keys_of_c_modules_do_not_depend_on_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine built where `file` is on the path must be found where it is not."""
    from triton.runtime import build

    CompiledKernels().open()
    with_path = build.platform_key()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.platform_key() == with_path and platform.machine() in with_path
