"""Values shared by several layers. Nothing here computes, does I/O or imports torch.

Structs are msgspec so that they cross the process border as they are; all are frozen and refuse unknown fields.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
KvCacheDtype = Literal["auto", "fp32", "fp16", "bf16", "fp8"]
Objective = Literal["latency", "throughput", "auto"]
FinishReason = Literal["stop", "length", "abort", "error"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all shared values."""


# ---------------------------------------------------------------- requests


class SamplingParams(Struct, frozen=True):
    """How to choose tokens. Validated by whoever accepts the request (`server/wire`, `LLM`), trusted below."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    seed: int | None = None  # None: chosen per request by the engine
    max_tokens: int | None = None  # None: up to the context limit
    min_tokens: int = 0  # end-of-sequence and stop ids are suppressed before this many output tokens
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # applied by whoever detokenizes (server, LLM); the engine ignores it
    include_stop_str_in_output: bool = False  # likewise
    skip_special_tokens: bool = True  # likewise
    logprobs: int | None = None  # None: none; n: the sampled token's and the n most likely
    prompt_logprobs: int | None = None  # likewise for prompt tokens

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class EngineRequest(Struct, frozen=True):
    """One sequence for the engine. `n` choices of one HTTP request are n of these."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    # Trailing tokens of the prompt that were generated before an engine restart: they count as output for
    # max_tokens, min_tokens, penalties and the random stream, so a resumed request goes on as if nothing happened.
    num_resumed_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0  # time.time() at the server
    priority: int = 0  # lower runs first; ties by arrival


class TokenLogprobs(Struct, frozen=True):
    """Log probabilities of one position: the token itself and the most likely ones (natural log, after no processing
    but temperature-free log-softmax of the raw logits)."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class EngineOutput(Struct, frozen=True):
    """What one step gave one request. The last one of a request has a finish_reason, and there is exactly one such."""

    request_id: str
    token_ids: list[int] = []  # new tokens; a stop token (eos or stop_token_ids) is included as the last
    logprobs: list[TokenLogprobs] | None = None  # aligned with token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output; entry 0 is None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that caused finish_reason "stop"
    num_cached_tokens: int = 0  # prompt tokens served by the prefix cache
    error: str | None = None  # with finish_reason "error"
    queue_seconds: float = 0.0  # with the first output: from the engine's acceptance to the first step of the request


# ---------------------------------------------------------------- models


class RopeScaling(Struct, frozen=True):
    """Rotary scaling: kind "llama3", "linear", "dynamic" or "yarn", parameters as in config.json."""

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Quantization(Struct, frozen=True):
    """What a checkpoint that others quantized is, read by `checkpoint/quantized/` from its configuration and from the
    names of its tensors. `unquantized` are engine names of the linear layers that it left alone, globs among them."""

    method: str  # its own name: "compressed-tensors", "awq", "gptq", "modelopt", "fp8"
    layout: str  # how its tensors lie in the files, e.g. "pack-quantized", "gemm", "gptq_v2"
    precision: Precision  # "int4", "int8" or "fp8": an engine of another one would quantize twice
    group_size: int = 0  # inputs that share a scale as an engine stores them; 0: a scale per output channel
    symmetric: bool = True  # all zero points are the middle
    act_order: bool = False  # groups are not consecutive inputs: an index says which group an input belongs to
    static_input: bool = False  # FP8: the scale of each layer's input comes with the checkpoint
    kv_cache: str | None = None  # "fp8": scales of an FP8 KV cache come with the checkpoint
    unquantized: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: "int4 (gptq, groups of 128)"."""
        details = [self.method] if self.method == self.layout else [self.method, self.layout]
        if self.group_size:
            details.append(f"groups of {self.group_size}")
        return f"{self.precision} ({', '.join(details)})"


