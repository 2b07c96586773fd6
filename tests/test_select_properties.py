"""Properties of `select` on random machines: what is runnable fits, order does not matter, more memory never hurts."""

from __future__ import annotations

import random

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selection_cases import ALL, BUILTIN, FACTS, FIRST, FULL, GIB, LLAMA_8B, LLAMA_70B, PROFILES, QWEN_2KV, machine

from appliance.profiles import Overrides, explain_text, reasons, select
from appliance.types import Gpu, Hardware

MODELS = [LLAMA_8B, LLAMA_70B, BUILTIN, QWEN_2KV]


def gpus(draw) -> tuple[Gpu, ...]:
    kinds = [machine(name).gpus[0] for name in ("h100-x1", "l4", "t4", "rtx-4090")]
    count = draw(st.integers(0, 4))
    found = []
    for index in range(count):
        kind = draw(st.sampled_from(kinds))
        found.append(
            msgspec.structs.replace(
                kind,
                index=index,
                uuid=f"GPU-{index}",
                free_memory=int(kind.total_memory * draw(st.floats(0, 1))),
                utilization=draw(st.integers(0, 100)),
                healthy=draw(st.booleans()) or draw(st.booleans()),
                links={other: draw(st.sampled_from(["nvlink", "pcie", "none"])) for other in range(count)},
                paths={other: draw(st.sampled_from(["switch", "numa", "system"])) for other in range(count)},
            )
        )
    return tuple(found)


@st.composite
def machines(draw) -> Hardware:
    memory = draw(st.integers(1, 256)) * GIB
    return Hardware(gpus(draw), draw(st.integers(1, 64)), memory, int(memory * draw(st.floats(0, 1))))


asked_for = st.builds(
    Overrides,
    memory_fraction=st.floats(0.1, 1.0),
    max_model_len=st.sampled_from([None, 256, 2048, 8192]),
    max_num_seqs=st.sampled_from([None, 1, 512]),
    tp_size=st.sampled_from([None, 1, 2]),
    replicas=st.sampled_from([None, None, 1, 2]),
    nodes=st.sampled_from([1, 1, 2]),
)
STAGES = msgspec.structs.replace(
    ALL, backends={**ALL.backends, "cuda": msgspec.structs.replace(ALL.backends["cuda"], max_pp=8)}
)
drawn = {
    "hardware": machines(),
    "model": st.sampled_from(MODELS),
    "objective": st.sampled_from(["throughput", "latency", "auto"]),
    "build": st.sampled_from([FIRST, FULL, ALL, STAGES]),
    "overrides": asked_for,
}


def chosen(hardware, model, objective, build, overrides, profiles=PROFILES):
    assume(overrides.nodes == 1 or overrides.replicas in (None, 1))
    return select(hardware, model, profiles, objective, overrides, capabilities=build, gpu_facts=FACTS)


@settings(max_examples=60, deadline=None)
@given(**drawn)
def test_what_is_runnable_fits_free_memory_and_is_built(hardware, model, objective, build, overrides):
    selection = chosen(hardware, model, objective, build, overrides)
    usable = {gpu.uuid: gpu for gpu in hardware.usable_gpus}
    for outcome in selection.outcomes:
        if outcome.status != "runnable":
            continue
        required, backend = outcome.requires_bytes_per_gpu, build.backends[outcome.backend]
        assert outcome.precision in build.schemes and outcome.precision in backend.precisions
        assert outcome.tp_size <= backend.max_tp and outcome.kv_cache in backend.kv_cache
        assert outcome.max_model_len <= model.max_position_embeddings
        if outcome.backend == "cpu":
            assert not usable and required * outcome.replicas <= hardware.free_memory
            continue
        taken = [uuid for group in outcome.device_groups for uuid in group]
        assert len(outcome.device_groups) == outcome.replicas and outcome.device_groups[0] == outcome.devices
        assert outcome.pp_size <= backend.max_pp and outcome.pp_size % overrides.nodes == 0
        assert {len(group) for group in outcome.device_groups} == {outcome.ranks // overrides.nodes}
        assert len(set(taken)) == len(taken) <= len(usable), "a GPU serves one rank of one replica"
        team = [usable[uuid] for uuid in taken]
        assert [gpu.index for gpu in team] == [index for group in outcome.gpu_groups for index in group]
        assert len({gpu.pci_id for gpu in team}) == 1
        for gpu in team:
            assert required <= gpu.free_memory
            stored = outcome.memory.fixed + outcome.max_model_len * outcome.memory.kv_per_token
            assert max(stored, outcome.bytes_per_rank) <= gpu.free_memory * overrides.memory_fraction + 1
        assert outcome.replicas == 1 or build.replicas
        assert overrides.replicas in (None, outcome.replicas)
        assert objective != "latency" or outcome.replicas == (overrides.replicas or 1)
        assert overrides.nodes == 1 or outcome.replicas == 1
        assert outcome.decode_ms > 0 and outcome.tokens_per_second_per_gpu > 0 and outcome.full_batch >= 1
        assert outcome.full_batch <= outcome.max_num_seqs
    runnable = [outcome for outcome in selection.outcomes if outcome.status == "runnable"]
    assert (selection.selected in runnable) if runnable else selection.selected is None
    assert selection.wanted in selection.outcomes
    if selection.selected is not None:  # nothing else would do
        assert not selection.selected.through_host or all(outcome.through_host for outcome in runnable)
        staged = selection.selected.pp_size > overrides.nodes
        assert not staged or all(outcome.pp_size > overrides.nodes for outcome in runnable)
    assert len({outcome.id for outcome in selection.outcomes}) == len(selection.outcomes)
    assert reasons(selection) and explain_text(selection), "whatever it is can be said"


@settings(max_examples=30, deadline=None)
@given(**drawn, seed=st.integers(0, 1000))
def test_selection_does_not_depend_on_the_order_of_profiles(hardware, model, objective, build, overrides, seed):
    shuffled = list(PROFILES)
    random.Random(seed).shuffle(shuffled)
    assert chosen(hardware, model, objective, build, overrides) == chosen(
        hardware, model, objective, build, overrides, shuffled
    )


@settings(max_examples=60, deadline=None)
@given(**drawn, more=st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_more_free_memory_never_makes_less_runnable(hardware, model, objective, build, overrides, more):
    def runnable(machine: Hardware) -> set[str]:
        """Without stages that nobody needs where more memory is free."""
        outcomes = chosen(machine, model, objective, build, overrides).outcomes
        return {o.id for o in outcomes if o.status == "runnable" and o.pp_size == overrides.nodes}

    grown = tuple(
        msgspec.structs.replace(g, free_memory=g.free_memory + int((g.total_memory - g.free_memory) * share))
        for g, share in zip(hardware.gpus, more, strict=False)
    )
    free = hardware.free_memory + int((hardware.memory - hardware.free_memory) * more[-1])
    assert runnable(hardware) <= runnable(msgspec.structs.replace(hardware, gpus=grown, free_memory=free))
