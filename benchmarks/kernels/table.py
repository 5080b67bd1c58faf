"""Puts a result of run.py into docs/kernels.md: python benchmarks/kernels/table.py RESULT.json.

Only between the two marks; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
COLUMNS = (
    "ms",
    "TFLOP_per_s",
    "TB_per_s",
    "peak_MiB",
    "max_abs_error",
    "loss_error",
    "dhidden_relative_error",
)


def table(record: dict[str, Any]) -> str:
    """Markdown of one result file."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        f"{record['device']}, {record['date']}, {record['commit']}, CUDA {record['cuda']}; {versions}.",
        "", "| target | wanted | measured |", "| --- | --- | --- |",
        *(f"| {t['what']} | {t['target']} | {t['measured']:.3g} |" for t in record["targets"]),
        "", f"| | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}",
    ]  # fmt: skip
    for row in record["rows"]:
        cells = (f"{row[c]:.3g}" if c in row else row.get("failed", "") * (c == "ms") for c in COLUMNS)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def place(page: str, text: str) -> str:
    """`page` with `text` between the marks. Raises ValueError where they are missing."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    record = json.loads(Path(sys.argv[1]).read_text())
    PAGE.write_text(place(PAGE.read_text(), table(record)))


if __name__ == "__main__":
    main()
