"""`redone generate` through real engines: a cut file is gone on with, a bad row is named."""

from __future__ import annotations

import json

import pytest

from .conftest import TINY, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.extra]


def test_every_row_is_answered_and_a_cut_file_is_gone_on_with(workplace: Workplace) -> None:
    source, target = workplace.root / "rows.jsonl", workplace.root / "answers.jsonl"
    rows = [{"id": i, "prompt": [{"role": "user", "content": "abcdef"[: i + 1]}]} for i in range(5)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", str(TINY), "--input", str(source), "--output", str(target)]
    sampling = "evaluate.sampling={n: 2, temperature: 1.0, max_tokens: 5}"
    done = workplace.redone(*command, sampling)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = target.read_bytes()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [{"id": r["id"], "prompt": r["prompt"]} for r in found] == rows
    assert all(len(r["responses"]) == len(r["finish"]) == 2 for r in found)
    assert "5 rows" in done.stdout

    target.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"id": 3, "pro')
    assert workplace.redone(*command, sampling).returncode == 0
    assert target.read_bytes() == whole

    source.write_text(source.read_text() + json.dumps({"id": 5}) + "\n")
    refused = workplace.redone(*command, sampling)
    assert refused.returncode == 2 and "rows.jsonl" in refused.stderr and "prompt" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert target.read_bytes() == whole