class ModelConfig(Struct, frozen=True):
    """A decoder's shape, read from config.json by `checkpoint.read_model_config`; the same names as there."""

    architecture: str  # Hugging Face class name, e.g. "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens; None: full attention in every layer
    # Layers with the sliding window; None: all of them (when sliding_window is set).
    sliding_window_layers: tuple[int, ...] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k, v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm per head on q and k before the rotary embedding
    hidden_act: str = "silu"
    dtype: str = "bfloat16"  # of the checkpoint: "float32", "float16", "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None  # of a checkpoint that is already quantized

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder, biases left out (they are under 0.1%)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp) + embeddings

    def layers_of_stage(self, stage: int, stages: int) -> range:
        """Layers that one of several pipeline stages has, 1 <= stages <= num_hidden_layers; at least one.

        Shared by what a step reads: the last stage also multiplies by the head, which counts as so many layers as it
        has the weights of; the embedding counts nothing. Of the other stages those at the end get what does not divide,
        as the first has the embedding in its memory."""
        layers, others = self.num_hidden_layers, stages - 1
        assert 0 <= stage < stages <= layers, f"stage {stage} of {stages}, {layers} layers"
        if others == 0:
            return range(layers)
        embeddings = self.vocab_size * self.hidden_size
        blocks = self.num_parameters - embeddings * (1 if self.tie_word_embeddings else 2)
        head = embeddings * layers / blocks
        last = min(range(layers - others, 0, -1), key=lambda n: max(-(-(layers - n) // others), n + head))
        each, rest = divmod(layers - last, others)
        bounds = [i * each + max(0, i - (others - rest)) for i in range(stages)] + [layers]
        return range(bounds[stage], bounds[stage + 1])

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None for full attention."""
        if self.sliding_window is None:
            return None
        if self.sliding_window_layers is None or layer in self.sliding_window_layers:
            return self.sliding_window
        return None


class WeightSpec(Struct, frozen=True):
    """One entry of an engine and the checkpoint tensors it is made of. Architectures yield these (`models/*.py`), the
    builder consumes them, and tests compare them with the module's own parameters."""

    name: str  # of the module in the engine, e.g. "layers.0.attention.qkv" (linear) or of a parameter (plain)
    kind: Literal["linear", "plain"]  # linear: the precision scheme decides the stored form; plain: stored as is
    sources: tuple[str, ...]  # checkpoint tensor names, concatenated along dim 0 in this order
    shapes: tuple[tuple[int, ...], ...]  # expected shape of each source
    # How ranks share it: column: split dim 0 of each source; row: split dim 1; vocabulary: split dim 0, padded at its
    # end where it does not divide; none: every rank has all of it.
    shard: Literal["column", "row", "vocabulary", "none"] = "none"
    bias_sources: tuple[str, ...] = ()  # like sources, for "<name>.bias"; shape = dim 0 of each source
    # Of a column spec, how many heads each source consists of: one that has fewer than there are ranks is copied.
    heads: tuple[int, ...] = ()


# ---------------------------------------------------------------- hardware


class MigSlice(Struct, frozen=True):
    uuid: str
    profile: str  # e.g. "3g.40gb"
    total_memory: int  # bytes
    free_memory: int  # bytes


class Gpu(Struct, frozen=True):
    """One GPU, or one MIG slice offered as a device."""

    index: int
    name: str
    uuid: str
    pci_id: str  # vendor and device of the card, "10de:2335" (vendor first, lower-case hex)
    compute_capability: tuple[int, int]
    total_memory: int  # bytes
    free_memory: int  # bytes, now
    utilization: int = 0  # percent
    healthy: bool = True
    problem: str | None = None  # why not healthy, or why it cannot be used
    mig_enabled: bool = False
    mig_slices: tuple[MigSlice, ...] = ()
    mig_profile: str | None = None  # e.g. "3g.40gb": this entry is a MIG slice, its memory is the slice's
    unified_memory: bool = False  # GPU and CPU share one memory (GB10): the figures are the system's
    # Links to other GPUs of this machine: index -> "nvlink", "pcie" or "none" (no peer access).
    links: dict[int, str] = {}
    # What lies between them on the way over PCIe, as far as the driver says: index -> "switch" (one), "switches",
    # "host" (one host bridge), "numa" (one NUMA node) or "system" (from socket to socket).
    paths: dict[int, str] = {}

    @property
    def usable(self) -> bool:
        """Healthy, new enough for this build and with a driver that is: what selection may use."""
        return self.healthy and self.problem is None


class Hardware(Struct, frozen=True):
    """What was detected, or recorded in a file (`--hardware FILE`)."""

    gpus: tuple[Gpu, ...]  # visible ones (CUDA_VISIBLE_DEVICES applied), in their visible order
    cpu_cores: int
    memory: int  # bytes, total, cgroup limit applied
    free_memory: int  # bytes
    driver_version: str | None = None
    cuda_version: str | None = None  # highest the driver supports, "13.0"
    problem: str | None = None  # one plain line when no GPU can be used although one was looked for
    notes: tuple[str, ...] = ()  # one plain line each: GPUs left out and why

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.usable)


# ---------------------------------------------------------------- engines


class EngineOptions(Struct, frozen=True):
    """How to load an engine: everything that is chosen at start and rebuilds nothing."""

    engine_dir: str
    backend: str  # plug-in name: "cuda", "cpu"
    devices: tuple[str, ...] = ()  # CUDA device UUIDs or indices, one per rank; empty for the CPU
    # Engines like this one that serve beside each other. For a server `devices` lists those of each in turn; in what
    # an engine process gets they are its own. On the CPU they share cores and memory.
    replicas: int = 1
    max_model_len: int = 0  # 0: the model's own limit, or what fits
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_step_stretch: float = 0.0  # how many times longer prefill may make a step that decodes; 0: no limit
    page_size: int = 16  # tokens
    num_pages: int = 0  # 0: from free memory
    memory_fraction: float = 0.9  # of free GPU memory, for weights + KV cache
    kv_cache_dtype: KvCacheDtype = "auto"
    prefix_caching: bool = True
    cuda_graphs: bool = True
    persistent_decode: bool = True  # decode steps of few sequences in one kernel, where that is faster
    # A request's outputs have the same bits whatever else is in the batch; slower.
    batch_invariant: bool = False
    attention: str = "auto"  # "auto", "flashinfer", "triton", "reference"
    seed: int = 0
    verify_digests: bool = True


class EngineInfo(Struct, frozen=True):
    """What a loaded engine is; sent once when it is ready."""

    engine_key: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    page_size: int
    kv_cache_dtype: str  # "fp32", "fp16", "bf16" or "fp8"
    attention: str
    device_name: str
    weight_bytes: int
    kv_cache_bytes: int
    startup_seconds: dict[str, float]  # phase -> seconds, in order


class EngineStats(Struct, frozen=True):
    """A snapshot after a step; counters are totals since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0..1; cached but unreferenced pages count as free
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
