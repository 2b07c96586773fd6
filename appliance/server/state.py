"""Everything the routes share: made once by whoever starts the server, filled in as the start goes on.

Knows no route and no process. The supervisor sets `tokenizer` and `engine` when they are known and drives `lifecycle`
and `journal`; the routes only read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.errors import ModelNotFoundError, UnavailableError
from appliance.server.journal import RequestJournal
from appliance.server.lifecycle import Lifecycle
from appliance.server.metrics import ServerMetrics
from appliance.types import EngineInfo

if TYPE_CHECKING:
    from appliance.server.tokenizer import ServerTokenizer
    from appliance.server.tracing import RequestTracer


@dataclass
class ServerState:
    model_names: tuple[str, ...]  # served names; the first is the one answered with
    version: str = "0"
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    api_keys: tuple[str, ...] = ()  # empty: no authentication
    max_body_bytes: int = 32 * 1024 * 1024
    max_waiting_requests: int = 4096  # accepted beyond the engine's max_num_seqs
    max_engine_crashes: int = 3  # a request that was in so many crashes is ended
    model_url: str = ""  # where the checkpoint came from, for /v1/metadata
    license_path: Path | None = None  # of the model, else of the appliance
    manifest: dict[str, Any] = field(default_factory=dict)  # engine.json, for /v1/manifest
    selection: dict[str, Any] = field(default_factory=dict)  # `select --json`, for /v1/metadata
    tokenizer: ServerTokenizer | None = None
    before_seconds: float = 0.0  # from the start of the process to that of the lifecycle
    tracer: RequestTracer | None = None
    started_at: int = field(default_factory=lambda: int(time.time()))  # Unix seconds
    metrics: ServerMetrics = field(init=False)
    journal: RequestJournal = field(init=False)

    def __post_init__(self) -> None:
        assert self.model_names, "a server has at least one model name"
        self.metrics = ServerMetrics(self.model_names[0])
        self.metrics.phase_seconds = self._phase_seconds
        self.journal = RequestJournal(
            self.lifecycle,
            self.metrics,
            max_waiting=self.max_waiting_requests,
            max_engine_crashes=self.max_engine_crashes,
            tracer=self.tracer,
        )

    def _phase_seconds(self) -> dict[str, float]:
        """Of this process by phase, and of the newest engine process by "engine.<phase>": its import of torch runs
        beside the first phases here, the rest is inside of "loading" and "warming"."""
        engine = self.engine
        inside = engine.startup_seconds if engine is not None else {}
        own = {"python": self.before_seconds, **self.lifecycle.phase_seconds}
        return own | {f"engine.{phase}": seconds for phase, seconds in inside.items()}

    @property
    def engine(self) -> EngineInfo | None:
        """What the running engine said of itself; set it when `ipc.Ready` comes. Of several replicas the one with the
        smallest context, so that whatever is accepted fits each of them."""
        return min(self.metrics.engines.values(), key=lambda info: info.max_model_len, default=None)

    @engine.setter
    def engine(self, info: EngineInfo | None) -> None:
        self.metrics.engines = {} if info is None else {0: info}

    @property
    def system_fingerprint(self) -> str | None:
        engine = self.engine
        return f"fp_{engine.engine_key[:12]}" if engine is not None else None

    def resolve_model(self, name: str | None) -> str:
        """The served name to answer with. Raises ModelNotFoundError."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            known = ", ".join(self.model_names)
            raise ModelNotFoundError(f"the model {name!r} does not exist", param="model", hint=f"served here: {known}")
        return name

    def require_tokenizer(self) -> ServerTokenizer:
        """Raises UnavailableError before the tokenizer is loaded."""
        if self.tokenizer is None:
            raise UnavailableError("the tokenizer is not loaded yet", retry_after=self.lifecycle.retry_after)
        return self.tokenizer

    def require_engine(self) -> EngineInfo:
        """Raises UnavailableError before the engine was up for the first time."""
        engine = self.engine
        if engine is None:
            raise UnavailableError("the engine is not loaded yet", retry_after=self.lifecycle.retry_after)
        return engine
