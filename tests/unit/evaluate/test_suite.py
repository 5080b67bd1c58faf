"""Suites: every shipped one loads and renders on the real data; a user's mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redone.errors import ConfigError, DataError
from redone.evaluate.items import answer_of, render, suite_items
from redone.evaluate.paper import paper_rows
from redone.evaluate.policies import policy_answers
from redone.evaluate.suite import Extract, load_suite, reward_configs, shipped
from redone.reward.pool import make_reward
from tests.unit.evaluate.toy import YAML, ToyChat, write_toy

ITEMS = {
    "sns-bench": 6658, "sns-transbench": 2858, "humaneval": 164, "mbpp": 500, "ifeval": 541, "gsm8k": 1319,
}  # fmt: skip


def test_the_shipped_suites(repo: Path) -> None:
    assert set(shipped()) == set(ITEMS)


@pytest.mark.parametrize("name", ITEMS)
def test_every_item_of_a_shipped_suite(redone_data: Path, name: str) -> None:
    suite = load_suite(name)
    items = suite_items(suite, redone_data, ToyChat())  # type: ignore[arg-type]
    assert len(items) == ITEMS[name] and len({item.prompt.id for item in items}) == len(items)
    assert all(
        "{" + field + "}" not in item.prompt.messages[-1].content for item in items[:9] for field in item.row
    )
    for part in suite.parts:
        mine = [item for item in items if item.part.id == part.id][:5]
        policies = policy_answers(part, mine)
        assert policies and all(len(answers) == len(mine) for answers in policies.values())
    for config in reward_configs(suite).values():
        if config.family != "sandbox":
            make_reward(config)


def test_tables_of_the_paper_have_the_suites_columns() -> None:
    for name, key in (("sns-bench", "sns"), ("sns-transbench", "translation")):
        suite = load_suite(name)
        (table,) = suite.paper
        for figures in paper_rows(key).values():
            assert list(figures) == [*suite.tables[table], "average"]
    rows = paper_rows("sns")
    assert rows["RedOne 2.0 4B"]["CHLW"] == 79.11 and rows["Qwen3-4B"]["average"] == 51.81
    for name, figures in rows.items():
        columns = [value for column, value in figures.items() if column != "average"]
        assert sum(columns) / 8 == pytest.approx(figures["average"], abs=0.02), name
    wrong = [
        name
        for name, f in paper_rows("translation").items()
        if abs(sum(list(f.values())[:4]) / 4 - f["average"]) > 0.02
    ]
    assert wrong == ["Qwen3-30B-A3B"], "the one average that the paper prints wrongly"


def test_shots_come_from_data_and_stand_before_the_question(redone_data: Path) -> None:
    item = suite_items(load_suite("gsm8k"), redone_data, ToyChat(), limit=1)[0]  # type: ignore[arg-type]
    talk = item.prompt.messages
    assert [m.role for m in talk] == ["user", "assistant"] * 4 + ["user"]
    assert "####" in talk[1].content and "Janet" in talk[-1].content and "####" in talk[-1].content


def test_code_items_have_tests_that_their_own_solution_names(redone_data: Path) -> None:
    for name in ("humaneval", "mbpp"):
        item = suite_items(load_suite(name), redone_data, ToyChat(), limit=1)[0]  # type: ignore[arg-type]
        assert item.prompt.reference["tests"] and item.prompt.reference["entry_point"]
    assert item.row["task_id"] == 11


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7.\n#### 7", "7"),
        ("first #### 3\nthen #### 1,234", "1,234"),
        ("I think it is 42, no: 43", "43"),
        ("<think>#### 9</think> #### 8", "8"),
        ("no idea", "no idea"),
    ],
)
def test_answers_of_gsm8k(text: str, answer: str) -> None:
    assert answer_of(text, load_suite("gsm8k").parts[0].extract) == answer


def test_code_answers_are_the_last_block_or_all() -> None:
    rule = load_suite("humaneval").parts[0].extract
    assert answer_of("x\n```python\na\n```\nand\n```\nb\n```\n", rule) == "```python\nb\n\n```"
    assert answer_of("def f(): pass", rule) == "```python\ndef f(): pass\n```"
    nothing = Extract(patterns=("a(b)",), otherwise="nothing", take="first")
    assert answer_of("ccc", nothing) == "" and answer_of("ab ab", nothing) == "b"


def test_templates_and_filters() -> None:
    row = {"a": "x[1]", "b": ["p", "q"], "c": "['u', 'v']", "d": "pick ['k', 'l'] or []"}
    assert render("{a}|{b}", row, "here") == "x[1]|p\nq"
    assert render("{a|list} {c|first} {d|options} {c|commas}", row, "here") == "['x1'] u ['k', 'l'] u, v"
    assert render('{"Option": 1} {}', row, "here") == '{"Option": 1} {}'
    with pytest.raises(DataError, match=r"here: .*\{nope\}.*a, b, c, d"):
        render("{nope}", row, "here")
    with pytest.raises(DataError, match=r"unknown filter \|upper"):
        render("{a|upper}", row, "here")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_tokens: 8", "max_token: 8", "parts.words.max_token: unknown key"),
        ("kind: sns_corrected", "kind: sns_perfect", "parts.lists.metrics.corrected"),
        ("Words: [words/exact]", "Words: [words/score]", "tables.both.Words: no score 'words/score'"),
        ("id: lists", "id: words", "'words' occurs twice"),
        ("family: exact", "family: exactly", "exactly"),
        ("parts:", "part:", "a list `parts`"),
        ("name: toy", "name: [", "not valid YAML"),
        ("file: Note-CHLW}\n      corr", "file: Note-XYZ}\n      corr", "Note-XYZ"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in YAML
    path = tmp_path / "mine.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        suite = load_suite(str(path))
        check_measures(suite)
    assert str(caught.value).count("\n") <= 3 and said in str(caught.value)


def check_measures(suite: Any) -> None:
    from redone.evaluate.measures import make_measure

    for part in suite.parts:
        for metric in part.metrics.values():
            make_measure(metric, 1)


def test_the_suite_in_the_documentation_works(repo: Path, tmp_path: Path) -> None:
    text = (repo / "docs" / "evaluation.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "mine").mkdir()
    row = '{"split": "test", "text": "thanks!", "label": "friendly"}\n'
    (tmp_path / "mine" / "tone.jsonl").write_text(row + row.replace("test", "train"))
    suite = load_suite(str(tmp_path / "mine.yaml"))
    (item,) = suite_items(suite, tmp_path, ToyChat())  # type: ignore[arg-type]
    assert [m.role for m in item.prompt.messages] == ["system", "user", "assistant", "user"]
    assert item.prompt.reference == "friendly" and item.part.max_tokens == 16
    assert answer_of("I say. Tone: rude", item.part.extract) == "rude"


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean gsm8k"):
        load_suite("gms8k")
    with pytest.raises(ConfigError, match="no such file"):
        load_suite("nowhere/mine.yaml")


def test_missing_file_and_empty_selection_are_named(tmp_path: Path) -> None:
    suite = write_toy(tmp_path / "data")
    (tmp_path / "data" / "lists.json").unlink()
    with pytest.raises(DataError, match=r"lists\.json: no such file, which suite toy needs"):
        suite_items(suite, tmp_path / "data", ToyChat())  # type: ignore[arg-type]
    (tmp_path / "data" / "toy.jsonl").write_text('{"kind": "other"}\n')
    with pytest.raises(DataError, match=r"parts\.words\.where"):
        suite_items(suite, tmp_path / "data", ToyChat())  # type: ignore[arg-type]
    (tmp_path / "data" / "toy.jsonl").write_text("{")
    with pytest.raises(DataError, match="not readable"):
        suite_items(suite, tmp_path / "data", ToyChat())  # type: ignore[arg-type]


def test_limit_takes_the_first_items_of_every_part(tmp_path: Path) -> None:
    suite = write_toy(tmp_path)
    items = suite_items(suite, tmp_path, ToyChat(), limit=2)  # type: ignore[arg-type]
    assert [item.row["question"] for item in items] == ["q0", "q1", "l0", "l1"]
    whole = suite_items(suite, tmp_path, ToyChat())  # type: ignore[arg-type]
    assert {i.prompt.id for i in items} < {i.prompt.id for i in whole}, "a limit must not change ids"
