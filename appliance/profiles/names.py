"""Candidates of the profiles (a profile at one tensor- and pipeline-parallel size), their names and ids, and back.

Every name or id that a command prints is accepted as a profile again, in any case; an id also by its first 8 digits or
more. A miss names the nearest known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache

from appliance.errors import ProfileError
from appliance.profiles.load import Profile
from appliance.strict import nearest
from appliance.types import Struct

MIN_ID_PREFIX = 8
_MAX_TP, _MAX_PP = 64, 8  # sizes that a user may name beyond a profile's own tp_sizes


class Candidate(Struct, frozen=True):
    profile: Profile
    tp_size: int
    pp_size: int = 1

    @property
    def name(self) -> str:
        """ "fp8-tp1", "fp8-tp2-pp2"."""
        return f"{self.profile.name}-tp{self.tp_size}" + (f"-pp{self.pp_size}" if self.pp_size > 1 else "")

    @property
    def id(self) -> str:
        """sha256 in hex over what identifies it; stays the same while the YAML's tuning values change."""
        return _digest(self.profile.name, self.profile.precision, self.profile.backend, self.tp_size, self.pp_size)


class Named(Struct, frozen=True):
    """What a user's string names: a profile, and one candidate of it unless the sizes are None."""

    profile: str
    tp_size: int | None = None
    pp_size: int | None = None


@cache
def _digest(*parts: str | int) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def candidates(
    profiles: Iterable[Profile], tp_size: int | None, pp_size: int | None, nodes: int = 1
) -> list[Candidate]:
    """All, in order of name; a size that the user asks for is one of them even if no profile lists it. On several nodes
    each has a stage, unless the user asks for more of them."""
    stages = {pp_size or nodes} if nodes > 1 else {1, pp_size or 1}
    return [
        Candidate(profile, tp, pp)
        for profile in sorted(profiles, key=lambda p: p.name)
        for tp in sorted({*profile.tp_sizes, *([tp_size] if tp_size else [])})
        for pp in sorted(stages)
    ]


def staged(profiles: Iterable[Profile], tp_size: int | None, most: int, nodes: int = 1) -> list[Candidate]:
    """Candidates with more stages than a node needs, which are looked at where nothing else fits: those of up to `most`
    ranks on a node, or of 8 stages in all."""
    return [
        Candidate(profile, tp, pp)
        for profile in sorted(profiles, key=lambda p: p.name)
        for tp in sorted({tp_size} if tp_size else {*profile.tp_sizes})
        for pp in range(2 * nodes, _MAX_PP + 1, nodes)
        if tp * pp <= most * nodes
    ]


def resolve(text: str, profiles: Sequence[Profile]) -> Named:
    """What `text` names: a profile ("fp8"), a candidate ("fp8-tp1"), an id or the start of one.

    ProfileError if it names nothing or several, with the nearest known.
    """
    wanted = text.strip().lower()
    for profile in profiles:
        if profile.name.lower() == wanted:
            return Named(profile.name)
    by_id: dict[str, Candidate] = {}
    for profile in profiles:
        for tp in range(1, _MAX_TP + 1):
            for candidate in (Candidate(profile, tp, pp) for pp in range(1, _MAX_PP + 1)):
                if candidate.name.lower() == wanted:
                    return Named(profile.name, candidate.tp_size, candidate.pp_size)
                by_id[candidate.id] = candidate
    matching = [c for key, c in by_id.items() if len(wanted) >= MIN_ID_PREFIX and key.startswith(wanted)]
    if len(matching) == 1:
        return Named(matching[0].profile.name, matching[0].tp_size, matching[0].pp_size)
    if matching:
        raise ProfileError(f"the profile id {text!r} is ambiguous: write more of its digits")
    known = [p.name for p in profiles] + [c.name for c in candidates(profiles, None, None)]
    length = max(len(wanted), MIN_ID_PREFIX)  # ids may be cut off, and are compared as long as what was typed
    near = nearest(wanted, [*known, *(c.id[:length] for c in candidates(profiles, None, None))])
    raise ProfileError(
        f"there is no profile {text!r}" + (f", did you mean {near!r}?" if near else ""),
        hint=f"profiles are {', '.join(sorted(p.name for p in profiles))}, each with -tp1, -tp2, …, or an id "
        f"(at least {MIN_ID_PREFIX} digits) as list-model-profiles prints them",
    )
