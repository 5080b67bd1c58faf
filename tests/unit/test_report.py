"""report.html from a run folder, finished or not."""

from __future__ import annotations

import html.parser
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from redone.errors import RunFolderError
from redone.record.report import read_rows, write_report
from redone.record.svg import Line, line_chart, stacked_chart, ticks

VOID = {"meta", "line", "circle", "path", "br"}


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed without being open; collects what refers to the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href") or "url(" in (v or "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def records() -> ModuleType:
    """The makers of tests/unit/test_record.py."""
    spec = importlib.util.spec_from_file_location("record_makers", Path(__file__).with_name("test_record.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run:\n  name: <demo>\n")
    rows = [
        {
            "step": step,
            "time": 1.0,
            "reward/mean": 0.1 * step,
            "actor/entropy": None,
            "sync/canary_max_abs_diff": 10.0**-step,
            "timing_s/gen": 2.0,
            "timing_s/step": 3.0,
        }
        for step in range(4)
    ]
    rows[2] |= {
        "val-core/letters/acc/mean@1": 0.5,
        "val-aux/letters/acc_low": 0.4,
        "val-aux/letters/acc_high": 0.6,
    }
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "rew')  # a crash in the middle of a line
    sample = {
        "step": 1,
        "messages": [{"role": "user", "content": "<script>alert(1)</script>"}],
        "response": "a < b",
        "reference": "a",
        "raw": 0.5,
        "correct": False,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


def test_report_of_an_unfinished_run(folder: Path) -> None:
    path = write_report(folder)
    page = parse(path)
    text = " ".join(page.texts)
    assert "This run is not finished: 3 steps are recorded." in text
    assert "Reward" in text and "Validation accuracy" in text and "Seconds per step" in text
    assert "Entropy" not in text, "a chart without a finite value must be left out"
    assert "<script>" not in path.read_text() and "<script>alert(1)</script>" in text and "a < b" in text
    assert page.references == [], "the report must not refer to other files"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
    ]


def test_report_of_a_finished_run(folder: Path) -> None:
    records().make_summary().save(folder / "summary.json")
    text = " ".join(parse(write_report(folder)).texts)
    for expected in (
        "20 steps in 10.0 minutes",
        "constant label",
        "46.0% - 54.0%",
        "12.5%",
        "one note",
        "2.13.0",
    ):
        assert expected in text


def test_report_needs_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_sorted_the_later_one_counts_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "x": 1}\n{"step": 1, "x": 2}\n{"step": 2, "x": 3}\n')
    assert [(r["step"], r["x"]) for r in read_rows(path)] == [(1, 2), (2, 3)]
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2"):
        read_rows(path)


def test_charts() -> None:
    assert line_chart([Line(label="x", points=[])]) == "" == stacked_chart([])
    one = line_chart([Line(label="x", points=[(3, 7.0)])])
    assert one.count("<circle") == 1 and "nan" not in one
    flat = line_chart([Line(label="x", points=[(0, 5.0), (1, 5.0)])])
    assert "nan" not in flat and "inf" not in flat
    logs = line_chart([Line(label="x", points=[(1, 1e-6), (2, 0.0), (3, 1e-3)])], log_scale=True)
    assert ">1e-6<" in logs.replace("1e-06", "1e-6") and logs.count("L") == 1
    stack = stacked_chart(
        [Line(label="a & b", points=[(1, 1.0), (2, 2.0)]), Line(label="c", points=[(1, 1.0), (2, 0.0)])]
    )
    assert stack.count("<path") == 2 and "a &amp; b" in stack


def test_ticks_are_round() -> None:
    assert ticks(0, 1, 4) == pytest.approx([0, 0.5, 1.0])
    assert ticks(0.31, 0.72, 4) == pytest.approx([0.4, 0.6]) or len(ticks(0.31, 0.72, 4)) <= 5
    assert ticks(1, 20, 6) == pytest.approx([5, 10, 15, 20])
