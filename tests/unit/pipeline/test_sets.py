"""What the targeted and the refining stage train on."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redone.config.pipeline import HardSetNode, LlmJudge, SftSetNode, SoftLabelNode
from redone.errors import DataError, RedoneError
from redone.pipeline.hard_set import choose_hard, write_hard_set
from redone.pipeline.rows import known_rows
from redone.pipeline.sft_set import SftSet, build_sft_set
from redone.pipeline.soft_labels import choose, judge_scores, outside, verifier_scores, write_labels
from redone.types import Message

from ..reward.judging import endpoint
from .making import answers, config, prompt, sample, write_jsonl

WORDS = [
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath"),
    *("inlet", "jetty", "kelp", "larch", "moss", "north", "ocean", "pine"),
]


def text(i: int) -> str:
    """Twelve words, different for every i."""
    return " ".join(WORDS[(i * 7 + j * (1 + i // 16)) % 16] + str(i) for j in range(12))


def row(i: int, task: str = "weak", **changes: Any) -> dict[str, Any]:
    return {"task": task, "prompt": text(i), "label": f"answer {i}", **changes}


def build(tmp_path: Path, rows: list[dict[str, Any]], held_out: list[str] = [], **changes: Any) -> SftSet:  # noqa: B006
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": t, "label": "x"} for t in [*held_out, text(900)]])
    tasks = changes.pop("tasks", ["weak", "rare"])
    node = SftSetNode(bucket="d", data=("train",), **changes)
    return build_sft_set(node, tasks, [train], [test], config(), seed=0)


def test_only_the_bucket_enters(tmp_path: Path) -> None:
    rows = [row(i, "weak" if i % 2 else "strong") for i in range(20)]
    found = build(tmp_path, rows)
    assert {r["task"] for r in found.rows} == {"weak"} and len(found.rows) == 10
    assert found.rows[0]["messages"][-1]["role"] == "assistant"
    assert found.manifest["tasks_without_rows"] == ["rare"]


def test_capabilities_share_alike_and_weights_raise_rare_tasks(tmp_path: Path) -> None:
    rows = [row(i, "weak") for i in range(60)] + [row(100 + i, "rare") for i in range(20)]
    even = build(tmp_path, rows, size=20)
    assert Counter(r["task"] for r in even.rows) == {"weak": 10, "rare": 10}
    heavy = build(tmp_path, rows, size=20, weights={"rare": 3.0})
    assert Counter(r["task"] for r in heavy.rows) == {"weak": 5, "rare": 15}
    assert heavy.manifest["tasks"]["rare"]["weight"] == 3.0
    together = build(tmp_path, rows, size=20, capabilities={"weak": "c", "rare": "c"})
    counts = Counter(r["task"] for r in together.rows)
    assert counts["weak"] > counts["rare"] > 0  # inside a capability by the root of the size
    assert together.manifest["tasks"]["rare"]["capability"] == "c"


@pytest.mark.parametrize(
    "planted",
    [
        text(900),
        text(900).upper() + "!!",
        f"Hello there, I found this somewhere: {text(900)} and what do you say to that, my friend?",
        "\uff21" + text(900)[1:],  # a full-width letter
    ],
    ids=["exact", "case", "inside a longer text", "full width"],
)
def test_a_planted_evaluation_item_is_refused(tmp_path: Path, planted: str) -> None:
    rows = [row(i) for i in range(5)] + [row(50, prompt=planted)]
    found = build(tmp_path, rows)
    assert len(found.rows) == 5
    assert found.manifest["left_out"]["overlap with evaluation"] == 1
    assert found.manifest["overlaps"][0]["evaluation_item"] == text(900)
    with pytest.raises(DataError, match=r"line 6: holds \d+% of the evaluation item"):
        build(tmp_path, rows, decontaminate={"on_overlap": "error"})


def test_a_planted_item_in_an_answer_or_a_chinese_text_is_refused(tmp_path: Path) -> None:
    found = build(tmp_path, [row(1), row(2, label=f"as they say: {text(900)}")])
    assert len(found.rows) == 1
    chinese = "今天天气真好我们一起去公园散步吧"
    found = build(tmp_path, [row(1), row(2, prompt=f"大家好！{chinese}，好不好？")], held_out=[chinese])
    assert len(found.rows) == 1


def test_a_template_shared_by_all_evaluation_items_is_no_overlap(tmp_path: Path) -> None:
    template = "Please read the following post and name its topic in one single word:"
    # five words of their own: most n-grams of an item are the template's
    held_out = [f"{template} {' '.join(text(900 + i).split()[:5])}" for i in range(40)]
    rows = [row(i, prompt=f"{template} {' '.join(text(i).split()[:5])}") for i in range(10)]
    found = build(tmp_path, rows, held_out=held_out, near_duplicate=None)
    assert len(found.rows) == 10


def test_example_turns_are_context_in_what_the_nodes_write(tmp_path: Path) -> None:
    shown = [("user", "2 + 3"), ("assistant", "5"), ("user", text(1))]
    turns = [{"role": role, "content": content} for role, content in shown]
    (made,) = build(tmp_path, [row(1, prompt=turns)]).rows
    assert [m.get("weight") for m in made["messages"]] == [None, 0, None, None]
    asked = replace(prompt("p0"), messages=tuple(Message(**t) for t in turns))
    found = [answers("p0", (0.1, 1.0))]
    write_labels([asked], found, verifier_scores(found), labels(), tmp_path / "rows.jsonl")
    made = json.loads((tmp_path / "rows.jsonl").read_text())
    assert [m.get("weight") for m in made["messages"]] == [None, 0, None, None]


def test_near_duplicates_are_left_out(tmp_path: Path) -> None:
    post = f"{text(1)} {text(2)}"  # 25 words with the answer; one other word leaves 21 of 25 shingles
    twin = post.rsplit(" ", 1)[0] + " other"
    rows = [row(1, prompt=post, label="same"), row(2, prompt=twin, label="same"), row(3, label="same")]
    found = build(tmp_path, rows, near_duplicate=0.8)
    assert len(found.rows) == 2 and found.manifest["left_out"]["near duplicate"] == 1
    assert len(build(tmp_path, rows, near_duplicate=None).rows) == 3


def test_labels_are_balanced(tmp_path: Path) -> None:
    rows = [row(i, label="yes" if i % 5 else "no") for i in range(50)]
    found = build(tmp_path, rows, size=12, balance_key="reference")
    assert Counter(r["messages"][-1]["content"] for r in found.rows) == {"yes": 6, "no": 6}


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    rows = [row(1), row(2, label={"tests": ["assert f() == 1"]}), row(3, label=["x"], response="written out")]
    found = build(tmp_path, rows)
    assert sorted(r["messages"][-1]["content"] for r in found.rows) == ["answer 1", "written out"]
    assert found.manifest["left_out"]["no answer to imitate"] == 1


def test_an_unreadable_row_names_its_place(tmp_path: Path) -> None:
    rows = [row(1), {"task": "weak", "label": "x"}]
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: no column 'prompt'"):
        build(tmp_path, rows)


def labels(**changes: Any) -> SoftLabelNode:
    return SoftLabelNode(model="m", data=("d",), **changes)


def test_the_best_answer_is_chosen_and_ties_fall_by_rule() -> None:
    samples = [sample("long one", 0.9, logprob=-2.0), sample("short", 0.9, logprob=-0.5), sample("x", 0.2)]
    scores = [0.9, 0.9, 0.2]
    assert choose(samples, scores, labels(), "t") == 1  # likeliest
    assert choose(samples, scores, labels(tie="first"), "t") == 0
    assert choose(samples, scores, labels(tie="shortest"), "t") == 1
    assert choose(samples, scores, labels(tie="longest"), "t") == 0
    assert choose(samples, scores, labels(threshold=0.95), "t") is None
    assert choose(samples, scores, labels(threshold=0.95, thresholds={"t": 0.5}), "t") == 1


def test_cut_empty_and_unjudged_answers_are_no_labels() -> None:
    samples = [
        sample("cut", 1.0, finish="length"),
        sample("  ", 1.0),
        sample("unjudged", 1.0),
        sample("ok", 0.6),
    ]
    scores = [1.0, 1.0, None, 0.6]
    assert choose(samples, scores, labels(), "t") == 3
    assert choose(samples, scores, labels(require_stop=False), "t") == 0


def test_labels_become_conversations(tmp_path: Path) -> None:
    prompts = [prompt("p0"), prompt("p1")]
    found = [answers("p0", (0.1, 1.0)), answers("p1", (0.0, 0.1))]
    manifest = write_labels(prompts, found, verifier_scores(found), labels(), tmp_path / "rows.jsonl")
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert '"content": "w1.0"' in line and '"candidate": 1' in line
    assert (manifest["prompts"], manifest["labels"]) == (2, 1)
    assert manifest["tasks"] == {"t": {"prompts": 2, "labels": 1}}


def test_hard_prompts_are_neither_always_nor_never_solved() -> None:
    rates = {"never": (0.0, 0.0), "some": (0.0, 1.0), "always": (1.0, 1.0), "often": (1.0, 1.0, 1.0, 0.0)}
    found = [answers(name, raws) for name, raws in rates.items()]
    node = HardSetNode(evaluation="e")
    assert choose_hard(found, node, 0) == (["some", "often"], 0)
    assert choose_hard(found, node.model_copy(update={"high": 0.6}), 0) == (["some"], 0)
    chosen, added = choose_hard(found, node.model_copy(update={"min_rows": 3}), 0)
    assert added == 1 and len(chosen) == 3


def test_hard_rows_keep_their_columns_and_the_rationale_share(tmp_path: Path) -> None:
    rows = [row(i, rationale="because" if i % 4 == 0 else "") for i in range(40)]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    cfg = config()
    found = [answers(k.id, (0.0, 1.0)) for k in known_rows([file], cfg)]
    node = HardSetNode.model_validate({"evaluation": "e", "draw": {"total": 15, "rationale_share": 0.6}})
    manifest = write_hard_set(found, [file], node, cfg, 0, tmp_path)
    assert manifest["rows"] == 15 and manifest["rationales"]["rows"] == 9
    assert '"mean_score": 0.5' in (tmp_path / "rows.jsonl").read_text().splitlines()[0]
    with pytest.raises(DataError, match="none of 2 prompts has a mean score between"):
        write_hard_set([answers("a", (0.0,)), answers("b", (1.0,))], [file],
                       node.model_copy(update={"min_rows": 0}), cfg, 0, tmp_path)  # fmt: skip


def judge(url: str, **changes: Any) -> LlmJudge:
    return LlmJudge(base_url=url, model="j", retries=1, backoff_s=0.01, parse_retries=0, **changes)


def test_a_model_judges_and_finished_verdicts_are_kept(tmp_path: Path) -> None:
    """A scripted endpoint; the judge against vLLM's own server is tests/engines/test_judge.py."""
    prompts = [prompt(name, reference="as long") for name in ("p0", "p1")]  # the length guard looks at it
    found = [answers("p0", (0.0, 0.5)), answers("p1", (0.0, 0.5))]
    cache = tmp_path / "verdicts.jsonl"

    def rate(body: dict[str, Any]) -> str:
        return "Score: 9" if "w0.5" in json.dumps(body) else "Score: 2"

    with endpoint(rate) as server:
        scores, counts = judge_scores(prompts, found, judge(server.url), cache)
        assert len(server.requests) == 4
        again, _ = judge_scores(prompts, found, judge(server.url), cache)
        assert len(server.requests) == 4 and again == scores
    assert counts["ok"] == 4
    assert all(row[1] > row[0] for row in scores)  # type: ignore[operator]
    manifest = write_labels(prompts, found, scores, labels(), tmp_path / "rows.jsonl")
    assert manifest["labels"] == 2 and '"w0.5"' in (tmp_path / "rows.jsonl").read_text()


