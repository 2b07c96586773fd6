"""How benchmarks read their lists of numbers and print: tables for people, one JSON object as the last line."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from appliance import registry
from appliance.errors import SettingsError
from appliance.types import Precision

_console = Console(highlight=False, width=110)


def say(line: str) -> None:
    print(line, flush=True)


class Table:
    """Rows collected, then shown right-aligned."""

    def __init__(self, *columns: str) -> None:
        self._table = RichTable(box=None, pad_edge=False)
        for column in columns:
            self._table.add_column(column, justify="right")

    def row(self, *cells: object) -> None:
        self._table.add_row(*(str(cell) for cell in cells))

    @contextmanager
    def shown(self, title: str, legend: str = "") -> Iterator[None]:
        """Around the rows' making: what there is of them is shown in the end, also where one of them fails."""
        try:
            yield
        finally:
            if self._table.row_count:
                self.show(title)
                if legend:
                    say(legend)

    def show(self, title: str) -> None:
        _console.print(title, style="bold", markup=False)
        _console.print(self._table)
        sys.stdout.flush()


def environment() -> dict[str, Any]:
    """Where and when, for the JSON line."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def numbers(flag: str, text: str, form: str) -> list[tuple[int, ...]]:
    """The entries of a comma-separated list, each of a form such as "NxN", N a number above 0. SettingsError, naming
    flag and form, for one that is not."""
    pattern = re.compile(re.escape(form).replace("N", "([0-9]+)"))
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = pattern.fullmatch(entry)
        values = tuple(int(value) for value in match.groups()) if match else ()
        if not values or 0 in values:
            raise SettingsError(f"{flag} has {entry!r}; entries must be of the form {form}, each N 1 or more")
        found.append(values)
    return found


def precisions(text: str) -> list[Precision]:
    """A comma-separated list of precisions that can be built. SettingsError, naming them, for another one or none."""
    allowed = _known_precisions()
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in wanted if part not in allowed]
    if wrong or not wanted:
        raise SettingsError(f"--precision is {text!r}; allowed: {', '.join(allowed)}")
    return [allowed[part] for part in wanted]


def one_precision(text: str) -> Precision:
    """As `precisions`, where only one can be taken."""
    found = precisions(text)
    if len(found) > 1:
        raise SettingsError(f"--precision is {text!r}; only one is allowed here")
    return found[0]


def one_scheme(text: str) -> tuple[Precision, str | None]:
    """A precision, or a scheme by its name and the precision that it serves. SettingsError like `one_precision`."""
    schemes = registry.plugins("quantization")
    if text.strip() in schemes and text.strip() not in _known_precisions():
        precision: Precision = schemes[text.strip()].facts["precisions"][0]
        return precision, text.strip()
    return one_precision(text), None


def _known_precisions() -> dict[str, Precision]:
    found: dict[str, Precision] = {}
    for plugin in registry.plugins("quantization").values():
        found |= {precision: precision for precision in plugin.facts["precisions"]}
    return found
