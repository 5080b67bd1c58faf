"""Published solutions pass their tests: a sample by default, all 164 and 974 of them when slow."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from redone.config.schema import SandboxReward
from redone.reward.sandbox import Sandbox, Tests, humaneval_tests, mbpp_tests

SAMPLE = 40  # every 40th task: 5 of HumanEval, 25 of MBPP
# MBPP tasks of special kinds: a builtin's name, objects of the program's classes, types as arguments, set-up
SPECIAL = (126, 601, 533, 927)
Case = tuple[str, Tests, str]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxReward(wall_s=60, cpu_s=30))


def humaneval(data: Path) -> list[Case]:
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["task_id"], humaneval_tests(row), row["canonical_solution"]) for row in rows]


def mbpp(data: Path) -> list[Case]:
    lines = (data / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(str(row["task_id"]), mbpp_tests(row), row["code"].replace("\r\n", "\n")) for row in rows]


def failures(sandbox: Sandbox, cases: list[Case]) -> list[str]:
    def run(case: Case) -> str:
        name, tests, code = case
        score = sandbox.score_program(tests, code)
        return "" if score.correct else f"{name}: {score.status} {score.detail}"

    with ThreadPoolExecutor(2) as pool:
        return [line for line in pool.map(run, cases) if line]


def test_sample_of_published_solutions(sandbox: Sandbox, redone_data: Path) -> None:
    cases = humaneval(redone_data)[::SAMPLE] + mbpp(redone_data)[::SAMPLE]
    cases += [case for case in mbpp(redone_data) if case[0] in map(str, SPECIAL)]
    assert failures(sandbox, cases) == []


@pytest.mark.slow
def test_all_humaneval_solutions(sandbox: Sandbox, redone_data: Path) -> None:
    cases = humaneval(redone_data)
    assert len(cases) == 164 and failures(sandbox, cases) == []


@pytest.mark.slow
def test_all_mbpp_solutions(sandbox: Sandbox, redone_data: Path) -> None:
    cases = mbpp(redone_data)
    assert len(cases) == 974 and failures(sandbox, cases) == []


def test_wrong_solutions_fail(sandbox: Sandbox, redone_data: Path) -> None:
    for _, tests, _ in humaneval(redone_data)[:3] + mbpp(redone_data)[:3]:
        names = "\n".join(f"def {name}(*a, **k): return None" for name in tests.names)
        score = sandbox.score_program(tests, names)
        assert score.status == "ok" and not score.correct