def test_a_judge_that_goes_down_keeps_what_it_had_said(tmp_path: Path) -> None:
    prompts, found = [prompt("p0"), prompt("p1")], [answers("p0", (0.0,)), answers("p1", (1.0,))]
    cache = tmp_path / "verdicts.jsonl"
    said = iter(["Score: 5"])
    with endpoint(lambda body: next(said, 503)) as server:
        with pytest.raises(RedoneError, match=r"127\.0\.0\.1"):
            judge_scores(prompts, found, judge(server.url, concurrency=1), cache)
        url = server.url
    assert len(cache.read_text().splitlines()) == 1
    with pytest.raises(RedoneError, match=re.escape(url.removesuffix("/v1"))):
        judge_scores(prompts, found, judge(url), cache)  # nobody listens


def test_a_judge_without_verdicts_stops(tmp_path: Path) -> None:
    with (
        endpoint(lambda body: "hm") as server,
        pytest.raises(RedoneError, match="1 of 1 answers got no verdict"),
    ):
        judge_scores([prompt("p0")], [answers("p0", (0.0,))], judge(server.url), tmp_path / "v.jsonl")


def test_labels_are_for_the_tasks_that_do_not_fail() -> None:
    prompts = [prompt("a", "add"), prompt("b", "reply"), prompt("c", "add")]
    assert [p.id for p in outside(prompts, ["add"])] == ["b"]
    assert [p.id for p in outside(prompts, [])] == ["a", "b", "c"]
    assert [p.id for p in outside(prompts, ["add", "reply"])] == ["a", "b", "c"]
