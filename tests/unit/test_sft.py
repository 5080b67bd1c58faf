"""Supervised runs: examples, batches, the schedule, and the loop with a fake trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redone.algo.schedule import learning_rate
from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.config.pipeline import SftConfig
from redone.config.schema import AlgorithmConfig, Config, ModelSection, OptimConfig
from redone.data.chat import Chat, load_chat
from redone.data.ledger import Ledger, audit
from redone.data.sft import (
    Example,
    as_turn,
    batches,
    conversation,
    load_examples,
    sft_batch,
    share_prefixes,
)
from redone.data.tiny import make_tiny_tokenizer
from redone.errors import ConfigError, DataError, RunFolderError
from redone.pipeline.folder import RunFolder
from redone.pipeline.sft import SftRun, plan_steps
from redone.types import Batch, FloatArray, Message, UpdateReport


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return load_chat(ModelSection(path=str(path)))


def config(path: Path, **sft: Any) -> Config:
    return config_from_dict(
        {
            "run": {"dir": str(path), "name": "s"},
            "model": {"path": str(path)},
            "sft": {"train": ["t"], "max_length": 256, **sft},
            "evaluate": {"keep_best": False},
            "checkpoint": {"every": 2},
        }
    )


def example(name: str, prompt: int, response: int) -> Example:
    return Example(
        id=name,
        task="t",
        prompt_ids=np.arange(prompt, dtype=np.int32),
        response_ids=np.arange(response, dtype=np.int32),
        loss_mask=np.ones(response, np.bool_),
    )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [str(path)]


def test_only_answers_are_trained_on(tmp_path: Path, chat: Chat) -> None:
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "ok")]
    rows = [
        {"prompt": "hi", "response": "yo"},
        {"messages": [{"role": r, "content": c} for r, c in turns]},
    ]
    one, two = load_examples(write(tmp_path / "a.jsonl", rows), config(tmp_path), chat).examples
    assert one.prompt_ids.tolist() == chat.prompt_ids([_user("hi")]).tolist()
    assert chat.decode(one.response_ids.tolist()) == "yo" and one.response_ids[-1] == chat.stop_token_ids[0]
    assert one.loss_mask.all()
    trained = two.response_ids[two.loss_mask].tolist()
    assert chat.decode(trained) == "yook" and not two.loss_mask.all()
    assert sft_batch([one, two]).num_loss_tokens == 9  # three answers of two letters and the end of turn


def test_example_turns_of_a_prompt_are_context(tmp_path: Path, chat: Chat) -> None:
    """Of a prompt with example turns and its response, and of turns with "weight": 0."""
    prompt = [turn("user", "hi"), turn("assistant", "yo"), turn("user", "more")]
    weighted = [prompt[0], prompt[1] | {"weight": 0}, prompt[2], turn("assistant", "ok")]
    filled = [{"weight": None} | t for t in weighted]  # parquet's turns have all keys
    rows = [{"prompt": prompt, "response": "ok"}, {"messages": weighted}, {"messages": filled}]
    given = chat.prompt_ids([Message(role=t["role"], content=t["content"]) for t in prompt]).tolist()
    examples = load_examples(write(tmp_path / "a.jsonl", rows), config(tmp_path), chat).examples
    assert len({e.id for e in examples}) == 3  # copies of one conversation
    for example in examples:
        assert example.prompt_ids.tolist() == given
        assert chat.decode(example.response_ids.tolist()) == "ok" and example.loss_mask.all()
    turns = conversation(rows[0], config(tmp_path), "here")
    assert [as_turn(m) for m in turns] == weighted  # as the pipeline's nodes write it


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def beginning(prompts: list[list[int]]) -> int:
    """Length of what all of them begin with."""
    columns = list(zip(*prompts, strict=False))
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), len(columns))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9))
def test_shared_beginnings_are_found_and_nothing_is_lost(prompts: list[list[int]]) -> None:
    found = share_prefixes([np.array(p, np.int32) for p in prompts])
    assert sorted(i for members, _ in found for i in members) == list(range(len(prompts)))
    for members, length in found:
        assert length >= 1 and len({tuple(prompts[i][:length]) for i in members}) == 1
        assert all(len(prompts[i]) >= length for i in members)
    saved = sum((len(members) - 1) * length for members, length in found)
    ordered = sorted(prompts)
    best = [0]
    for n in range(1, len(ordered) + 1):  # every cut of the sorted prompts
        best.append(max(best[i] + (n - i - 1) * beginning(ordered[i:n]) for i in range(n)))
    assert saved == best[-1]


def test_conversations_with_one_beginning_share_it() -> None:
    def row(task: int, tweet: int) -> Example:
        prompt = np.array([1, *[task] * 6, tweet, tweet], np.int32)
        return dataclasses.replace(example(f"{task}-{tweet}", 1, 2), prompt_ids=prompt)

    rows = [row(5, 20), row(6, 21), row(5, 22), row(6, 23), row(7, 24)]
    plain, shared = sft_batch(rows), sft_batch(rows, share=True)
    assert [(len(g.prompt_ids), len(g.trajectories)) for g in shared.groups] == [(7, 2), (7, 2), (9, 1)]
    assert (shared.num_loss_tokens, shared.num_sequences) == (plain.num_loss_tokens, plain.num_sequences)
    whole = [
        [*g.prompt_ids, *t.token_ids, *np.flatnonzero(t.loss_mask)[:1] + len(g.prompt_ids)]
        for batch in (plain, shared) for g in batch.groups for t in g.trajectories
    ]  # fmt: skip
    assert sorted(whole[:5]) == sorted(whole[5:])


def _user(text: str) -> Any:
    from redone.types import Message

    return Message(role="user", content=text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi"}, r"line 1: no answer to imitate.*sft\.response_key"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "must be a list that ends with the assistant"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "must end with the assistant"),
        ({"prompt": "h" * 300, "response": "x"}, r"sft\.max_length=256.*sft\.too_long=drop"),
        ({"messages": [turn("user", "a"), turn("assistant", "b") | {"weight": 0}]}, "what is trained on"),
        (
            {
                "messages": [
                    turn("user", "a"),
                    turn("assistant", "b") | {"weight": 0.5},
                    turn("user", "a"),
                    turn("assistant", "b"),
                ]
            },
            r"messages\[1\] has weight=0\.5; 0 \(context only\) or 1",
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, chat: Chat, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / "a.jsonl", [row]), config(tmp_path), chat)


def test_too_long_ones_may_be_dropped(tmp_path: Path, chat: Chat) -> None:
    rows = [{"prompt": "h" * 300, "response": "x"}, {"prompt": "h", "response": "x"}]
    found = load_examples(write(tmp_path / "a.jsonl", rows), config(tmp_path, too_long="drop"), chat)
    assert (len(found.examples), found.too_long) == (1, 1)


EXAMPLES = [example(f"e{i}", 3 + i % 5, 2 + i % 3) for i in range(50)]


def test_every_example_once_per_epoch_in_packed_batches() -> None:
    sft = SftConfig(batch_size=4, max_length=32)
    for epoch in (0, 1):
        steps = batches(EXAMPLES, sft, 0, epoch)
        assert sorted(i for step in steps for i in step) == list(range(50))
        for step in steps[:-1]:
            tokens = sum(EXAMPLES[i].tokens for i in step)
            assert 4 * 32 * 0.6 < tokens <= 4 * 32
    assert batches(EXAMPLES, sft, 0, 0) == batches(EXAMPLES, sft, 0, 0)
    assert batches(EXAMPLES, sft, 0, 0) != batches(EXAMPLES, sft, 0, 1) != batches(EXAMPLES, sft, 1, 1)


def test_a_short_rest_is_merged_dropped_or_kept() -> None:
    def sizes(**changes: Any) -> list[int]:
        sft = SftConfig(batch_unit="examples", batch_size=16, **changes)
        return [len(step) for step in batches(EXAMPLES, sft, 0, 0)]

    assert sizes() == [16, 16, 18]
    assert sizes(short_batch="drop") == [16, 16, 16]
    assert sizes(short_batch="keep") == [16, 16, 16, 2]


def test_the_schedule_is_a_cosine_behind_a_warm_up_ratio() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, lr_warmup_ratio=0.1, lr_decay_style="cosine")
    rates = [learning_rate(s, optim, 41) for s in range(41)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 17 / 35))
    assert rates[22] == pytest.approx(middle)


class Trainer:
    """Notes what it is told; its loss falls with every update."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, int, int]] = []  # step, loss tokens, total steps
        self.loaded = ""

    @contextmanager
    def awake(self, what: str = "all") -> Iterator[None]:
        yield

    def update(self, part: Batch, algorithm: AlgorithmConfig, step: int) -> UpdateReport:
        assert algorithm.loss.type == "sft"
        self.updates.append((step, part.num_loss_tokens, algorithm.total_steps))
        return UpdateReport(loss=1.0 / step, grad_norm=1.0, lr=0.1, skipped=False, metrics={})

    def logprobs(
        self, batch: Batch, policy: str = "actor", temperature: float | None = None
    ) -> list[list[FloatArray]]:
        assert temperature == 1.0
        loss = 2.0 / (1 + len(self.updates))
        return [[np.full(len(t.token_ids), -loss, np.float32) for t in g.trajectories] for g in batch.groups]

    def save(self, path: str) -> None:
        Path(path).mkdir()

    def load(self, path: str) -> None:
        self.loaded = path

    def export(self, path: str) -> None:
        Path(path).mkdir()


