"""Drawing rows from tasks of very different size: shares, temperature, caps, rationales, memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redone.config.pipeline import DrawConfig, MixSource
from redone.data.allot import allot
from redone.data.mix import mix
from redone.errors import DataError

SIZES = {"huge": 10_000, "middle": 300, "tail": 12}


@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 500), min_size=1),
    total=st.integers(0, 3000),
    temperature=st.floats(1, 20),
    floor=st.integers(0, 30),
    cap=st.integers(1, 400),
)
def test_an_allotment_adds_up_and_keeps_its_bounds(
    sizes: dict[str, int], total: int, temperature: float, floor: int, cap: int
) -> None:
    found = allot(
        sizes, total, weights={}, caps=dict.fromkeys(sizes, cap), floor=floor, temperature=temperature
    )
    assert set(found) == set(sizes)
    limits = {t: min(n, cap) for t, n in sizes.items()}
    assert all(0 <= found[t] <= limits[t] for t in sizes)
    assert sum(found.values()) == min(total, sum(limits.values()))
    if sum(min(floor, n) for n in limits.values()) <= total:
        assert all(found[t] >= min(floor, limits[t]) for t in sizes)


def test_temperature_keeps_the_long_tail() -> None:
    proportional = allot(SIZES, 1000, weights={}, caps={})
    assert proportional == {"huge": 970, "middle": 29, "tail": 1}
    root = allot(SIZES, 1000, weights={}, caps={}, temperature=2)
    assert root["tail"] == 12 and root["middle"] > 100  # wishes for more than there is go to the others
    assert sum(root.values()) == 1000
    assert allot(SIZES, 30, weights={}, caps={}, temperature=1e9) == {"huge": 10, "middle": 10, "tail": 10}
    assert allot(SIZES, 1000, weights={}, caps={"huge": 500})["huge"] == 500
    assert allot(SIZES, 1000, weights={}, caps={}, floor=10)["tail"] == 10
    assert allot(SIZES, 100, weights={"middle": 1e9}, caps={}) == {"huge": 0, "middle": 100, "tail": 0}


def write(path: Path, counts: Mapping[str, int], **columns: Any) -> str:
    with path.open("w") as f:
        for task, count in counts.items():
            for i in range(count):
                values = {k: v(i) if callable(v) else v for k, v in columns.items()}
                f.write(json.dumps({"task": task, "prompt": f"{task} {i}", "label": "x", **values}) + "\n")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_domains_keep_their_shares_and_the_manifest_says_so(tmp_path: Path) -> None:
    sns = write(tmp_path / "sns.jsonl", {"a": 400, "b": 40})
    general = write(tmp_path / "general.jsonl", {"maths": 100})
    sources = [MixSource(files=(sns,)), MixSource(files=(general,), domain="general")]
    draw = DrawConfig(total=160, shares={"sns": 0.75, "general": 0.25}, temperature=2)
    drawn = mix(sources, draw, 7, tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert Counter(r["domain"] for r in rows) == {"sns": 120, "general": 40}
    assert len({r["prompt"] for r in rows}) == 160  # none twice
    counts = Counter(r["task"] for r in rows)
    assert counts["b"] > 120 * 40 / 440 * 2  # the tail is larger than its proportion
    manifest = drawn.manifest(sources, draw, 7)
    assert manifest["rows"] == 160 and manifest["domains"]["general"] == {"rows": 40, "share": 0.25}
    (entry,) = [t for t in manifest["tasks"] if t["task"] == "b"]
    assert entry == {
        "domain": "sns", "task": "b", "available": 40, "drawn": counts["b"], "sources": {sns: counts["b"]}
    }  # fmt: skip
    assert all(r["drawn_from"].startswith((sns, general)) for r in rows)


def test_a_seed_is_a_draw(tmp_path: Path) -> None:
    source = [MixSource(files=(write(tmp_path / "a.jsonl", {"a": 100}),))]
    texts = []
    for seed in (1, 1, 2):
        mix(source, DrawConfig(total=20), seed, tmp_path / "out.jsonl")
        texts.append((tmp_path / "out.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_rows_repeat_only_when_asked(tmp_path: Path) -> None:
    source = [MixSource(files=(write(tmp_path / "a.jsonl", {"a": 10}),))]
    assert mix(source, DrawConfig(total=25), 0, tmp_path / "o").drawn.total() == 10
    assert mix(source, DrawConfig(total=25, max_repeat=3), 0, tmp_path / "o").drawn.total() == 25
    assert set(Counter(r["prompt"] for r in read(tmp_path / "o")).values()) == {2, 3}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5718, 1.0])
def test_the_share_of_rationales(tmp_path: Path, share: float) -> None:
    file = write(tmp_path / "a.jsonl", {"a": 1000, "b": 500}, rationale=lambda i: "because" if i % 2 else "")
    draw = DrawConfig(total=400, rationale_share=share)
    drawn = mix([MixSource(files=(file,))], draw, 0, tmp_path / "o")
    assert drawn.manifest([MixSource(files=(file,))], draw, 0)["rationales"]["rows"] == round(400 * share)
    assert sum(bool(r["rationale"]) for r in read(tmp_path / "o")) == round(400 * share)


def test_a_task_without_rationales_is_made_up_for_by_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"a": 200, "none": 200}, rationale=lambda i: "because")
    rows = [{**r, "rationale": None} if r["task"] == "none" else r for r in read(Path(file))]
    Path(file).write_text("".join(json.dumps(r) + "\n" for r in rows))
    mix([MixSource(files=(file,))], DrawConfig(total=200, rationale_share=0.5), 0, tmp_path / "o")
    assert sum(bool(r["rationale"]) for r in read(tmp_path / "o")) == 100


def test_unusable_rows_stop_or_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"a": 10, "bad": 2})

    def check(row: Mapping[str, Any], place: str) -> None:
        if row["task"] == "bad":
            raise DataError(f"{place}: no reward for task 'bad'")

    source = [MixSource(files=(file,))]
    with pytest.raises(DataError, match=r"a\.jsonl, line 11: no reward"):
        mix(source, DrawConfig(), 0, tmp_path / "o", check)
    assert not (tmp_path / "o").exists()
    drawn = mix(source, DrawConfig(), 0, tmp_path / "o", check, skip_bad=True)
    assert drawn.skipped == 2 and drawn.drawn.total() == 10 and "line 11" in drawn.reasons[0]


def test_unknown_domains_and_unreadable_files(tmp_path: Path) -> None:
    source = [MixSource(files=(write(tmp_path / "a.jsonl", {"a": 1}),))]
    with pytest.raises(DataError, match="'general', but rows are of sns"):
        mix(source, DrawConfig(shares={"sns": 1, "general": 1}), 0, tmp_path / "o")
    (tmp_path / "a.jsonl").write_text('{"task": "a"\n')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        mix(source, DrawConfig(), 0, tmp_path / "o")


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """12 MB of parquet rows, drawn with less than half of that in memory."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "big.parquet"
    writer = None
    for part in range(12):
        rows = [
            {"task": f"t{i % 75}", "prompt": f"{part} {i} " + "x" * 4000, "label": "x"} for i in range(250)
        ]
        table = pyarrow.Table.from_pylist(rows)
        writer = writer or pyarrow.parquet.ParquetWriter(
            path, table.schema, compression="none", use_dictionary=False
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()
    assert path.stat().st_size > 11.5e6
    tracemalloc.start()
    drawn = mix([MixSource(files=(str(path),))], DrawConfig(total=500), 0, tmp_path / "o")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.drawn.total() == 500 and peak < 6e6
