from __future__ import annotations

import pytest

from redone.data.ledger import Ledger, audit


def test_a_clean_run_has_no_problems(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.trained(1, 0, "a")
    ledger.dropped(1, 0, "b", "uninformative")
    assert len(path.read_text().splitlines()) == 2  # on disk before close
    ledger.trained(2, 1, "a")
    ledger.close()
    assert audit(path) == []
    again = Ledger(path)
    again.dropped(3, 1, "b", "surplus")
    again.close()
    assert len(path.read_text().splitlines()) == 4
    assert audit(path) == []


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        (
            [("trained", 1), ("trained", 2)],
            "prompt a of epoch 0 trained twice: trained at step 1, trained at step 2",
        ),
        ([("trained", 1), ("dropped", 1)], "generated twice"),
        ([("dropped", 1), ("dropped", 2)], "generated twice"),
    ],
)
def test_a_prompt_used_twice_is_reported(tmp_path, events, problem):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event, step in events:
        if event == "trained":
            ledger.trained(step, 0, "a")
        else:
            ledger.dropped(step, 0, "a", "surplus")
    ledger.close()
    (found,) = audit(tmp_path / "ledger.jsonl")
    assert problem in found


def test_steps_that_go_back_and_torn_lines_are_reported(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.trained(2, 0, "a")
    ledger.trained(1, 0, "b")
    ledger.close()
    with path.open("a") as file:
        file.write('{"event": "dropped", "step": 3, "epoch": 0, "prompt": "c"}\n{"event": "tra')
    problems = audit(path)
    assert "line 2: step 1 after step 2" in problems
    assert sum("is not a ledger record" in p for p in problems) == 2
