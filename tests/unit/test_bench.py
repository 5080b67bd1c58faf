"""Benchmarks: figures, ceilings, provenance, comparison, and that the parts drive what they say."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redone_launcher.main import main

from redone.bench.compare import compare, differences
from redone.bench.measure import Figure, Repeats, duration, rate
from redone.bench.parts import Bench, run_part
from redone.bench.result import BenchResult, Commit, commit_of, read_result, require_clean, table
from redone.bench.roofline import Roofline, measure
from redone.bench.work import WorkOptions, amounts, group_lengths, weight_bytes
from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import ConfigError
from redone.types import Batch, Completion, FloatArray, Prompt, Sampling, UpdateReport

HF: dict[str, Any] = dict(
    model_type="llama", num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, vocab_size=50,
)  # fmt: skip
ROOF = Roofline(device="x", dtype="float32", threads=2, matmul_flops=1e9, copy_bytes_s=1e8, seconds=0.0)


def config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "m", "dtype": "float32"},
        "data": {"train": ["x"], "max_prompt_length": 20, "max_response_length": 16},
        "rewards": {"default": {"family": "exact"}},
        "algorithm": {"train_batch_size": 4, "ppo_mini_batch_size": 2},
        "rollout": {"n": 4},
    }
    return config_from_dict({**tree, **sections})


def result(figures: Sequence[Figure], **changes: Any) -> BenchResult:
    values: dict[str, Any] = dict(
        parts=("train",),
        commit="c" * 40,
        dirty=False,
        versions={"torch": "2"},
        device={"name": "x", "load": 0.1},
        config={"run": {"name": "a"}, "rollout": {"n": 4}},
        options={"timed": 3},
        rooflines={"start": ROOF},
        figures=tuple(figures),
    )
    return BenchResult(**{**values, **changes})


def test_repeats_leave_the_warm_up_out() -> None:
    calls: list[int] = []
    seconds = Repeats(warmup=2, timed=3).seconds(calls.append)
    assert calls == [0, 1, 2, 3, 4] and len(seconds) == 3
    with pytest.raises(ConfigError, match="--repeats 0"):
        Repeats(timed=0)


def test_a_figure_knows_median_spread_and_share() -> None:
    slow = duration("t", (2.0, 4.0, 3.0), ceiling=1.5)
    assert slow.median == 3.0 and slow.share == 0.5
    assert slow.spread == pytest.approx(1.4826 / 3)
    fast = rate("r", "tokens/s", 12.0, (2.0, 4.0, 3.0), ceiling=8.0)
    assert fast.values == (6.0, 3.0, 4.0) and fast.share == 0.5
    assert duration("u", (1.0,)).share is None


def test_the_roofline_is_measured() -> None:
    found = measure("cpu", "float32", 1, rounds=1, size=64)
    assert found.matmul_flops > 1e6 and found.copy_bytes_s > 1e6 and found.threads == 1
    assert found.scaled(4) == found, "threads' rates are the whole machine's"
    gpu = replace(found, threads=0)
    assert gpu.scaled(4).matmul_flops == 4 * gpu.matmul_flops


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    before = result([duration("train/update", (1.0, 2.0), ceiling=0.5, ceiling_of="FLOPs")])
    before.write(tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == before
    assert "train/update" in table(before) and "50.0%" not in table(before) and "33.3%" in table(before)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="no result of `redone bench`"):
        read_result(tmp_path / "other.json")


def test_a_dirty_tree_is_refused(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    (tmp_path / "__init__.py").write_text("")
    git("init", "-q")
    assert commit_of(tmp_path) == Commit(id="", dirty=())
    git("add", ".")
    git("commit", "-qm", "x")
    clean = commit_of(tmp_path)
    assert len(clean.id) == 40 and clean.dirty == ()
    require_clean(clean, allow_dirty=False)
    (tmp_path / "new.py").write_text("x = 1\n")
    dirty = commit_of(tmp_path)
    assert dirty.dirty == ("new.py",)
    with pytest.raises(ConfigError, match=r"new\.py.*commit first"):
        require_clean(dirty, allow_dirty=False)
    with pytest.raises(ConfigError, match="no git checkout"):
        require_clean(Commit(id="", dirty=()), allow_dirty=False)
    require_clean(dirty, allow_dirty=True)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (duration("f", (1.0, 1.01, 0.99)), duration("f", (1.3, 1.31, 1.29)), "worse"),
        (duration("f", (1.0, 1.01, 0.99)), duration("f", (1.04, 1.03, 1.05)), "same"),
        (duration("f", (1.0, 1.3, 0.7)), duration("f", (1.3, 1.6, 1.0)), "same"),  # inside its own noise
        (duration("f", (1.0, 1.01, 0.99)), duration("f", (0.7, 0.71, 0.69)), "better"),
        (rate("f", "x/s", 1.0, (1.0, 1.0, 1.0)), rate("f", "x/s", 1.0, (2.0, 2.0, 2.0)), "worse"),
        # twice as slow on a machine whose ceiling is half as high
        (duration("f", (1.0,) * 3, ceiling=0.5), duration("f", (2.0,) * 3, ceiling=1.0), "same"),
        (duration("f", (1.0,) * 3, ceiling=0.5), duration("f", (1.0,) * 3, ceiling=0.25), "worse"),
    ],
)
def test_regressions_beyond_noise_are_called(a: Figure, b: Figure, verdict: str) -> None:
    (change,) = compare(result([a]), result([b, duration("only-in-b", (1.0,))]))
    assert change.verdict == verdict


def test_what_makes_results_hard_to_compare_is_said() -> None:
    slower = replace(ROOF, matmul_flops=ROOF.matmul_flops / 2)
    b = result(
        [],
        dirty=True,
        config={"run": {"name": "b"}, "rollout": {"n": 8}},
        device={"name": "x", "load": 5.0},
        rooflines={"start": slower},
    )
    told = differences(result([]), b)
    assert told == [
        "B was measured on a dirty tree",
        "config rollout.n: 4 -> 8",
        "roofline at the start: the matmul ceiling changed by -50%",
    ]


def test_the_command_line_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        result([duration("train/update", (value,) * 3)]).write(tmp_path / f"{name}.json")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert ended.value.code == 1 and "REGRESSION" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compare", str(tmp_path / "b.json"), str(tmp_path / "a.json")])
    assert ended.value.code == 0


def test_groups_all_have_the_same_lengths() -> None:
    cfg = config()
    lengths = group_lengths(cfg, WorkOptions(response_tokens=8, sigma=1.0))
    assert len(lengths) == 4 and lengths[0] < lengths[-1] <= 16 and sorted(lengths) == list(lengths)
    assert group_lengths(cfg, WorkOptions(response_tokens=8, sigma=0)) == (8, 8, 8, 8)
    forced = config(rollout={"n": 4, "forced_lengths": [3, 9]})
    assert group_lengths(forced, WorkOptions()) == (3, 3, 9, 9)
    with pytest.raises(ConfigError, match="mean response length"):
        group_lengths(cfg, WorkOptions(response_tokens=100))


def test_amounts_by_hand() -> None:
    found = amounts([3], [[2, 1]], HF)
    assert (found.tokens, found.computed, found.responses) == (3 * 2 + 3, 6, 3)
    matmul = 2 * (2 * 8 * 4 * (2 * 2 + 2 * 1)) + 2 * 6 * 8 * 16
    head, score = 2 * 8 * 50, 2 * 4 * 2 * 4
    contexts = (1 + 2 + 3) + (4 + 5) + 4
    assert found.forward_flops == matmul * 6 + head * 3 + score * contexts
    tied = weight_bytes({**HF, "tie_word_embeddings": True}, "bfloat16")
    assert tied == weight_bytes(HF, "float32") / 2 > 2 * 8 * 50


class Fleet:
    """Engines that answer at once and remember what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], Sampling, int]] = []

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        await asyncio.sleep(0)
        self.asked.append((tuple(prompt_ids), sampling, len(seeds)))
        return []

    @contextmanager
    def awake(self, what: str = "all") -> Iterator[None]:
        yield