class Observer:
    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics

    def samples(self, step: int, groups: object) -> None: ...

    def note(self, message: str) -> None: ...


def start(
    cfg: Config, folder: RunFolder, train: Sequence[Example] = EXAMPLES
) -> tuple[SftRun, Trainer, Observer]:
    trainer, observer = Trainer(), Observer()
    run = SftRun(
        cfg=cfg,
        folder=folder,
        trainer=trainer,  # type: ignore[arg-type]
        train=train,
        val=EXAMPLES[:3],
        ledger=Ledger(folder.path / "ledger.jsonl"),
        observer=observer,  # type: ignore[arg-type]
    )
    return run, trainer, observer


def test_the_loop_trains_each_example_once_per_epoch(tmp_path: Path) -> None:
    cfg = config(tmp_path, batch_size=4, max_length=32, epochs=3)
    run, trainer, observer = start(cfg, RunFolder.create(cfg))
    run.begin()
    run.loop()
    run.finish()
    total = len(plan_steps(EXAMPLES, cfg))
    assert [u[0] for u in trainer.updates] == list(range(1, total + 1))
    assert {u[2] for u in trainer.updates} == {total}
    assert sum(u[1] for u in trainer.updates) == 3 * sum(int(e.loss_mask.sum()) for e in EXAMPLES)
    assert observer.steps[0] == {"val/loss": 2.0} and observer.steps[1]["sft/loss"] == 1.0
    assert observer.steps[total]["val/loss"] < 2.0
    run.ledger.close()
    assert audit(run.folder.path / "ledger.jsonl") == []
    assert (run.folder.path / "export").is_dir()


