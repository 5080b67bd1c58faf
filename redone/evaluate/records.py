"""The evaluation folder: settings.json, records/<suite>.jsonl (one item a line, appended when it is done),
summary.json, report.html, logs/. Records are the result; everything else can be made again from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import xxhash

from redone.errors import RunFolderError
from redone.evaluate.items import EvalItem
from redone.evaluate.suite import Suite
from redone.record.report import read_jsonl

FORMAT = 1
SAMPLED = 16  # places of a weight file that the fingerprint reads
CHUNK = 1 << 20  # bytes read at each


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One item and its n answers. stats[metric][sample]: the numbers of measures.py."""

    part: str
    id: str
    index: int
    prompt_tokens: int
    outputs: tuple[str, ...]
    finishes: tuple[str, ...]  # of Completion.finish, or "unfit": the prompt leaves no room for an answer
    tokens: tuple[int, ...]
    stats: Mapping[str, tuple[tuple[float, ...], ...]]
    failed: Mapping[str, int] = field(default_factory=dict)  # metric -> answers whose reward failed
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Record:
        return Record(
            **{
                **values,
                **{name: tuple(values[name]) for name in ("outputs", "finishes", "tokens")},
                "stats": {m: tuple(map(tuple, rows)) for m, rows in values["stats"].items()},
                "details": {m: tuple(texts) for m, texts in values["details"].items()},
            }
        )


class EvalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "settings.json"
        self.logs = path / "logs"

    @staticmethod
    def open(path: Path) -> EvalFolder:
        """An existing one. Raises RunFolderError when it is none."""
        folder = EvalFolder(path)
        if not folder.settings_file.is_file():
            raise RunFolderError(
                f"{path} is no evaluation folder: it has no settings.json; `redone eval` makes one"
            )
        folder.settings()
        return folder

    def settings(self) -> dict[str, Any]:
        try:
            found = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{self.settings_file} is not JSON ({error}); use another --out") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise RunFolderError(
                f"{self.path}: records of format {found.get('format')}, this redone reads {FORMAT}; "
                "use another --out"
            )
        return found

    def suites(self) -> list[Suite]:
        return [Suite.model_validate(values) for values in self.settings()["suites"].values()]

    def join(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, or go on in it. Suites are added to those that are there.

        Raises RunFolderError naming the first setting under which existing records were made differently.
        """
        merged = dict(settings)
        if self.settings_file.is_file():
            old = self.settings()
            common = {**old, "suites": {k: v for k, v in old["suites"].items() if k in settings["suites"]}}
            new = {**settings, "suites": {k: v for k, v in settings["suites"].items() if k in old["suites"]}}
            if found := next(differences(common, new), None):
                raise RunFolderError(self._refusal(*found))
            merged["suites"] = {**old["suites"], **settings["suites"]}
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} exists and is no evaluation folder; use another --out")
        for part in ("records", "logs"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        replace(self.settings_file, json.dumps(merged, ensure_ascii=False, indent=1))

    def _refusal(self, key: str, old: Any, new: Any) -> str:
        if key.startswith("model.fingerprint"):
            was = self.settings()["model"]["path"]
            return (
                f"{self.path} holds records of another model ({was}, fingerprint {old}; this one has {new}); "
                "use another --out"
            )
        return (
            f"{self.path} holds records made with {key}={_short(old)}, now it is {_short(new)}; use the old "
            "value, or another --out"
        )

    def file(self, suite: str) -> Path:
        return self.path / "records" / f"{suite}.jsonl"

    def read(self, suite: str) -> dict[str, Record]:
        """Item id -> record; a last line that was cut short is left out."""
        return {values["id"]: Record.of(values) for values in read_jsonl(self.file(suite))}

    def writer(self, suite: str) -> RecordWriter:
        return RecordWriter(self.file(suite))

    def missing(self, suite: str, items: Sequence[EvalItem]) -> list[EvalItem]:
        """Items without a record. Raises RunFolderError when the data have changed under the records."""
        done = self.read(suite)
        current = {(item.part.id, item.index): item.prompt.id for item in items}
        for record in done.values():
            now = current.get((record.part, record.index), record.id)
            if now != record.id:
                raise RunFolderError(
                    f"{self.path} holds a record of {suite}/{record.part}, item {record.index}, whose row or "
                    "prompt is another one now (data or chat template changed); use another --out"
                )
        return [item for item in items if item.prompt.id not in done]


class RecordWriter:
    """Appends whole lines; a torn last line of an interrupted run is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def __enter__(self) -> RecordWriter:
        if self.path.is_file():
            data = self.path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)
        self._stream = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._stream is not None
        self._stream.close()

    def add(self, record: Record) -> None:
        assert self._stream is not None
        try:
            self._stream.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise RunFolderError(f"{self.path}: {error.strerror}; free space, then start again") from error


def fingerprint(folder: str | Path) -> str:
    """Of a model folder: its JSON and template files whole; of weight files the size, the header and 16
    places of 1 MiB. A training step changes every weight, so other weights have another fingerprint."""
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).iterdir()):
        weights = path.suffix in (".safetensors", ".bin")
        if not path.is_file() or not (weights or path.suffix in (".json", ".jinja", ".txt", ".model")):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            if not weights or size <= SAMPLED * CHUNK:
                digest.update(stream.read())
                continue
            for n in range(SAMPLED):
                stream.seek(n * (size - CHUNK) // (SAMPLED - 1))
                digest.update(stream.read(CHUNK))
    return digest.hexdigest()


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs; model.path may: the fingerprint decides."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            inner = f"{key}.{name}" if key else name
            if inner != "model.path":
                yield from differences(old.get(name), new.get(name), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for n, (a, b) in enumerate(zip(old, new, strict=True)):
            label = a["id"] if isinstance(a, Mapping) and "id" in a else n
            yield from differences(a, b, f"{key}.{label}")
    elif old != new:
        yield key, old, new


def replace(target: Path, text: str) -> None:
    """Write atomically."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
