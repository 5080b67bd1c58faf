"""Every number of the released scorers, to 1e-6, on 75 lists of made-up answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from redone.evaluate.suites_sns import RELEASED, redtrans, reported

TOLERANCE = 1e-6
# jieba and n-grams over many or long texts; a mixed list of Note-MRC-simple stays in the quick test
SLOW = ("Note-MRC-simple__copy_everything_brackets", "Note-MRC-simple__gold", "RedTrans")


def vectors(data: Path) -> list[Path]:
    return sorted((data / "sns-bench-golden").glob("*__*.json.gz"))


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    if name.startswith("RedTrans"):
        rows = json.loads((data / "redtrans-bench" / "RedTrans-Bench.json").read_text(encoding="utf-8"))
        return [row for row in rows if row["dst_lang"] == name[-2:]]
    found = json.loads((data / "sns-bench" / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, list)
    return found


def different(data: Path, file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        vector = json.load(stream)
    name, rows = vector["file"], rows_of(data, vector["file"])
    assert vector["n"] == len(rows) == len(vector["predictions"])
    if name.startswith("RedTrans"):
        scores, main = redtrans(vector["predictions"], rows), None
    else:
        scores = RELEASED[name][1](vector["predictions"], rows)
        main = reported(name, scores)
    wanted = dict(vector["scores"])
    if vector.get("reported") is not None or main is not None:
        scores, wanted = {**scores, "reported": main}, {**wanted, "reported": vector["reported"]}
    if set(scores) != set(wanted):
        return [f"{file.name}: keys {set(scores) ^ set(wanted)}"]
    return [
        f"{file.name}: {key} {scores[key]} for {wanted[key]}"
        for key in wanted
        if not abs(scores[key] - wanted[key]) <= TOLERANCE
    ]


def test_released_scorers_of_the_quick_vectors(redone_data: Path) -> None:
    files = [f for f in vectors(redone_data) if not f.name.startswith(SLOW)]
    assert len(files) == 63
    assert [line for file in files for line in different(redone_data, file)] == []


@pytest.mark.slow
def test_released_scorers_of_all_files(redone_data: Path) -> None:
    files = vectors(redone_data)
    assert len(files) == 75
    assert [line for file in files for line in different(redone_data, file)] == []
