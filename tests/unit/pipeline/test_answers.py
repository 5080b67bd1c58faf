"""Answers survive a kill: the file is a prefix, the rest is the same, nothing is generated twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from redone.data.prompts import PromptSet
from redone.errors import DataError, RedoneError
from redone.pipeline.answers import (
    answer_prompts,
    draw_prompts,
    evaluation_of,
    read_answers,
)
from redone.types import Sampling

from .making import Engines, Rewards, prompt

PROMPTS = [prompt(f"p{i:02}", task=f"t{i % 2}") for i in range(20)]
SAMPLING = Sampling(max_tokens=4)


def test_a_cut_file_is_completed_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = answer_prompts(PROMPTS, Engines(), Rewards(), SAMPLING, n=3, seed=1, path=tmp_path / "whole")
    path = tmp_path / "cut"
    with pytest.raises(InterruptedError):
        answer_prompts(PROMPTS, Engines(7), Rewards(), SAMPLING, n=3, seed=1, path=path, concurrency=2)
    kept = read_answers(path)
    assert 0 < len(kept) < len(PROMPTS)
    path.write_bytes(path.read_bytes() + b'{"prompt_id": "p')  # a line that a kill cut short
    engines = Engines()
    again = answer_prompts(PROMPTS, engines, Rewards(), SAMPLING, n=3, seed=1, path=path)
    assert again == whole == read_answers(path)
    assert (tmp_path / "whole").read_bytes() == path.read_bytes()
    assert len(engines.asked) == len(PROMPTS) - len(kept)


def test_another_seed_gives_other_answers(tmp_path: Path) -> None:
    found = [
        answer_prompts(PROMPTS, Engines(), Rewards(), SAMPLING, n=3, seed=s, path=tmp_path / str(s))
        for s in (1, 2)
    ]
    assert found[0] != found[1]


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    answer_prompts(PROMPTS[:3], Engines(), Rewards(), SAMPLING, n=1, seed=1, path=path)
    with pytest.raises(DataError, match="holds answers to other prompts"):
        answer_prompts(PROMPTS[1:], Engines(), Rewards(), SAMPLING, n=1, seed=1, path=path)


def test_failed_rewards_are_no_zeros_and_stop_above_a_share(tmp_path: Path) -> None:
    rewards = Rewards(broken=["p00", "p01"])
    found = answer_prompts(PROMPTS, Engines(), rewards, SAMPLING, n=2, seed=1, path=tmp_path / "a")
    assert found[0].usable() == () and len(found[2].usable()) == 2
    with pytest.raises(RedoneError, match=r"failed on 4 of 40 answers.*no verdict"):
        answer_prompts(
            PROMPTS, Engines(), rewards, SAMPLING, n=2, seed=1, path=tmp_path / "b", max_failed_share=0.05
        )
    assert len(read_answers(tmp_path / "b")) == 20


def test_draws_per_task_are_stable(tmp_path: Path) -> None:
    drawn = draw_prompts(PromptSet(prompts=tuple(PROMPTS), too_long=0), 3, seed=5)
    assert [p.task for p in drawn].count("t0") == 3 and len(drawn) == 6
    backwards = draw_prompts(PromptSet(prompts=tuple(PROMPTS[::-1]), too_long=0), 3, seed=5)
    assert {p.id for p in drawn} == {p.id for p in backwards}


def test_as_an_evaluation(tmp_path: Path) -> None:
    found = answer_prompts(PROMPTS, Engines(), Rewards(), SAMPLING, n=4, seed=1, path=tmp_path / "a")
    evaluation = evaluation_of(found)
    assert [i.prompt_id for i in evaluation.items] == [p.id for p in PROMPTS]
    assert evaluation.items[0].score == pytest.approx(found[0].mean_score)
    assert evaluation.items[0].tokens == 16
