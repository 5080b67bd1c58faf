"""What became of every drawn prompt: one line per (epoch, prompt id), appended as it happens."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

Event = Literal["trained", "dropped"]


class Ledger:
    """An append-only jsonl file. Every record is on disk (flushed) when the call returns."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def trained(self, step: int, epoch: int, prompt_id: str) -> None:
        self._write("trained", step, epoch, prompt_id, None)

    def dropped(self, step: int, epoch: int, prompt_id: str, reason: str) -> None:
        self._write("dropped", step, epoch, prompt_id, reason)

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event, step: int, epoch: int, prompt_id: str, reason: str | None) -> None:
        record: dict[str, str | int] = {"event": event, "step": step, "epoch": epoch, "prompt": prompt_id}
        if reason is not None:
            record["reason"] = reason
        self._file.write(json.dumps(record) + "\n")


def audit(path: str | Path) -> list[str]:
    """Problems of a ledger, one sentence each; none for a clean one.

    A prompt must appear once per epoch: drawn, generated, then trained or dropped with a reason. Steps
    never go back.
    """
    problems: list[str] = []
    seen: dict[tuple[int, str], list[str]] = defaultdict(list)
    last_step = 0
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None:
                problems.append(f"line {number} is not a ledger record: {line.strip()[:80]!r}")
                continue
            event, step, epoch, prompt_id = record
            if step < last_step:
                problems.append(f"line {number}: step {step} after step {last_step}")
            last_step = max(last_step, step)
            seen[epoch, prompt_id].append(f"{event} at step {step}")
    for (epoch, prompt_id), events in seen.items():
        if len(events) > 1:
            trained = sum(event.startswith("trained") for event in events)
            verdict = "trained twice" if trained > 1 else "generated twice"
            problems.append(f"prompt {prompt_id} of epoch {epoch} {verdict}: {', '.join(events)}")
    return problems


def _parse(line: str) -> tuple[str, int, int, str] | None:
    try:
        record = json.loads(line)
        event, step, epoch, prompt_id = (record[key] for key in ("event", "step", "epoch", "prompt"))
    except (ValueError, KeyError, TypeError):
        return None
    valid = isinstance(step, int) and isinstance(epoch, int) and isinstance(prompt_id, str)
    if not valid or event not in ("trained", "dropped") or (event == "dropped" and not record.get("reason")):
        return None
    return event, step, epoch, prompt_id