class Trainers:
    """Trainer ranks that do nothing and remember it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def logprobs(self, batch: Batch) -> list[list[FloatArray]]:
        self.events.append(f"logprobs of {len(batch.groups)}")
        return []

    def update(self, part: Batch, algorithm: Any, step: int) -> UpdateReport:
        self.events.append(f"update of {len(part.groups)}")
        return UpdateReport(loss=0.0, grad_norm=0.0, lr=0.0, skipped=False, metrics={})

    def push(self, engines: Any, version: int) -> dict[str, float]:
        self.events.append(f"push {version}")
        return {"sync/bytes_written": 1000.0}

    def check_canary(self, engines: Any, version: int) -> dict[str, float]:
        return {}

    @contextmanager
    def awake(self, what: str = "all") -> Iterator[None]:
        yield


class Rewards:
    def __init__(self) -> None:
        self.texts: list[str] = []

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        self.texts += [completion.text for completion in completions]


def bench(**changes: Any) -> Bench:
    values: dict[str, Any] = dict(
        cfg=config(),
        hf=HF,
        options=WorkOptions(prompt_tokens=6, response_tokens=4, sigma=0),
        repeats=Repeats(warmup=1, timed=2),
        roof=ROOF,
        data=(),
        stop_token_ids=(1,),
        rewards=Rewards(),
        trainer=Trainers(),
        engines=Fleet(),
    )
    return Bench(**{**values, **changes})


def test_pack_counts_every_token() -> None:
    seconds, speed = run_part("pack", bench())
    assert len(seconds.values) == 2
    assert speed.values[0] * seconds.values[0] == pytest.approx(4 * 4 * (6 + 4))


def test_train_makes_all_updates_of_a_batch() -> None:
    used = bench()
    scored, updated, _ = run_part("train", used)
    assert used.trainer.events == ["logprobs of 4"] * 3 + ["update of 2"] * 6  # type: ignore[union-attr]
    assert updated.ceiling == pytest.approx(3 * (scored.ceiling or 0))
    assert scored.ceiling == pytest.approx(amounts([6] * 4, [[4] * 4] * 4, HF).forward_flops / 1e9)


def test_rollout_asks_for_fixed_lengths_of_new_prompts() -> None:
    used = bench(roof=replace(ROOF, copy_bytes_s=1e6))
    seconds, speed = run_part("rollout", used)
    asked = used.engines.asked  # type: ignore[union-attr]
    assert len(asked) == 3 * 4 and len({prompt for prompt, _, _ in asked}) == 12
    assert all(s.lengths == (4, 4, 4, 4) and s.ignore_eos and n == 4 for _, s, n in asked)
    assert speed.values[0] * seconds.values[0] == pytest.approx(4 * 4 * 4)
    assert seconds.ceiling_of == "weights read per decode step"
    assert seconds.ceiling == pytest.approx(4 * weight_bytes(HF, "float32") / 1e6)


def test_sync_pushes_new_versions() -> None:
    used = bench()
    pushed, _, _ = run_part("sync", used)
    assert used.trainer.events == ["push 1", "push 2", "push 3"]  # type: ignore[union-attr]
    assert pushed.ceiling == pytest.approx(2 * 1000 * 2 / 1e8)


def test_reward_scores_every_rollout_of_the_data() -> None:
    def prompt(i: int) -> Prompt:
        ids = np.zeros(3, np.int32)
        return Prompt(id=str(i), task="t", domain="d", data_source="s", messages=(), token_ids=ids,
                      reference=f"answer {i}", reward="default")  # fmt: skip

    used = bench(data=tuple(prompt(i) for i in range(3)))
    _, speed = run_part("reward", used)
    assert len(used.rewards.texts) == 3 * 16 and speed.unit == "scores/s"  # type: ignore[attr-defined]
    assert used.rewards.texts[:5] == ["answer 0"] * 4 + ["answer 1"]  # type: ignore[attr-defined]
