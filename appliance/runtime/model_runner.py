"""Runs step plans on one device: inputs, forward pass (replayed or eager), sampling, results. A pipeline stage receives
hidden states in front of its pass and sends them on behind it; only the last one samples.

Knows no scheduling and no weights' storage form. `execute` only enqueues device work; `PendingStep.result` is the one
place that waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from appliance.batching.step import NewSequence, ScheduledSequence, StepPlan
from appliance.distributed import PipelineStage
from appliance.kernels.attention import Attention
from appliance.kernels.deferred_scale import Product, first_rows
from appliance.layers.attention import ForwardContext
from appliance.layers.decoder import Decoder
from appliance.runtime.cuda_graphs import DecodeGraphs, decode_buckets
from appliance.runtime.input_batch import InputBatch, StepInputs
from appliance.runtime.persistent_choice import choose
from appliance.runtime.persistent_decode import SIZES, PersistentDecode
from appliance.runtime.piecewise_graphs import PiecewiseGraphs, token_buckets
from appliance.runtime.results import PendingStep, PromptChunk, to_host
from appliance.runtime.sampler import Sampler
from appliance.runtime.sharded_sampler import ShardedSampler
from appliance.runtime.timing import time_in_graph
from appliance.types import SamplingParams

log = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 512  # logits of this many prompt rows at a time: 128k vocabulary x 512 x 4 bytes = 262 MB


class DecoderModel(Protocol):
    """What the runner needs of a model (`layers/decoder.py` is one)."""

    def __call__(self, token_ids: Tensor | None, ctx: ForwardContext, received: Tensor | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def raw_logits(self, hidden: Tensor) -> Product: ...


@dataclass(frozen=True)
class RunnerLimits:
    """Sizes fixed at load."""

    max_num_seqs: int
    max_model_len: int  # tokens
    max_num_batched_tokens: int
    page_size: int  # tokens
    vocab_size: int


class ModelRunner:
    """One device's share of every step.

    `kv_caches`: one tensor per layer, layout in kernels/attention.py. Not thread-safe; all device work goes to the
    stream that is current when `execute` is called.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_caches: list[Tensor],
        attention: Attention,
        limits: RunnerLimits,
        device: torch.device,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._attention = attention
        self._limits = limits
        self._batch = InputBatch(
            limits.max_num_seqs, limits.max_model_len, limits.max_num_batched_tokens, limits.page_size, device
        )
        self._sampler = _sampler(model, limits, device)
        self._graphs: DecodeGraphs | None = None
        self._pieces: PiecewiseGraphs | None = None
        self._persistent: PersistentDecode | None = None
        self._prompt_top = [0] * (limits.max_num_seqs + 1)  # top-n of prompt log probabilities, per slot
        self._cuda = device.type == "cuda"
        self._stage = model.stage if isinstance(model, Decoder) else PipelineStage()
        # [tokens, hidden]: what the stage before sent for the step at work; graphs read it from there.
        self._received = torch.zeros(0)
        if isinstance(model, Decoder) and not self._stage.is_first:
            rows = max(limits.max_num_batched_tokens, limits.max_num_seqs)
            self._received = torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=device)

    @property
    def num_stages(self) -> int:
        """Of the pipeline that this runner is a part of."""
        return self._stage.size

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue one step. Plans must come in the order in which the core made them."""
        self._batch.apply(plan)
        if self._stage.is_last:
            self._set_slots(plan)
        decode = all(s.length == 1 for s in plan.scheduled)
        scores_prompt = any(s.prompt_logprobs for s in plan.scheduled)  # needs hidden states, which graphs do not keep
        bucket = self._graphs.bucket(len(plan.scheduled)) if self._graphs and decode and not scores_prompt else None
        pieces = None
        if bucket is None and self._pieces is not None:
            pieces = self._pieces.bucket(sum(s.length for s in plan.scheduled))
        inputs = self._batch.step_inputs(plan.scheduled, bucket, pieces)
        if self._persistent is None or not self._persistent.serves(bucket):
            self._attention.plan(inputs.metadata)
        if not self._stage.is_first:
            # Real tokens only: what stands behind them is anything, as the rows of padding are.
            self._stage.receive(self._received[: inputs.num_tokens])
        if not self._stage.is_last:
            self._stage.send(self._stream(inputs, bucket, pieces))
            return PendingStep(plan, None, None, None, self._cuda)
        # Real lengths: those in the metadata of a padded step are upper bounds.
        sampling = self._sampler.prepare(inputs.slots_host, int(inputs.metadata.seq_lens_host.max()) + 1)
        chunks = None
        if bucket is not None and self._graphs is not None:
            logits = first_rows(self._graphs.replay(bucket), inputs.num_seqs)
        else:
            hidden = self._hidden(inputs) if pieces is None else self._hidden_in_pieces(inputs)
            if scores_prompt:
                chunks = [self._prompt_chunk(i, s, inputs, hidden) for i, s in enumerate(plan.scheduled)]
            if not any(s.samples for s in plan.scheduled):
                return PendingStep(plan, None, sampling, chunks, self._cuda)
            logits = self._model.raw_logits(hidden.index_select(0, inputs.last_rows))
        n = inputs.num_seqs
        slots, positions = inputs.slots[:n], inputs.next_positions[:n]
        sampled = self._sampler.sample(logits, slots, positions, self._batch.token_table, sampling)
        self._batch.token_table.index_put_((inputs.write_slots[:n], positions), sampled.token_ids.to(torch.int32))
        return PendingStep(plan, sampled, sampling, chunks, self._cuda)

    def _set_slots(self, plan: StepPlan) -> None:
        for new in plan.new:
            self._sampler.set_slot(
                new.slot, new.params, new.seed, new.suppressed_token_ids, num_prompt_tokens=new.num_prompt_tokens
            )
            self._prompt_top[new.slot] = new.params.prompt_logprobs or 0

    def _stream(self, inputs: StepInputs, bucket: int | None, pieces: int | None) -> Tensor:
        """What the next stage wants of this one, [tokens, hidden]; nothing writes over it."""
        if bucket is not None and self._graphs is not None:
            replayed = self._graphs.replay(bucket)
            assert isinstance(replayed, Tensor)
            return replayed[: inputs.num_tokens].clone()
        if pieces is not None:
            return self._hidden_in_pieces(inputs)[: inputs.num_tokens].clone()
        return self._hidden(inputs)

    @torch.inference_mode()
    def enable_persistent(self) -> str | None:
        """Let one persistent kernel compute decode steps of few sequences, up to the size from which on the layers are
        faster on these GPUs; says why not where it cannot. By all ranks, with the same outcome. Before
        `capture_graphs`; the model's rotary table and KV scales stay as they are from now on."""
        if not isinstance(self._model, Decoder):
            return "the model is not one of the shared decoder"
        if self._stage.size > 1:
            return "a pipeline stage is not a whole model"
        sizes = [size for size in SIZES if size <= self._limits.max_num_seqs]
        found = choose(self._model, self._kv_caches, self._batch, sizes, self._time_both_ways)
        if isinstance(found, str):
            return found
        self._persistent = found
        return None

    def _time_both_ways(self, persistent: PersistentDecode, size: int) -> tuple[float, float]:
        inputs = self._dummy_decode(size)
        return (
            self._step_microseconds(persistent.logits, inputs),
            self._step_microseconds(self._logits_by_layers, inputs),
        )

    def _step_microseconds(self, step: Callable[[StepInputs], Product], inputs: StepInputs) -> float:
        step(inputs)  # compiles and allocates what it needs
        return time_in_graph([lambda: step(inputs)], launches=3)

    @torch.inference_mode()
    def capture_graphs(self, progress: Callable[[int, int], None]) -> None:
        """Capture decode steps of the buckets that a start needs, and the pieces of steps with prompts.
        `progress(done, total)` after each, per kind."""
        self._graphs = None
        graphs = DecodeGraphs(self._logits, self._dummy_decode, together=_ranks(self._model) > 1)
        sizes = decode_buckets(self._limits.max_num_seqs)
        if self._persistent is not None:
            few = self._persistent.sizes
            sizes = [size for size in sizes if size in few or size > max(few)]
        graphs.capture_first(sizes, progress)
        self._graphs = graphs
        tokens = token_buckets(self._limits.max_num_batched_tokens)
        if tokens and isinstance(self._model, Decoder):
            config, tp = self._model.config, self._model.tp
            q_shape = (config.num_attention_heads // tp.size, config.head_dim)
            self._pieces = PiecewiseGraphs(
                self._forward, self._dummy_tokens, max(tokens), q_shape, self._model.dtype, self._kv_caches[0].device
            )
            # Before serving, all of them: one takes longer than a client should wait for its next token.
            self._pieces.capture_all(tokens, progress)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Ascending numbers of tokens that steps with prompts are padded to."""
        return self._pieces.sizes if self._pieces is not None else ()

    @property
    def can_capture(self) -> bool:
        """Whether `capture_next` has something to do."""
        return self._graphs is not None and self._graphs.waiting

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Capture one more bucket of decode steps, between two steps. False: there are no more."""
        return self._graphs is not None and self._graphs.capture_next()

    def profile(self) -> None:
        """One step of the largest size with every sampling stage on, so that peak memory can be read afterwards.

        Needs a KV cache of at least max_num_batched_tokens tokens; leaves rubbish in it."""
        limits = self._limits
        tokens = min(limits.max_num_batched_tokens, limits.max_model_len)
        pages = list(range(-(-tokens // limits.page_size)))
        params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.1, presence_penalty=0.1, logprobs=5)
        rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        base, extra = divmod(limits.max_num_batched_tokens, rows)
        plan = StepPlan(step_id=-1)
        for slot in range(rows):
            # Every row reads and writes the same pages: this measures memory, not meaning.
            length = min(base + (1 if slot < extra else 0), limits.max_model_len)
            plan.new.append(NewSequence(slot, [0] * length, length, params, 0, (), pages))
            plan.scheduled.append(ScheduledSequence(slot, 0, length, [], samples=True))
        plan.scheduled.sort(key=lambda s: s.length > 1)
        self.execute(plan).result()

    def _logits(self, inputs: StepInputs) -> Product:
        """What a captured step gives: of a stage that is not the last one, hidden states."""
        if not self._stage.is_last:
            return self._hidden(inputs)
        if self._persistent is not None and self._persistent.serves(inputs.padded_seqs):
            return self._persistent.logits(inputs)
        return self._logits_by_layers(inputs)

    def _logits_by_layers(self, inputs: StepInputs) -> Product:
        return self._model.raw_logits(self._hidden(inputs))

    def _hidden(self, inputs: StepInputs) -> Tensor:
        self._batch.gather_page_table(inputs)
        return self._forward(inputs, self._attention)

    def _hidden_in_pieces(self, inputs: StepInputs) -> Tensor:
        assert self._pieces is not None
        self._batch.gather_page_table(inputs)
        return self._pieces.run(inputs.padded_tokens, inputs, self._attention)

    def _forward(self, inputs: StepInputs, attention: Attention) -> Tensor:
        ctx = ForwardContext(
            positions=inputs.positions,
            kv_caches=self._kv_caches,
            metadata=inputs.metadata,
            attention=attention,
        )
        if not self._stage.is_first:
            return self._model(None, ctx, self._received[: inputs.padded_tokens])
        token_ids = self._batch.token_table[inputs.token_slots, inputs.positions].long()
        return self._model(token_ids, ctx)

    def _dummy_decode(self, size: int) -> StepInputs:
        """Inputs of `size` decodes of the padding slot: they read the first entry of page 0, whosever it is, and write
        no keys or values."""
        slot = self._batch.padding_slot
        inputs = self._batch.step_inputs([ScheduledSequence(slot, 0, 1, [], samples=True)] * size, size)
        inputs.metadata.slot_mapping.fill_(-1)
        self._attention.plan(inputs.metadata)
        return inputs

    def _dummy_tokens(self, size: int) -> StepInputs:
        """Inputs of `size` padding tokens, which write no keys or values."""
        slot = self._batch.padding_slot
        return self._batch.step_inputs([ScheduledSequence(slot, 0, 0, [], samples=False)], None, size)

    def _prompt_chunk(
        self, index: int, item: ScheduledSequence, inputs: StepInputs, hidden: Tensor
    ) -> PromptChunk | None:
        """Log probabilities of prompt tokens start+1 .. start+length of a sequence that asked for them."""
        if not item.prompt_logprobs:
            return None
        num_top = self._prompt_top[item.slot]
        count = min(item.length, int(self._batch.num_prompt_tokens[item.slot]) - 1 - item.start)
        begin = int(inputs.metadata.query_start_host[index])
        first = item.start + 1
        targets = self._batch.token_table[item.slot, first : first + max(count, 0)].long()
        parts = []
        for at in range(0, count, _PROMPT_LOGPROB_ROWS):
            end = min(at + _PROMPT_LOGPROB_ROWS, count)
            logits = self._model.raw_logits(hidden[begin + at : begin + end])
            parts.append(to_host(self._sampler.prompt_logprobs(logits, targets[at:end], num_top)))
        return PromptChunk(parts, num_top)


def _ranks(model: DecoderModel) -> int:
    return model.tp.size if isinstance(model, Decoder) else 1


def _sampler(model: DecoderModel, limits: RunnerLimits, device: torch.device) -> Any:
    """A `Sampler`, or on one of several ranks a `ShardedSampler`, which has the same methods."""
    sizes = limits.max_num_seqs + 1, limits.vocab_size, limits.max_model_len + 1
    if isinstance(model, Decoder) and model.tp.size > 1:
        return ShardedSampler(*sizes, device, model.tp)
    return Sampler(*sizes, device)
