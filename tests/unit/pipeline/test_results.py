"""The table of stages, the ablation, and batch inference."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redone.config.schema import ModelSection
from redone.data.chat import Chat, load_chat
from redone.data.tiny import make_tiny_tokenizer
from redone.errors import DataError
from redone.pipeline.generate import generate, repair
from redone.pipeline.results import ablation_table, collect_results, results_table, write_results
from redone.record.bars import Bar, bar_chart
from redone.record.graph import GraphDisplay, NodeDisplay

from .making import Engines, answers, config, write_jsonl

N = 30


def column(rates: dict[str, float]) -> list[Any]:
    """N prompts per task, the given share of them right; `maths` is general."""
    return [
        answers(f"{task}{i}", (float(i < rate * N),), task, domain="general" if task == "maths" else "sns")
        for task, rate in rates.items()
        for i in range(N)
    ]


COLUMNS = {
    "base": column({"a": 0.2, "b": 0.5, "maths": 0.5}),
    "explore": column({"a": 0.8, "b": 0.5, "maths": 0.1}),
}


def shown(table: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tasks_means_and_paired_tests() -> None:
    found = collect_results(COLUMNS)
    assert found.tasks["a"]["base"].score == pytest.approx(0.2)
    assert found.macros["sns"]["explore"].score == pytest.approx(0.65)
    assert found.macros["all"]["base"].score == pytest.approx(0.4)
    assert found.macros["sns"]["base"].low < 0.35 < found.macros["sns"]["base"].high
    test = found.tests["a"]["explore"]
    assert (test.test, test.gained, test.lost) == ("mcnemar", 18, 0) and test.p_value < 1e-4
    text = shown(results_table(found, "t"))
    marks = {line.split()[0]: line.strip()[-1] for line in text.splitlines() if line.strip()}
    assert (marks["a"], marks["maths"]) == ("+", "-") and marks["b"].isdigit()
    assert "mean (general)" in text


def test_four_stages_fit_eighty_columns() -> None:
    table = results_table(
        collect_results(COLUMNS | {"target": COLUMNS["base"], "refine": COLUMNS["base"]}), "t"
    )
    lines = shown(table).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert len([line for line in lines if "-0." in line or "-1." in line]) == 3 + 3  # tasks and means


def test_the_ablation_is_a_row_per_run() -> None:
    lines = shown(ablation_table(collect_results(COLUMNS))).splitlines()
    (head,) = [line for line in lines if "general" in line]
    assert head.split() == ["run", "general", "sns", "all"]
    assert any(line.split()[0] == "explore" and "0.650" in line for line in lines if line.strip())


def test_results_are_written(tmp_path: Path) -> None:
    results = replace(collect_results(COLUMNS), notes=("<said>",))
    assert "<said>" in shown(results_table(results, "t"))
    page = write_results(tmp_path, results, "<title>")
    text = page.read_text()
    assert "<p>&lt;said&gt;</p>" in text
    cells = results.tasks["a"]["explore"]
    assert f"<td>{cells.score:.3f} + [{cells.low:.3f}, {cells.high:.3f}]</td>" in text
    assert "&lt;title&gt;" in text and "<svg" in text and "Paired tests against base" in text
    assert json.loads((tmp_path / "results.json").read_text())["domains"]["maths"] == "general"


def test_columns_must_answer_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="different items"):
        collect_results({"base": COLUMNS["base"], "explore": COLUMNS["explore"][1:]})


def test_bars_stay_inside_the_chart() -> None:
    chart = bar_chart(["a & b"], [("x", [Bar(value=1.7, low=-0.5, high=2.0)]), ("y", [None])])
    assert "a &amp; b" in chart and chart.count("<rect") == 1
    assert bar_chart([], []) == ""


def test_the_display_off_a_terminal_is_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=200)
    with GraphDisplay({"explore": "rl", "measure": "evaluate"}, console) as display:
        display.state("explore", "running")
        run = NodeDisplay(display, "explore", 5)
        run.enter("gen")
        run.step(1, {"reward/mean": 0.25})
        run.leave()
        display.state("explore", "done", "steps 5")
        display.state("measure", "kept")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "▶ explore running" in text and "explore: step 1/5  reward 0.250" in text
    assert "✓ explore done (0:00): steps 5" in text and "= measure kept" in text
    table = Console(file=io.StringIO(), width=200)
    table.print(display._table())
    assert "explore" in table.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(path)
    return load_chat(ModelSection(path=str(path)))


def test_generation_goes_on_with_a_cut_file(tmp_path: Path, chat: Chat) -> None:
    rows = [{"prompt": f"post {i}", "id": i} for i in range(12)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    cfg = config(evaluate={"sampling": {"n": 2, "temperature": 1.0}})
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    assert generate(source, whole, cfg, chat, Letters()) == 12
    with pytest.raises(InterruptedError):
        generate(source, cut, cfg, chat, Letters(5))
    cut.write_bytes(cut.read_bytes() + b'{"prompt": "post')
    kept = repair(cut)
    assert 0 < kept < 12
    engines = Letters()
    assert generate(source, cut, cfg, chat, engines) == 12
    assert cut.read_bytes() == whole.read_bytes() and len(engines.asked) == 12 - kept
    first = json.loads(whole.read_text().splitlines()[0])
    assert first["id"] == 0 and len(first["responses"]) == 2 and first["finish"] == ["stop", "stop"]
    assert generate(source, cut, cfg, chat, Letters(0)) == 12  # nothing left to ask


class Letters(Engines):
    """Prompts of the tiny tokenizer are no text: answers are made of their ids."""

    async def generate(self, prompt_ids: Any, sampling: Any, seeds: Any) -> Any:
        return await super().generate([65 + sum(prompt_ids) % 26], sampling, seeds)


def test_a_task_keeps_its_longest_response(tmp_path: Path, chat: Chat) -> None:
    lengths = []

    class Watched(Letters):
        async def generate(self, prompt_ids: Any, sampling: Any, seeds: Any) -> Any:
            lengths.append(sampling.max_tokens)
            return await super().generate(prompt_ids, sampling, seeds)

    rows = [{"prompt": "a", "task": "short"}, {"prompt": "b", "data_source": "short"}, {"prompt": "c"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    cfg = config(data={"max_response_length": 9, "task_max_response_length": {"short": 3}})
    generate(source, tmp_path / "o.jsonl", cfg, chat, Watched())
    assert lengths == [3, 3, 9]


def test_rows_that_cannot_be_answered(tmp_path: Path, chat: Chat) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x" * 60}])
    with pytest.raises(DataError, match=r"line 1: the prompt has \d+ tokens, data\.max_prompt_length=20"):
        generate(source, tmp_path / "o", config(data={"max_prompt_length": 20}), chat, Letters())
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="line 1: no column 'prompt'"):
        generate(source, tmp_path / "o2", config(), chat, Letters())
