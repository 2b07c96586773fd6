"""Which kernels a choice would run on a GPU, in words, and on which GPUs they have been tried: for explanations.

Facts of this build, kept beside the policy so that the control plane can say them without loading a kernel. Each has
its place in the code: products in `quantization/` and `kernels/`, attention in `backends/cuda.py`; that kernels compile
for GPUs that nobody has here is tested (tests/test_triton_compile.py, tests/test_int4_linear.py).
"""

from __future__ import annotations

Capability = tuple[int, int]

MEASURED: dict[Capability, str] = {(9, 0): "an H200"}  # where engines have really run
RANKS_MEASURED = ((2, 1), (4, 1), (1, 2))  # sizes, tensor- and pipeline-parallel, that ran on those GPUs, on one host
COMPILED: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0))  # for which tests compile every kernel

_TENSOR_CORES: Capability = (8, 0)  # from here on Triton and own CUDA C++ use them, and FlashInfer runs
_PERSISTENT: Capability = (9, 0)
_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def persistent_decode(precision: str, capability: Capability) -> bool:
    """Whether decode steps of few sequences may be one persistent kernel."""
    return capability >= _PERSISTENT and capability in MEASURED and precision in ("fp8", "bf16", "int4")


def dealt(capability: Capability) -> bool:
    """Whether ranks that reach each other's memory deal out the rows of a sum and of the norm behind it."""
    return capability >= _PERSISTENT and capability in MEASURED


def products(precision: str, activations: str, capability: Capability) -> str:
    """How linear layers are computed. `activations`: precision of what is not quantized."""
    sixteen = _NAMES[activations]
    tensor_cores = capability >= _TENSOR_CORES
    if precision == "int4":
        few = "own CUDA C++ and Triton kernels" if tensor_cores else "a Triton kernel without tensor cores"
        return f"INT4 weights with {sixteen} activations: {few} for few rows, dequantization and cuBLAS for prompts"
    if precision == "int8":
        few = "own Triton kernels and cuBLAS" if tensor_cores else "cuBLAS"
        return f"INT8 weights and activations by {few}, the rest in {sixteen}"
    if precision == "fp8":
        return f"FP8 weights and activations by own Triton kernels and cuBLAS, the rest in {sixteen}"
    own = " and an own Triton kernel for few rows" if activations != "fp32" and tensor_cores else ""
    return f"{_NAMES[precision]} by cuBLAS{own}"


def attention(activations: str, capability: Capability) -> str:
    if activations == "fp32":
        return "attention in Triton"
    return "attention by FlashInfer" if capability >= _TENSOR_CORES else "attention in Triton without tensor cores"


def tried(capability: Capability) -> str:
    """An honest word on whether anybody has seen it run."""
    dotted = f"{capability[0]}.{capability[1]}"
    if capability in MEASURED:
        return f"run and measured on {MEASURED[capability]} (compute capability {dotted})"
    measured = ", ".join(MEASURED.values())
    if capability in COMPILED:
        compiled = f"tests compile its kernels for compute capability {dotted}"
        return f"{compiled}, but it never ran on such a GPU, only on {measured}"
    return f"nobody has compiled or run it for compute capability {dotted} yet: it only ran on {measured}"


def untried_ranks(tp_size: int, pp_size: int, nodes: int, capability: Capability) -> str | None:
    """What of an engine of several ranks has never run on GPUs, or None; GPUs on which nothing ran have `tried`."""
    if capability not in MEASURED or tp_size * pp_size == 1:
        return None
    untried = [] if (tp_size, pp_size) in RANKS_MEASURED else ["ranks in these numbers"]
    untried += ["several machines"] if nodes > 1 else []
    if not untried:
        return None
    sizes = ", ".join(f"TP{tp}" if pp == 1 else f"PP{pp}" for tp, pp in RANKS_MEASURED)
    return f"{' and '.join(untried)} only ran as tests on the CPU so far; {sizes} on one host are what ran on GPUs"


def described(
    precision: str,
    activations: str,
    capability: Capability,
    head: str | None,
    *,
    sums: str | None = None,
    whole: bool = True,
) -> str:
    """One line. `head`: the precision of lm_head where it is not that of the other layers. `sums`: how several ranks
    add up, "peers" (they read each other's memory) or "host". `whole`: each rank has a part of every layer, and not a
    pipeline's stage."""
    parts = [products(precision, activations, capability)]
    if head is not None:
        parts.append(f"lm_head in {'FP8' if head == 'fp8' else _NAMES[activations]}")
    parts.append(attention(activations, capability))
    if sums is not None:
        parts.append("sums over ranks by " + ("own kernels and NCCL" if sums == "peers" else "NCCL"))
    if persistent_decode(precision, capability) and whole and sums != "host":
        parts.append("decode steps of few sequences in one persistent kernel where that is faster")
    return f"{', '.join(parts)}; {tried(capability)}"
