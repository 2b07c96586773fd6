"""The built-in model: tasks and splits, tokenizer, batches, network against transformers, and training end to end."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from appliance.builtin import MODEL_NAME, checkpoint_dir, small_talk, tasks, tokenizer, words
from appliance.builtin.attention import attention_over, pack
from appliance.builtin.data import SHARES, BatchSource, Packer, recall_plan
from appliance.builtin.generate import generate
from appliance.builtin.network import Network, NetworkConfig
from appliance.builtin.optimizer import Optimizer, orthogonalize

TINY = NetworkConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1)
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train_tokenizer(samples_per_task=300)


@pytest.fixture(scope="module")
def encoder(trained: Tokenizer) -> tokenizer.ChatEncoder:
    return tokenizer.ChatEncoder(trained)


# ---------------------------------------------------------------- tasks


def test_importing_the_tasks_needs_no_torch() -> None:
    code = (
        "import sys, appliance.builtin.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_are_fixed_by_the_seed_and_splits_are_disjoint(task: str) -> None:
    evaluation = tasks.evaluation_set(task, 40, seed=3)
    assert evaluation == tasks.evaluation_set(task, 40, seed=3) != tasks.evaluation_set(task, 40, seed=4)
    assert len({json.dumps(s.messages) for s in evaluation}) == 40
    rng = random.Random(0)
    training = [tasks.sample(task, rng) for _ in range(200)]
    assert not {s.key for s in evaluation} & {s.key for s in training}
    assert all(s.messages[-1]["role"] == "user" for s in evaluation + training)


def test_score_is_exact_up_to_surrounding_space() -> None:
    drawn = tasks.sample("addition", random.Random(0))
    assert tasks.score(drawn, f" {drawn.answer}\n")
    assert not tasks.score(drawn, drawn.answer + "0")
    assert not tasks.score(drawn, "")


@pytest.mark.parametrize(
    ("task", "operation"), [("addition", operator.add), ("subtraction", operator.sub), ("multiplication", operator.mul)]
)
def test_arithmetic_answers_are_right(task: str, operation: object) -> None:
    assert callable(operation)
    for drawn in tasks.evaluation_set(task, 100):
        text = drawn.messages[-1]["content"]
        a, b = (int(n) for n in re.findall(r"\d+", text))
        steps = drawn.answer.split(" = ")
        assert int(steps[-1]) == operation(a, b)
        for step in steps:
            assert sum(int(np.prod([int(f) for f in part.split(" * ")])) for part in step.split(" + ")) == operation(
                a, b
            )


def test_sorting_copying_and_json_answers_are_right() -> None:
    for drawn in tasks.evaluation_set("sorting", 100):
        text = drawn.messages[-1]["content"]
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        down = "descending" in text or "largest to" in text
        assert [int(n) for n in drawn.answer.split()] == sorted(numbers, reverse=down)
    for drawn in tasks.evaluation_set("copying", 50):
        assert drawn.messages[-1]["content"].endswith(": " + drawn.answer)
        assert 4 <= len(set(drawn.answer.split())) == len(drawn.answer.split()) <= 64
    for drawn in tasks.evaluation_set("json", 100):
        record = json.loads(drawn.answer)
        text = drawn.messages[-1]["content"]
        assert 3 <= len(record) <= 6
        for key, value in record.items():
            said = {None: "unknown", True: "yes", False: "no"}.get(value) if not isinstance(value, list) else None
            parts = [str(v) for v in (value if isinstance(value, list) else [said or value])]
            assert all(part in text.split(key.replace("_", " "), 1)[1] for part in parts)


@pytest.mark.parametrize(
    ("value", "power", "expected"),
    [(37, 3, "37000"), (3250, -3, "3.25"), (5, -2, "0.05"), (4000, -3, "4"), (7, -3, "0.007")],
)
def test_decimal_units_are_exact(value: int, power: int, expected: str) -> None:
    assert tasks.shift_decimal(value, power) == expected


@pytest.mark.parametrize("length", [256, 1000, 3800])
def test_recall_prompts_have_the_length_asked_for(length: int, encoder: tokenizer.ChatEncoder) -> None:
    for drawn in tasks.evaluation_set("recall", 8, length=length):
        assert abs(len(encoder.prompt(drawn.messages)) - length) <= 25
        table = "\n".join(m["content"] for m in drawn.messages)
        key = drawn.answer.split(":")[0]
        assert table.count(f"{key}: ") == 1 and drawn.answer in table
        assert key in drawn.messages[-1]["content"].splitlines()[-1]


@pytest.mark.parametrize(("task", "length"), [("recall", 100), ("recall", 5000), ("sorting", 300)])
def test_bad_lengths_are_refused(task: str, length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        tasks.sample(task, random.Random(0), length=length)


def test_asking_for_more_samples_than_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="small_talk"):
        tasks.evaluation_set("small_talk", 5000)


def test_small_talk_has_many_wordings_and_each_means_one_fact() -> None:
    owner: dict[str, str] = {}
    for fact in small_talk.FACTS:
        assert len(fact.questions) >= 20
        splits = {tasks.split_of(f"small talk {q.lower()}") for q in fact.questions}
        assert splits == {"train", "evaluation"}
        for question in fact.questions:
            assert "{" not in question and "}" not in question
            assert owner.setdefault(question.lower(), fact.answer) == fact.answer
    assert len({f.answer for f in small_talk.FACTS}) == len(small_talk.FACTS) >= 50


def test_words_are_distinct() -> None:
    assert len(set(words.COPY_WORDS)) == len(words.COPY_WORDS) >= 200
    assert len(words.ADJECTIVES) * len(words.NOUNS) > 5000


# ---------------------------------------------------------------- tokenizer and batches


def test_fast_encoder_equals_the_tokenizer(trained: Tokenizer, encoder: tokenizer.ChatEncoder) -> None:
    texts = [m["content"] for t in tasks.TASKS for s in tasks.evaluation_set(t, 20) for m in s.messages]
    texts += ["", " ", "a  b\n\n c.", "x_1-2::  ?! y", "tab\tand\r\nline", "größer 5 é", "中文 12", "\x00~"]
    for text in texts:
        assert encoder.encode(text) == trained.encode(text).ids
        assert encoder.decode(encoder.encode(text)) == text


def test_every_listed_word_and_digit_is_one_token(encoder: tokenizer.ChatEncoder) -> None:
    listed = (
        *words.COPY_WORDS,
        *words.GIVEN_NAMES,
        *words.FAMILY_NAMES,
        *words.CITIES,
        *words.COUNTRIES,
        *"0123456789",
    )
    assert [w for w in listed if len(encoder.encode(w)) != 1] == []
    assert len(encoder.encode("\namber-falcon: above")) == tasks.TOKENS_PER_ENTRY


def test_auto_tokenizer_loads_and_renders_the_same(
    tmp_path: Path, trained: Tokenizer, encoder: tokenizer.ChatEncoder
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_tokenizer(trained, tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 5 + 7?"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "And é?"},
    ]
    assert auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == encoder.prompt(messages)
    assert auto.apply_chat_template(messages, return_dict=False) == encoder.conversation(messages)[0]
    assert auto.eos_token_id == encoder.end and auto.pad_token_id == encoder.pad
    with pytest.raises(Exception, match="roles are"):
        auto.apply_chat_template([{"role": "tool", "content": ""}])


def test_batches_hold_whole_conversations_and_mark_the_answers(encoder: tokenizer.ChatEncoder) -> None:
    packer = Packer(encoder, 16384, seed=1)
    marked = np.zeros(len(tasks.TASKS) + 1, dtype=np.int64)
    for _ in range(8):
        batch = packer.batch(1.0)
        assert len(batch.tokens) == len(batch.task) == sum(batch.lengths) == 16384
        assert max(batch.lengths) <= tokenizer.MAX_LENGTH
        marked += np.bincount(batch.task, minlength=len(marked))
        start = 0
        for length in batch.lengths:
            ids, task = batch.tokens[start : start + length], batch.task[start : start + length]
            start += length
            if ids[0] == encoder.pad:
                assert not task.any()
                continue
            assert ids[0] == encoder.begin and ids[-1] == encoder.end and task[-1] == 0 and task.any()
            text = encoder._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            answers = re.findall(r"<\|assistant\|>(.*?<\|end\|>)", text, re.S)
            targets = encoder._tokenizer.decode(ids[1:][task[:-1] > 0].tolist(), skip_special_tokens=False)
            assert targets == "".join(answers)
    assert (marked[1:] > 0).all() and set(SHARES) == set(tasks.TASKS) and abs(sum(SHARES.values()) - 1) < 1e-9


def test_recall_grows_with_progress() -> None:
    rng = random.Random(0)
    early = max(recall_plan(rng, 0.0)[0] for _ in range(300))
    late = [recall_plan(rng, 1.0) for _ in range(300)]
    assert early <= 300 < 3500 < max(length for length, _ in late) <= tokenizer.MAX_LENGTH
    assert all(26 * questions < length for length, questions in late if questions > 2)


def test_worker_processes_deliver_and_end(trained: Tokenizer) -> None:
    source = BatchSource(trained, 1024, workers=1, seed=0)
    try:
        batch = source.next(0.0)
        assert len(batch.tokens) == 1024 and source.fresh == 1
    finally:
        source.close()
    assert not any(process.is_alive() for process in source._processes)


# ---------------------------------------------------------------- network


def _random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, TINY.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def test_saved_model_gives_the_same_logits_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    network = Network(TINY, seed=5)
    network.save(tmp_path, begin=1, end=2, pad=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert reference.generation_config.eos_token_id == 2 and reference.config.max_position_embeddings == 4096
    lengths = [7, 1, 100, 33]
    tokens, packed = _random_tokens(sum(lengths)), pack(lengths, torch.device("cpu"))
    with torch.no_grad():
        got = network.logits(network.hidden(tokens, packed.positions, attention_over("padded", packed)))
        for row, logits in zip(tokens.split(lengths), got.split(lengths), strict=True):
            torch.testing.assert_close(logits, reference(row[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_generation_with_a_cache_equals_generation_without() -> None:
    network = Network(TINY, seed=1)
    prompts = [_random_tokens(n, n).tolist() for n in (5, 40, 17)]
    got = generate(network, prompts, 12, end=2)
    for prompt, continuation in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(12):
            packed = pack([len(ids)], torch.device("cpu"))
            with torch.no_grad():
                hidden = network.hidden(torch.tensor(ids), packed.positions, attention_over("padded", packed))
                ids.append(int(network.logits(hidden[-1:]).argmax()))
            if ids[-1] == 2:
                ids.pop()
                break
        assert continuation == ids[len(prompt) :]


def test_shipped_shape_fits_16_megabytes() -> None:
    network = Network(NetworkConfig())
    assert sum(p.numel() for p in network.parameters()) * 2 < 16_000_000
    assert "lm_head.weight" not in network.state_dict()


@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 32, 96), (1, 96, 32)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sizes, v = torch.linalg.svd(noise, full_matrices=False)
    spread = torch.linspace(10.0, 0.5, sizes.shape[-1])
    result = orthogonalize(u * spread @ v)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    torch.testing.assert_close(u.mT @ result @ v.mT, torch.eye(len(spread)).expand(shape[0], -1, -1), atol=0.4, rtol=0)


def test_training_steps_lower_the_loss() -> None:
    network = Network(TINY, seed=0)
    optimizer = Optimizer(network, matrix_lr=0.02, adam_lr=0.003, weight_decay=0.1)
    tokens, packed = _random_tokens(64), pack([40, 24], torch.device("cpu"))
    losses = []
    for _ in range(30):
        hidden = network.hidden(tokens, packed.positions, attention_over("padded", packed))
        loss = network.token_losses(hidden, tokens.roll(-1)).mean()
        loss.backward()
        optimizer.step(1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.token_losses(
        network.hidden(tokens, packed.positions, attention_over("padded", packed)), tokens.roll(-1)
    ).mean().backward()
    optimizer.step(0.0)
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())


# ---------------------------------------------------------------- end to end


def _command(out: Path, *arguments: str) -> list[str]:
    fixed = ("--device", "cpu", "--cpu-workers", "1", "--layers", "1", "--batch-tokens", "512")
    return [sys.executable, "-m", "appliance.builtin.train", "--out", str(out), *fixed, *arguments]


def test_the_training_command_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    done = subprocess.run(
        _command(tmp_path, "--steps", "3", "--evaluation-samples", "1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 3 and summary["tokens"] == 3 * 512
    assert set(summary["accuracy"]) == {*tasks.TASKS, "recall@256"} - {"recall"}
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 16_000_000 and len(list(tmp_path.iterdir())) <= 8
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == 1 and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == model.config.vocab_size


def test_a_terminated_run_still_writes_its_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(_command(tmp_path, "--minutes", "30"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        while "ready after" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert json.loads(output.splitlines()[-1])["interrupted"] is True
    assert (tmp_path / "model.safetensors").stat().st_size > 1000


def test_public_names() -> None:
    assert MODEL_NAME == "appliance-builtin"
    assert checkpoint_dir() == ROOT / "appliance" / "builtin" / "model"
    tree = ast.parse((ROOT / "appliance" / "builtin" / "tasks.py").read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= set(sys.stdlib_module_names)
