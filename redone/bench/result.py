"""A benchmark's JSON file: figures with everything that a reader needs to believe them or to repeat them."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redone.bench.measure import Figure
from redone.bench.roofline import Roofline
from redone.errors import ConfigError

SCHEMA = 1
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The code that was measured; `id` is "" where there is no repository (an installed wheel)."""

    id: str
    dirty: tuple[str, ...]  # changed or untracked files


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    parts: tuple[str, ...]
    commit: str
    dirty: bool
    versions: Mapping[str, str]
    device: Mapping[str, Any]  # name, cores, ranks, engines, load before
    config: Mapping[str, Any]  # resolved
    options: Mapping[str, Any]  # warm-up, repeats, lengths
    rooflines: Mapping[str, Roofline]  # "start", "end": what else the machine did shows in their difference
    figures: tuple[Figure, ...]
    time: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    notes: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        values = {
            "schema": SCHEMA,
            "parts": list(self.parts),
            "time": self.time,
            "commit": self.commit,
            "dirty": self.dirty,
            "versions": dict(self.versions),
            "device": dict(self.device),
            "options": dict(self.options),
            "rooflines": {name: asdict(r) for name, r in self.rooflines.items()},
            "figures": [figure.as_json() for figure in self.figures],
            "notes": list(self.notes),
            "config": dict(self.config),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def read_result(path: Path) -> BenchResult:
    """The inverse of write. Raises ConfigError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ConfigError(f"{path}: schema {found['schema']}, this redone reads {SCHEMA}; measure again")
        return BenchResult(
            parts=tuple(found["parts"]),
            commit=found["commit"],
            dirty=found["dirty"],
            versions=found["versions"],
            device=found["device"],
            config=found["config"],
            options=found["options"],
            rooflines={name: Roofline(**r) for name, r in found["rooflines"].items()},
            figures=tuple(Figure.from_json(f) for f in found["figures"]),
            time=found["time"],
            notes=tuple(found["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no result of `redone bench`: {type(error).__name__}: {error}; give a file it wrote"
        ) from error


def commit_of(folder: Path = PACKAGE) -> Commit:
    """HEAD of the repository that holds `folder`, and what differs from it."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=60
            )
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None or git("ls-files", "--error-unmatch", str(folder / "__init__.py")) is None:
        return Commit(id="", dirty=())
    changed = git("status", "--porcelain", "--untracked-files=normal") or ""
    return Commit(id=head.strip(), dirty=tuple(line[3:] for line in changed.splitlines()))


def require_clean(commit: Commit, allow_dirty: bool) -> None:
    """Raises ConfigError: a figure belongs to a commit."""
    if allow_dirty:
        return
    if not commit.id:
        raise ConfigError(
            "redone bench: this installation is no git checkout, so the result cannot name its code; run it "
            "from a checkout, or pass --allow-dirty, which marks the result"
        )
    if commit.dirty:
        shown = ", ".join(commit.dirty[:3]) + (" ..." if len(commit.dirty) > 3 else "")
        raise ConfigError(
            f"redone bench: the working tree differs from {commit.id[:12]} ({shown}): commit first, or pass "
            "--allow-dirty, which marks the result"
        )


def table(result: BenchResult) -> str:
    """The figures as aligned text."""
    lines = [f"{'figure':34s} {'median':>12s} {'low':>12s} {'high':>12s}  {'unit':14s} of the roofline"]
    lines += [_line(figure) for figure in result.figures]
    for name, roof in result.rooflines.items():
        lines.append(
            f"roofline, {name}: {roof.matmul_flops / 1e9:,.1f} GFLOP/s ({roof.dtype}), copy "
            f"{roof.copy_bytes_s / 1e9:,.1f} GB/s"
        )
    mark = " (dirty: not a result to keep)" if result.dirty else ""
    lines.append(f"commit {result.commit[:12] or 'unknown'}{mark}")
    return "\n".join([*lines, *result.notes])


def _line(figure: Figure) -> str:
    share = "" if figure.share is None else f"{figure.share:6.1%}  {figure.ceiling_of}"
    cells = [f"{v:>12,.4g}" for v in (figure.median, min(figure.values), max(figure.values))]
    return f"{figure.name:34s} {' '.join(cells)}  {figure.unit:14s} {share}".rstrip()


def find(figures: Sequence[Figure], name: str) -> Figure | None:
    return next((figure for figure in figures if figure.name == name), None)