def test_a_run_goes_on_where_its_checkpoint_stands(tmp_path: Path) -> None:
    cfg = config(tmp_path, batch_size=4, max_length=32)
    folder = RunFolder.create(cfg)
    run, trainer, _ = start(cfg, folder)
    run.begin()
    run.steps = run.steps[:3]  # the kill: step 3 was not saved but for being the last
    run.loop()
    run.ledger.close()
    state = folder.load_state(2)
    folder.rewind(state)
    again, trainer, _ = start(cfg, folder)
    again.go_on(state)
    again.loop()
    assert trainer.loaded.endswith("step-000002/trainer")
    assert [u[0] for u in trainer.updates] == list(range(3, len(again.steps) + 1))
    again.ledger.close()
    assert audit(folder.path / "ledger.jsonl") == []
    other, _, _ = start(cfg, folder, EXAMPLES[1:])
    with pytest.raises(RunFolderError, match="other conversations"):
        other.go_on(state)


def test_configurations_that_cannot_run(tmp_path: Path) -> None:
    values = {"run": {"job": "sft"}, "model": {"path": "m"}}
    with pytest.raises(ConfigError, match=r"sft\.train is empty"):
        check_config(config_from_dict(values))
    values |= {"sft": {"train": ["t"], "max_length": 20000}}
    with pytest.raises(
        ConfigError, match=r"sft\.max_length=20000 exceeds trainer\.max_token_len_per_rank=16384"
    ):
        check_config(config_from_dict(values))
    both = {"optim": {"lr_warmup_steps": 3, "lr_warmup_ratio": 0.1}}
    with pytest.raises(ConfigError, match="exclude each other"):
        config_from_dict({"model": {"path": "m"}, "trainer": both})
