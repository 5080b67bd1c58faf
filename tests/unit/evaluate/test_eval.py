"""Answering, resuming, results and comparison, with a fleet that answers from a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.errors import RunFolderError
from redone.evaluate.answer import Asking, answer_items
from redone.evaluate.items import EvalItem, suite_items
from redone.evaluate.measures import make_measure
from redone.evaluate.page import render
from redone.evaluate.paired import Difference, compare_folders, holm
from redone.evaluate.policies import score_policies
from redone.evaluate.records import FORMAT, EvalFolder, fingerprint
from redone.evaluate.results import PartResult, SuiteResult, suite_result
from redone.evaluate.suite import Suite
from redone.evaluate.tables import table_rows, terminal
from tests.unit.evaluate.toy import ToyChat, ToyFleet, ToyRewards, write_toy

ASKING = Asking(
    n=1, temperature=0.0, top_p=1.0, top_k=-1, seed=0, max_tokens=None, stop_token_ids=(0,), limit=400
)


class Place:
    """A toy suite, its items, and evaluations of it."""

    def __init__(self, root: Path, items: int = 12) -> None:
        self.root = root
        self.suite: Suite = write_toy(root / "data", items)
        self.items: list[EvalItem] = suite_items(self.suite, root / "data", ToyChat())  # type: ignore[arg-type]

    def settings(self, **changes: Any) -> dict[str, Any]:
        suites = {"toy": self.suite.model_dump(mode="json")}
        model = {"path": "/models/a", "fingerprint": "aaa"}
        return {"format": FORMAT, "model": model, "n": 1, "temperature": 0.0, "suites": suites, **changes}

    def evaluate(
        self,
        name: str,
        answer: Callable[[str], str],
        n: int = 1,
        fail_after: int | None = None,
        **changes: Any,
    ) -> tuple[EvalFolder, ToyFleet]:
        folder = EvalFolder(self.root / name)
        folder.join(self.settings(n=n, **changes))
        fleet = ToyFleet(answer, fail_after)
        asking = replace(ASKING, n=n)
        with folder.writer("toy") as writer:
            left = folder.missing("toy", self.items)
            answer_items(left, fleet, ToyRewards(), self.measures(n), asking, writer)  # type: ignore[arg-type]
        return folder, fleet

    def measures(self, n: int = 1) -> Any:
        return {
            part.id: {name: make_measure(metric, n) for name, metric in part.metrics.items()}
            for part in self.suite.parts
        }

    def result(self, folder: EvalFolder, n: int = 1) -> SuiteResult:
        measures = self.measures(n)
        return suite_result(
            self.suite,
            self.items,
            folder.read("toy"),
            measures,
            lambda part, items: score_policies(part, items, ToyRewards(), measures[part.id]),
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def no(text: str) -> str:
    """Right for two of three words, and always the empty list."""
    return "no" if "q" in text else "[]"


def part(result: SuiteResult, name: str) -> PartResult:
    return next(p for p in result.parts if p.id == name)


def test_scores_policies_and_tables(place: Place) -> None:
    folder, _ = place.evaluate("a", no)
    result = place.result(folder)
    words, lists = part(result, "words"), part(result, "lists")
    score = words.metrics["exact"]["score"]
    assert score.value == pytest.approx(200 / 3) and score.low < score.value < score.high
    assert words.policies["commonest answer: no"]["exact"]["score"] == pytest.approx(200 / 3)
    assert words.policies["echo"]["exact"]["score"] == words.policies["empty answer"]["exact"]["score"] == 0.0
    assert lists.metrics["corrected"]["corrected"].value == 50.0
    assert lists.metrics["corrected"]["balanced"].value == 50.0
    assert lists.policies["always []"]["corrected"]["corrected"] == 50.0
    assert lists.policies["the scorer's variable"]["released"]["success-f1"] == 0.0
    table = result.tables["both"]
    values = [v.value for v in table.columns.values()]
    assert table.average is not None and table.average.value == pytest.approx(np.mean(values))
    assert table.average.low < table.average.value < table.average.high
    assert table.policies["Words"] == pytest.approx(200 / 3)


def test_page_and_terminal_hold_the_scores_and_nothing_foreign(place: Place) -> None:
    folder, _ = place.evaluate("a", lambda text: "<script>alert(1)</script>" if "q" in text else "[]")
    result = place.result(folder)
    page = render([result], "model", {"n": 1, "temperature": 0})
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "<svg" in page and "commonest answer: no" in page
    assert "2 file(s) with fewer than 30 items" in page
    heads, rows = table_rows("both", result.tables["both"], "model", None)
    assert heads == ["both", "Words", "Lists", "average"] and rows[0][1] == "0.00"
    assert terminal([result], "model", True) is not None


def test_like_paper_prints_the_papers_rows(place: Place) -> None:
    folder, _ = place.evaluate("a", no)
    heads, rows = table_rows("both", place.result(folder).tables["both"], "model", "sns")
    assert any(row[0] == "paper: RedOne 2.0 4B" and row[-1] == "67.57" for row in rows)
    assert all(len(row) == len(heads) for row in rows)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(place: Place) -> None:
    with pytest.raises(RuntimeError, match="the engine died"):
        place.evaluate("a", no, fail_after=5)
    folder = EvalFolder(place.root / "a")
    done = folder.read("toy")
    assert 0 < len(done) <= 5
    with folder.file("toy").open("a") as stream:
        stream.write('{"part": "words", "id": "torn')  # a crash in the middle of a line
    _, fleet = place.evaluate("a", no)
    assert len(fleet.asked) == len(place.items) - len(done), "only what is missing is generated"
    whole, _ = place.evaluate("b", no)
    assert folder.read("toy") == whole.read("toy")
    _, idle = place.evaluate("a", no)
    assert idle.asked == []


def test_seeds_depend_on_the_item_only(place: Place) -> None:
    _, one = place.evaluate("a", no, n=3)
    _, two = place.evaluate("b", no, n=3, fail_after=None)
    assert one.seeds == two.seeds and len({s for seeds in one.seeds for s in seeds}) == 3 * len(place.items)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.7}, "temperature=0.0, now it is 0.7"),
        ({"model": {"path": "/models/b", "fingerprint": "bbb"}}, "another model (/models/a, fingerprint aaa"),
    ],
)
def test_other_settings_are_refused_by_name(place: Place, changes: dict[str, Any], said: str) -> None:
    folder, _ = place.evaluate("a", no)
    with pytest.raises(RunFolderError) as caught:
        folder.join(place.settings(**changes))
    assert said in str(caught.value) and "--out" in str(caught.value)


def test_a_changed_suite_is_refused_and_another_suite_is_added(place: Place) -> None:
    folder, _ = place.evaluate("a", no)
    settings = place.settings()
    changed = json.loads(json.dumps(settings))
    changed["suites"]["toy"]["parts"][0]["max_tokens"] = 9
    with pytest.raises(RunFolderError, match=r"suites.toy.parts.words.max_tokens=8, now it is 9"):
        folder.join(changed)
    folder.join({**settings, "suites": {"more": {**settings["suites"]["toy"], "name": "more"}}})
    assert [suite.name for suite in folder.suites()] == ["toy", "more"]


def test_records_of_other_data_are_refused(place: Place) -> None:
    folder, _ = place.evaluate("a", no)
    rows = (place.root / "data" / "toy.jsonl").read_text().replace('"q3"', '"Q3"')
    (place.root / "data" / "toy.jsonl").write_text(rows)
    items = suite_items(place.suite, place.root / "data", ToyChat())  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match="toy/words, item 3"):
        folder.missing("toy", items)


def test_a_foreign_folder_is_left_alone(place: Place) -> None:
    with pytest.raises(RunFolderError, match="no evaluation folder"):
        EvalFolder(place.root / "data").join(place.settings())
    with pytest.raises(RunFolderError, match=r"no settings\.json"):
        EvalFolder.open(place.root / "data")


def test_prompts_that_do_not_fit_count_as_empty_answers(place: Place) -> None:
    folder = EvalFolder(place.root / "a")
    folder.join(place.settings())
    lengths = sorted(len(item.prompt.token_ids) for item in place.items)
    fleet = ToyFleet(no)
    with folder.writer("toy") as writer:
        asking = replace(ASKING, limit=lengths[0] + 1)
        answer_items(place.items, fleet, ToyRewards(), place.measures(), asking, writer)  # type: ignore[arg-type]
    result = place.result(folder)
    unfit = sum(p.unfit for p in result.parts)
    assert 0 < unfit == len(place.items) - len(fleet.asked)
    assert "fill the context" in render([result], "m", {})


def test_failed_rewards_are_counted_and_left_out(place: Place) -> None:
    folder, _ = place.evaluate("a", lambda text: "broken" if "q1" in text else no(text))
    words = part(place.result(folder), "words")
    assert words.failed == 3  # q1, q10, q11
    assert words.metrics["exact"]["score"].value == pytest.approx(100 * 5 / 9)


def test_the_same_outcome_everywhere_has_an_interval(place: Place) -> None:
    folder, _ = place.evaluate("a", lambda text: "wrong")
    result = place.result(folder)
    score = part(result, "words").metrics["exact"]["score"]
    assert (score.value, score.low) == (0.0, 0.0) and 20 < score.high < 30  # Wilson, 0 of 12
    assert result.tables["both"].columns["Words"].high == score.high


def test_a_real_difference_and_none(tmp_path: Path) -> None:
    place = Place(tmp_path, items=120)
    a, _ = place.evaluate("a", lambda text: "yes" if "q" in text else "[]")
    b, _ = place.evaluate("b", no, model={"path": "/models/b", "fingerprint": "bbb"})
    found = {row.what: row for row in compare_folders(a, b).differences}
    words = found["words exact"]
    assert (words.n, words.test, words.verdict) == (120, "McNemar", "B better")
    assert words.b - words.a == pytest.approx(100 / 3) and words.low <= 100 / 3 <= words.high
    assert words.p < words.adjusted < 0.05
    assert (
        found["lists released"].a == found["lists released"].b
        and found["lists released"].verdict == "unclear"
    )
    assert "both: average of 2 columns" in found
    turned = {row.what: row.verdict for row in compare_folders(b, a).differences}
    assert turned["words exact"] == "A better"


def test_chance_alone_gives_few_verdicts() -> None:
    """Holm: with 20 looks at nothing, a p of 0.01 proves nothing; one of 0.001 does."""
    base = Difference(suite="s", what="w", n=9, a=0, b=1, low=-1, high=1, test="bootstrap", p=0.5)
    rows = holm([replace(base, p=0.01), *[base] * 19])
    assert rows[0].adjusted == pytest.approx(0.2) and rows[0].verdict.startswith("unclear (p < 0.05 only")
    assert holm([replace(base, p=0.001), *[base] * 19])[0].verdict == "B better"
    two = holm([replace(base, p=0.02), replace(base, p=0.03)])
    assert [row.adjusted for row in two] == pytest.approx([0.04, 0.04])


def test_few_items_prove_nothing(place: Place) -> None:
    """Four lists, all of them better: by a coin per item that happens once in eight, whatever the scores."""
    golds = {item.row["question"]: str(item.prompt.reference) for item in place.items}
    a, _ = place.evaluate("a", lambda text: "['nothing of this']")
    b, _ = place.evaluate("b", lambda text: golds.get(text.rpartition(": ")[2], "no"))
    found = {row.what: row for row in compare_folders(a, b).differences}
    lists = found["lists released"]
    assert (lists.a, lists.test) == (0.0, "permutation") and lists.b == pytest.approx(100, abs=0.01)
    assert lists.p == pytest.approx(1 / 8, abs=0.015) and lists.verdict == "unclear"


def test_comparisons_that_make_no_sense_are_refused(place: Place) -> None:
    a, _ = place.evaluate("a", no)
    other = json.loads(json.dumps(place.settings()))
    other["suites"]["toy"]["parts"][0]["max_tokens"] = 9
    b = EvalFolder(place.root / "b")
    b.join(other)
    with pytest.raises(RunFolderError, match=r"suite toy differs.*max_tokens"):
        compare_folders(a, b)
    c = EvalFolder(place.root / "c")
    c.join({**place.settings(), "suites": {}})
    with pytest.raises(RunFolderError, match="nothing to compare"):
        compare_folders(a, c)


def test_a_comparison_says_what_else_differs(place: Place) -> None:
    a, _ = place.evaluate("a", no)
    b, _ = place.evaluate("b", no, temperature=1.0)
    lines = b.file("toy").read_text().splitlines(keepends=True)
    b.file("toy").write_text("".join(lines[:-1]))
    warnings = " ".join(compare_folders(a, b).warnings)
    assert "temperature differs: 0.0 in A, 1.0 in B" in warnings and "only the 15 that both have" in warnings


def test_samples_are_averaged_and_drawn_together(place: Place) -> None:
    calls = iter(range(10**6))
    folder, _ = place.evaluate("a", lambda text: ("no", "yes")[next(calls) % 2] if "q" in text else "[]", n=2)
    score = part(place.result(folder, n=2), "words").metrics["exact"]["score"]
    assert score.value == pytest.approx(50.0)
    assert score.low == score.high == 50.0, "every item has one right answer of two: items do not differ"


def test_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1000))
        (tmp_path / name / "notes.md").write_text(name)  # says nothing about the model
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(999) + b"\1")
    assert first != fingerprint(tmp_path / "b")
