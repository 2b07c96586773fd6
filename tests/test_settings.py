"""The settings table: precedence, origins, unknown names, bad values, and that flags, variables and keys agree."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from appliance import settings as module
from appliance.errors import SettingsError
from appliance.settings import Settings, add_flags, child_environment, load, specs


def parse_flags(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(argv))


def test_defaults_have_origin_default() -> None:
    settings = load({}, {})
    assert settings == Settings()
    assert settings.port == 8000 and settings.prefix_caching is True and settings.memory_fraction == 0.9
    assert {str(settings.origin(name)) for name in specs()} == {"default"}
    assert settings.warnings == ()


def test_precedence_and_origins(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("port: 1001\nhost: 127.0.0.1\nmax-num-seqs: 7\nseed:\n")
    flags = parse_flags("--config", str(config), "--port", "1003")
    settings = load(flags, {"APPLIANCE_PORT": "1002", "NIM_MAX_MODEL_LEN": "512", "APPLIANCE_HOST": ""})
    settings = settings.with_profile("fp8-tp1", {"max_num_seqs": 9, "max_num_batched_tokens": 99})
    assert (settings.port, str(settings.origin("port"))) == (1003, "command line (--port)")
    assert (settings.max_model_len, str(settings.origin("max_model_len"))) == (512, "environment (NIM_MAX_MODEL_LEN)")
    assert (settings.host, str(settings.origin("host"))) == ("127.0.0.1", f"config file ({config})")
    assert (settings.max_num_seqs, settings.origin("max_num_seqs").source) == (7, "config file")
    assert (settings.max_num_batched_tokens, str(settings.origin("max_num_batched_tokens"))) == (
        99,
        "profile (fp8-tp1)",
    )
    assert (settings.seed, settings.origin("seed").source) == (0, "default")
    assert load({}, {"APPLIANCE_PORT": "1002", "APPLIANCE_CONFIG": str(config)}).port == 1002


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("NIM_MODEL_NAME", "org/name", "model", "org/name"),
        ("NIM_SERVED_MODEL_NAME", "a, b", "served_model_name", ("a", "b")),
        ("NIM_CACHE_PATH", "/c", "cache", Path("/c")),
        ("NIM_KVCACHE_PERCENT", "0.5", "memory_fraction", 0.5),
        ("NIM_ENABLE_KV_CACHE_REUSE", "0", "prefix_caching", False),
        ("NIM_DISABLE_CUDA_GRAPH", "1", "cuda_graphs", False),
        ("NIM_DISABLE_CUDA_GRAPH", "0", "cuda_graphs", True),
        ("HF_HUB_OFFLINE", "1", "offline", True),
        ("NIM_DISABLE_MODEL_DOWNLOAD", "true", "offline", True),
        ("NIM_TENSOR_PARALLEL_SIZE", "2", "tp_size", 2),
        ("NIM_SERVER_PORT", "9000", "port", 9000),
        ("NIM_JSONL_LOGGING", "1", "log_json", True),
        ("NIM_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("APPLIANCE_PRECISION", "FP8", "precision", "fp8"),
    ],
)
def test_names_that_users_know(variable: str, value: str, name: str, expected: object) -> None:
    settings = load({}, {variable: value})
    assert getattr(settings, name) == expected
    assert settings.origin(name).detail == variable


def test_own_name_beats_alias_and_says_so() -> None:
    settings = load({}, {"APPLIANCE_PORT": "1", "NIM_SERVER_PORT": "2"})
    assert settings.port == 1
    assert settings.warnings == ("NIM_SERVER_PORT is overridden by APPLIANCE_PORT",)
    assert load({}, {"APPLIANCE_PORT": "1", "NIM_SERVER_PORT": "1"}).warnings == ()


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"APPLIANCE_PORT": "eighty"}, ["APPLIANCE_PORT", "'eighty'", "from 1 to 65535"]),
        ({"APPLIANCE_PORT": "70000"}, ["APPLIANCE_PORT", "'70000'", "from 1 to 65535"]),
        ({"NIM_KVCACHE_PERCENT": "90"}, ["NIM_KVCACHE_PERCENT", "'90'", "0.05 to 1"]),
        ({"APPLIANCE_OBJECTIVE": "cheap"}, ["APPLIANCE_OBJECTIVE", "'cheap'", "latency, throughput"]),
        ({"APPLIANCE_REQUIRE_GPU": "maybe"}, ["APPLIANCE_REQUIRE_GPU", "'maybe'", "true or false"]),
        ({"NIM_SSL_MODE": "TLS"}, ["ssl_mode", "ssl_certs_path"]),
        ({"NIM_PEFT_SOURCE": "/loras"}, ["NIM_PEFT_SOURCE", "not supported yet"]),
    ],
)
def test_bad_values_name_variable_value_and_what_is_allowed(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load({}, environ)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.exit_code == 2


def test_bad_flag_and_config_values(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--max-num-seqs: '0' is not allowed"):
        load(parse_flags("--max-num-seqs", "0"), {})
    config = tmp_path / "c.yaml"
    for text, message in [
        ("prot: 1", "unknown setting 'prot'; did you mean port"),
        ("port: [1]", "port: .* is not allowed"),
        ("max_num_seqs: 1.5", "max_num_seqs: 1.5 is not allowed"),
        ("- 1", "expected settings by name, found a list"),
        ("a: [", "cannot be read"),
        ("port: 1\nseed: 2\nport: 3", "the key 'port' is given twice .*line 3"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is given twice"),
    ]:
        config.write_text(text)
        with pytest.raises(SettingsError, match=message):
            load({"config": str(config)}, {})
    with pytest.raises(SettingsError, match="cannot be read"):
        load({"config": str(tmp_path / "none.yaml")}, {})


def test_unknown_variables_are_reported_with_the_nearest() -> None:
    warnings = load({}, {"NIM_MAX_MODEL_LENGTH": "1", "APPLIANCE_XYZZY": "1", "OTHER_PORT": "1"}).warnings
    assert warnings == (
        "APPLIANCE_XYZZY is not a setting and does nothing",
        "NIM_MAX_MODEL_LENGTH is not a setting and does nothing; did you mean NIM_MAX_MODEL_LEN?",
    )
    assert load({}, {"NIM_OTEL_METRICS_EXPORTER": "otlp"}).warnings == (
        "NIM_OTEL_METRICS_EXPORTER is set, but metrics are at /metrics only",
    )
    assert load({}, {"NIM_ENABLE_OTEL": "0", "NIM_ENABLE_AUTO_TOOL_CHOICE": "false"}).warnings == ()


def test_kubernetes_service_links_are_not_settings() -> None:
    """A Service named "appliance" puts these into every pod of its namespace."""
    environ = {
        "APPLIANCE_PORT": "tcp://10.0.0.7:8000",
        "APPLIANCE_SERVICE_HOST": "10.0.0.7",
        "APPLIANCE_SERVICE_PORT": "8000",
        "APPLIANCE_SERVICE_PORT_HTTP": "8000",
        "APPLIANCE_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "APPLIANCE_PORT_8000_TCP_ADDR": "10.0.0.7",
        "NIM_LLM_PORT": "tcp://10.0.0.8:8000",
    }
    settings = load({}, environ)
    assert settings.port == 8000 and settings.warnings == ()


def test_secrets_are_never_shown() -> None:
    settings = load({}, {"APPLIANCE_API_KEYS": "k1,k2", "HF_TOKEN": "hf_secret"})
    shown = " ".join(settings.shown(name) for name in specs()) + repr(settings.origins)
    assert "k1" not in shown and "hf_secret" not in shown and "(set)" in shown
    assert "hf_secret" not in repr(settings) and "k1" not in repr(settings)


def test_every_setting_has_flag_and_help_and_parses_its_own_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for spec in specs().values():
        assert spec.flag in text and spec.help
        if spec.default not in (None, ()):
            assert spec.parse(spec.default, "default") == spec.default
    assert parse_flags("--no-prefix-caching") == {"prefix_caching": False}
    assert load(parse_flags("--no-prefix-caching"), {}).prefix_caching is False


def test_only_settings_reads_the_environment() -> None:
    package = Path(module.__file__).parent
    readers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)\b|from os import .*(environ|getenv)", path.read_text(encoding="utf-8"))
    }
    assert readers == {"settings.py"}


def test_child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_API_KEYS", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in child_environment(load({}, {}))
    environment = child_environment(load({"offline": True}, {}))
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "APPLIANCE_API_KEYS" not in environment


def test_kernels_have_a_place_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    good = child_environment(load({"cache": str(tmp_path / "cache")}, {}))
    assert good["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "kernels" / "triton")
    (tmp_path / "file").write_text("")
    spare = Path(child_environment(load({"cache": str(tmp_path / "file")}, {}))["FLASHINFER_WORKSPACE_BASE"])
    assert tmp_path not in spare.parents and spare.stat().st_mode & 0o077 == 0
