"""The graph of stages on disk: what is finished, what must run again, and the run itself.

Node `explore` lives in nodes/explore-<fingerprint>/. node.json is written there last: it says that the node
is finished and what came out. The fingerprint covers the content of everything the node reads, so a changed
input gives another folder, and a finished one is found again when the change is taken back.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from redone.config.load import dump_config
from redone.config.nodes import ancestors, needs, node_order, references, stage_config
from redone.config.pipeline import BASE_MODEL, Node
from redone.config.schema import Config
from redone.config.versions import check_run_folder
from redone.errors import ConfigError, RunFolderError
from redone.pipeline.digests import Digests, of_value
from redone.pipeline.fingerprint import content_of
from redone.pipeline.folder import write_json

log = logging.getLogger(__name__)

DONE = "node.json"
SHOWN_DIGITS = 10
# Which output a dependent reads, by the role in which it names the node.
READS = {"model": "model", "rows": "rows", "evaluation": "answers", "bucket": "bucket"}
State = Literal["waiting", "running", "done", "kept", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file or folder that a node made; `path` relative to the pipeline's folder, or outside of it."""

    path: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """node.json."""

    name: str
    kind: str
    fingerprint: str
    inputs: Mapping[str, str]  # what was read -> its digest
    outputs: Mapping[str, Output]
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the node says of itself, for people
    seconds: float = 0.0

    @staticmethod
    def read(path: Path) -> Finished | None:
        """None when the node is not finished."""
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        outputs = {role: Output(**output) for role, output in values.pop("outputs").items()}
        return Finished(outputs=outputs, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a node's function gets. Paths exist; `cfg` is the node's own complete configuration."""

    name: str
    node: Node
    cfg: Config
    folder: Path
    model: Path | None  # of nodes that name one
    rows: tuple[str, ...]  # files, in order
    named: Mapping[str, Path]  # output of every other node that is named: node -> file or folder
    base_cfg: Config  # the whole pipeline's


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a node's function returns: its outputs by role, and facts for people."""

    outputs: Mapping[str, Path]
    facts: Mapping[str, Any] = field(default_factory=dict)


class GraphObserver(Protocol):
    """What the user sees (redone.record.graph)."""

    def state(self, name: str, state: State, text: str = "") -> None: ...


Function = Callable[[Task], Made]


class Graph:
    """The nodes of one pipeline folder. State over time: which nodes are finished."""

    def __init__(self, cfg: Config, root: Path) -> None:
        self.cfg, self.root = cfg, root
        self.order = node_order(cfg.pipeline)
        self.digests = Digests(root / "digests.json")
        self.finished: dict[str, Finished] = {}

    @staticmethod
    def create(cfg: Config, root: Path | None = None) -> Graph:
        """The folder run.dir/run.name, made or found. Raises RunFolderError when it is something else."""
        root = root or Path(cfg.run.dir) / cfg.run.name
        if root.exists() and any(root.iterdir()):
            check_run_folder(root)
            if not (root / "nodes").is_dir():
                raise RunFolderError(f"{root} is no pipeline's folder; remedy: another run.name")
        try:
            (root / "nodes").mkdir(parents=True, exist_ok=True)
            (root / "logs").mkdir(exist_ok=True)
            dump_config(cfg, root / "config.yaml")
        except OSError as error:
            raise RunFolderError(f"cannot write {root}: {error.strerror}; remedy: run.dir=...") from None
        return Graph(cfg, root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time. Raises RunFolderError when another one works here."""
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(f"another redone works in {self.root}; wait for it, or end it") from None
            yield

    def wanted(
        self, start: str | None = None, until: str | None = None, only: str | None = None
    ) -> tuple[list[str], set[str]]:
        """(nodes to visit in order, those of them to make again though finished).

        start: that node and everything that rests on it again. until: that node and what it needs. only: that
        node alone, again. Without: pipeline.targets, the nodes of pipeline.table, and what they need. Raises
        ConfigError on unknown names.
        """
        for name in (start, until, only):
            if name is not None and name not in self.cfg.pipeline.nodes:
                raise ConfigError(f"{name!r} is no node of this pipeline; there are {', '.join(self.order)}")
        if only is not None:
            return [only], {only}
        pipeline = self.cfg.pipeline
        targets = [until] if until else [*pipeline.targets, *pipeline.table.values()]
        if not until and not pipeline.targets:
            targets = list(self.order)
        chosen = set(targets).union(*(ancestors(self.cfg.pipeline, t) for t in targets))
        again: set[str] = set()
        if start is not None:
            again = {n for n in chosen if n == start or start in ancestors(self.cfg.pipeline, n)}
            if not again:
                raise ConfigError(f"no chosen node rests on {start!r}")
        return [n for n in self.order if n in chosen], again

    def run(
        self,
        names: Sequence[str],
        again: set[str],
        functions: Mapping[str, Function],
        observer: GraphObserver,
    ) -> None:
        """Make every node of `names` that is not finished. A node's error ends the run; others stay."""
        for name in names:
            inputs = self.inputs(name)
            folder = self.folder(name, inputs)
            done = Finished.read(folder / DONE)
            if done is not None and self._intact(done) and name not in again:
                self._settle(name, done)
                observer.state(name, "kept", _short(done.facts))
                continue
            if done is not None:
                shutil.rmtree(folder)
            twin = None if name in again else self._twin(name, inputs)
            if twin is not None:
                self._settle(name, self._write(folder, replace(twin, name=name, seconds=0.0)))
                observer.state(name, "done", f"the same inputs as {twin.name}: what that made")
                continue
            observer.state(name, "running")
            started = time.monotonic()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                made = functions[self.cfg.pipeline.nodes[name].kind](self.task(name, folder))
                done = self._finish(name, folder, inputs, made, time.monotonic() - started)
            except BaseException:
                observer.state(name, "failed")
                raise
            self._settle(name, done)
            observer.state(name, "done", _short(done.facts))

    def inputs(self, name: str) -> dict[str, str]:
        """Everything that decides what node `name` makes -> digest. Raises RunFolderError when a node that it
        needs is not finished."""
        node = self.cfg.pipeline.nodes[name]
        found: dict[str, str] = {}
        for role, names in references(node).items():
            for place, other in enumerate(names):
                key = f"{role}[{place}]"
                if other in self.cfg.pipeline.nodes:
                    found[key] = self.output(other, READS[role]).digest
                elif other == BASE_MODEL:
                    found[key] = self.digests.of(self.cfg.model.path)
                else:
                    found[key] = self.digests.of(other)
                if role == "evaluation":
                    rows = self.row_files(other)
                    found |= {f"{key}.rows[{i}]": self.digests.of(f) for i, f in enumerate(rows)}
        cfg = stage_config(self.cfg, name)
        return found | content_of(name, node, cfg, self.cfg, self.digests)

    def folder(self, name: str, inputs: Mapping[str, str]) -> Path:
        return self.root / "nodes" / f"{name}-{of_value(dict(inputs))[:SHOWN_DIGITS]}"

    def output(self, name: str, role: str) -> Output:
        """Raises RunFolderError when node `name` is not finished."""
        done = self.finished.get(name) or self.look(name)
        if done is None:
            raise RunFolderError(
                f"node {name!r} is not finished in {self.root}; run it first: "
                f"redone run CONFIG --until {name}"
            )
        return done.outputs[role]

    def look(self, name: str) -> Finished | None:
        """The finished node under the present configuration, or None."""
        if any(self.look(other) is None for other in needs(self.cfg.pipeline, name)):
            return None
        done = Finished.read(self.folder(name, self.inputs(name)) / DONE)
        if done is not None:
            self.finished[name] = done
        return done

    def path(self, output: Output) -> Path:
        return self.root / output.path  # an absolute path wins

    def row_files(self, name: str) -> list[str]:
        """The files of prompts or conversations that node `name` reads."""
        nodes = self.cfg.pipeline.nodes
        rows = references(nodes[name])["rows"]
        return [str(self.path(self.output(r, READS["rows"]))) if r in nodes else r for r in rows]

    def task(self, name: str, folder: Path) -> Task:
        """Paths of everything that the node names."""
        node, nodes = self.cfg.pipeline.nodes[name], self.cfg.pipeline.nodes
        model, rows, named = None, [], {}
        for role, names in references(node).items():
            for other in names:
                if other in nodes:
                    path = self.path(self.output(other, READS[role]))
                    named[other] = path
                else:
                    path = Path(self.cfg.model.path if other == BASE_MODEL else other)
                if role == "model":
                    model = path
                elif role == "rows":
                    rows.append(str(path))
        sections = {"model": {"path": str(model)}} if model is not None else {}
        cfg = stage_config(self.cfg, name, **sections)
        return Task(
            name=name, node=node, cfg=cfg, folder=folder, model=model, rows=tuple(rows), named=named,
            base_cfg=self.cfg,
        )  # fmt: skip

    def _intact(self, done: Finished) -> bool:
        """A finished node whose files were removed is made again."""
        return all(self.path(output).exists() for output in done.outputs.values())

    def _twin(self, name: str, inputs: Mapping[str, str]) -> Finished | None:
        """A finished node that read the same, e.g. evaluated a model that a stage then handed on."""
        kind = self.cfg.pipeline.nodes[name].kind
        alike = (d for d in self.finished.values() if d.kind == kind and d.inputs == inputs)
        return next((d for d in alike if d.name != name and self._intact(d)), None)

    def _write(self, folder: Path, done: Finished) -> Finished:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DONE, asdict(done))
        return done

    def _finish(
        self, name: str, folder: Path, inputs: Mapping[str, str], made: Made, seconds: float
    ) -> Finished:
        outputs = {}
        for role, path in made.outputs.items():
            inside = path.resolve().is_relative_to(self.root.resolve())
            shown = path.resolve().relative_to(self.root.resolve()) if inside else path.resolve()
            outputs[role] = Output(path=str(shown), digest=self.digests.of(path))
        done = Finished(
            name=name,
            kind=self.cfg.pipeline.nodes[name].kind,
            fingerprint=of_value(dict(inputs)),
            inputs=dict(inputs),
            outputs=outputs,
            facts=made.facts,
            seconds=round(seconds, 3),
        )
        return self._write(folder, done)

    def _settle(self, name: str, done: Finished) -> None:
        self.finished[name] = done
        current = self.root / "current.json"
        known = json.loads(current.read_text()) if current.is_file() else {}
        write_json(current, {**known, name: f"nodes/{name}-{done.fingerprint[:SHOWN_DIGITS]}"})


def _short(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items() if isinstance(v, str | int | float | bool))[:120]
