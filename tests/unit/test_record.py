"""Recording: timings, sinks, display, samples, FLOPs, summary and table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from redone.algo.stats import wilson_interval
from redone.config.schema import RecordConfig
from redone.errors import ConfigError, ModelError, RunFolderError
from redone.record import sinks
from redone.record.console import Display, clock
from redone.record.flops import model_flops, parameter_count
from redone.record.metrics import Recorder
from redone.record.samples import pick
from redone.record.summary import EvalResult, PairedResult, RunSummary, read_summary
from redone.record.table import better, comparison_line, result_table
from redone.record.timing import Timings
from redone.types import Completion, Group, Message, Prompt, Rollout, Score, VersionSpan

SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def make_group(name: str, raws: list[float]) -> Group:
    prompt = Prompt(
        id=name,
        task="letters",
        domain="sns",
        data_source="test",
        messages=(Message(role="user", content="Zähle <b>bold</b>"),),
        token_ids=np.arange(7, dtype=np.int32),
        reference="a",
        reward="default",
    )
    rollouts = [
        Rollout(
            prompt=prompt,
            completion=Completion(
                token_ids=np.arange(3, dtype=np.int32),
                text=f"{name}-{i}",
                logprobs=np.zeros(3, np.float32),
                finish="stop",
                versions=(VersionSpan(version=4, start=0, end=3),),
            ),
            score=Score(raw=raw, value=raw, correct=raw >= 1),
        )
        for i, raw in enumerate(raws)
    ]
    return Group(prompt=prompt, epoch=0, rollouts=tuple(rollouts))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_timings_add_up_and_start_anew() -> None:
    timings = Timings()
    for _ in range(2):
        with timings.timing("gen"):
            pass
    with pytest.raises(KeyError), timings.timing("failing"):
        raise KeyError
    first = timings.drain()
    assert set(first) == {"timing_s/gen", "timing_s/failing", "timing_s/step"}
    assert first["timing_s/step"] >= first["timing_s/gen"] + first["timing_s/failing"] > 0
    assert set(timings.drain()) == {"timing_s/step"}


def test_recorder_writes_metrics_samples_and_event_files(tmp_path: Path) -> None:
    cfg = RecordConfig(loggers=("jsonl", "tensorboard"), samples_per_step=2)
    groups = [make_group("p0", [0.0, 1.0, 0.5]), make_group("p1", [1.0, 0.0, 0.0])]
    with Recorder(tmp_path, cfg, total_steps=2, devices=2) as recorder:
        with recorder.phase("gen"):
            pass
        recorder.samples(1, groups)
        recorder.step(1, {"reward/mean": 0.25, "actor/entropy": float("nan")})
        recorder.step(2, {"reward/mean": 0.5})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first["step"] == 1 and first["reward/mean"] == 0.25 and first["actor/entropy"] is None
    assert first["perf/total_num_tokens"] == 2 * 3 * (7 + 3)
    assert first["perf/throughput"] == pytest.approx(60 / first["timing_s/step"] / 2)  # type: ignore[operator]
    assert first["perf/gen_throughput"] == pytest.approx(18 / first["timing_s/gen"])  # type: ignore[operator]
    assert "perf/total_num_tokens" not in second, "a step without samples must not repeat the last count"
    best, worst = lines(tmp_path / "samples.jsonl")
    assert (best["response"], best["raw"]) == ("p0-1", 1.0)
    assert (worst["prompt_id"], worst["raw"]) == ("p1", 0.0)
    assert worst["messages"] == [{"role": "user", "content": "Zähle <b>bold</b>"}]
    assert scalars(tmp_path / "tensorboard")[1]["reward/mean"] == 0.25


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def test_a_resumed_run_replaces_later_steps_in_tensorboard(tmp_path: Path) -> None:
    first = sinks.TensorboardSink(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"x": float(step)})
    first.close()
    resumed = sinks.TensorboardSink(tmp_path)
    resumed.write(2, {"x": 20.0})
    resumed.close()
    assert scalars(tmp_path) == {1: {"x": 1.0}, 2: {"x": 20.0}}


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_missing_logger_is_named_with_its_remedy(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: sinks.check_loggers(("jsonl", logger)),
        lambda: sinks.build_sinks((logger,), tmp_path, project="p", name="n", config={}),
    ):
        with pytest.raises(ConfigError, match=rf'record.loggers={logger}.*pip install "redone\[track\]"'):
            call()


def test_display_prints_plain_lines_off_a_terminal() -> None:
    out = io.StringIO()
    with Display(3, console=Console(file=out, width=60)) as display:
        display.enter("load")
        display.leave()
        display.step(0, {"val-core/mean_score": 0.4})
        assert display.eta() is None
        display.step(1, {"reward/mean": 0.1234, "perf/throughput": 12345.6, "actor/pg_clipfrac": 0.021})
        assert display.eta() is not None
        display.note("dropped [2] prompts")
    assert "\x1b" not in out.getvalue()
    load, before, step, note = out.getvalue().splitlines()
    assert load.endswith("load ...") and before.endswith("step 0/3  val 0.400")
    assert step.endswith("step 1/3  reward 0.123  clipped 2.1%  tokens/s 12,346")
    assert note == "dropped [2] prompts"


def test_display_keeps_a_live_row_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(3, console=console) as display:
        display.enter("update_actor")
        display.step(1, {"reward/mean": 0.5})
        display._live.refresh()
    text = out.getvalue()
    assert "update_actor" in text and "step 2/3" in text and "eta" in text


def test_clock() -> None:
    assert [clock(s) for s in (-1, 9.9, 75, 3700)] == ["0:00", "0:09", "1:15", "1:01:40"]


def test_samples_are_spread_over_groups_best_and_worst_in_turn() -> None:
    groups = [make_group(f"p{i}", [0.2, 0.9, 0.4]) for i in range(8)]
    chosen = [(r.prompt.id, r.score.raw) for r in pick(groups, 4)]
    assert chosen == [("p0", 0.9), ("p2", 0.2), ("p4", 0.9), ("p6", 0.2)]
    again = [(r.prompt.id, r.score.raw) for r in pick(groups[:1], 4)]
    assert len(set(again)) == len(again) and {name for name, _ in again} == {"p0"}
    assert pick(groups, 0) == pick([], 3) == []


def test_flops_agree_with_published_sizes() -> None:
    assert parameter_count(SMOLLM2) == pytest.approx(134.5e6, rel=1e-3)
    assert parameter_count(QWEN3_30B_A3B) == pytest.approx(30.5e9, rel=5e-3)
    assert parameter_count(QWEN3_30B_A3B, active=True) == pytest.approx(3.3e9, rel=2e-2)


def test_flops_of_a_hand_computed_model() -> None:
    hf = {
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "vocab_size": 10,
    }
    flops = model_flops(hf)
    # per layer: q, k, v, o are 4x4 each, gate, up, down 4x6 each
    assert flops.matmul == 2 * 2 * (4 * 16 + 3 * 24)
    assert flops.head == 2 * 40 and flops.per_context == 2 * 4 * 4
    by_token = sum(flops.forward(t + 1, head=t >= 3) for t in range(5))
    assert flops.sequence(3, 2) == pytest.approx(by_token)
    with pytest.raises(ModelError, match="vocab_size=None"):
        model_flops({**hf, "vocab_size": None})


def make_result(name: str, role: str, correct: int) -> EvalResult:
    low, high = wilson_interval(correct, 600)
    return EvalResult(
        name=name,
        role=role,  # type: ignore[arg-type]
        task="all",
        n=600,
        accuracy=correct / 600,
        low=low,
        high=high,
        mean_score=correct / 600,
        format_errors=None if role == "baseline" else 0.125,
        per_class={"positive": (200, 0.5)},
    )


def make_summary() -> RunSummary:
    def paired(against: str, p: float) -> PairedResult:
        return PairedResult(
            against=against,
            task="all",
            n=600,
            before=0.4,
            after=0.5,
            gained=90,
            lost=30,
            test="mcnemar",
            p_value=p,
            low=0.05,
            high=0.15,
        )

    return RunSummary(
        name="demo",
        status="done",
        steps=20,
        best_step=18,
        seconds=600.0,
        results=(
            make_result("trained", "after", 300),
            make_result("untrained", "before", 240),
            make_result("constant label", "baseline", 200),
        ),
        comparisons=(paired("untrained", 1e-8), paired("constant label", 0.2)),
        versions={"torch": "2.13.0"},
        notes=("one note",),
    )


def test_summary_survives_a_round_trip(tmp_path: Path) -> None:
    summary = make_summary()
    summary.save(tmp_path / "summary.json")
    assert read_summary(tmp_path / "summary.json") == summary
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text('{"results": [], "comparisons": [], "notes": [], "odd": 1}')
    with pytest.raises(RunFolderError, match="odd"):
        read_summary(tmp_path / "summary.json")


def test_the_final_table_sets_format_errors_apart() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(result_table(make_summary()))
    text = out.getvalue()
    assert text.index("constant label") < text.index("untrained") < text.index("trained  ")
    trained = next(line for line in text.splitlines() if line.strip().startswith("trained"))
    assert trained.split() == ["trained", "600", "50.0%", "46.0%", "-", "54.0%", "12.5%"]
    assert "p = 1e-08" in text


def test_only_a_significant_gain_is_called_better() -> None:
    clear, unclear = make_summary().comparisons
    assert better(clear) and comparison_line(clear).endswith(": better")
    assert not better(unclear) and comparison_line(unclear).endswith(": no clear difference")
