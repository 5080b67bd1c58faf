"""The graph on disk, with functions that only write what they read: what runs again, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.pipeline import same_models

from redone.config.check import check_config
from redone.config.load import config_from_dict, load_config
from redone.config.nodes import ancestors, node_order, stage_config
from redone.config.schema import Config
from redone.errors import ConfigError, RedoneError, RunFolderError
from redone.pipeline.digests import of_value
from redone.pipeline.graph import Graph, Made, Task

NODES: dict[str, Any] = {
    "rows": {"kind": "mix", "sources": [{"files": ["train.jsonl"]}]},
    "explore": {"kind": "rl", "data": ["rows"]},
    "measure": {"kind": "evaluate", "model": "explore", "data": ["val.jsonl"]},
    "diagnose": {"kind": "diagnose", "evaluation": "measure"},
    "sft_set": {"kind": "sft_set", "bucket": "diagnose", "data": ["train.jsonl"]},
    "labels": {"kind": "soft_labels", "model": "explore", "data": ["general.jsonl"]},
    "target": {"kind": "sft", "model": "explore", "data": ["sft_set", "labels"]},
    "final": {"kind": "evaluate", "model": "target", "data": ["test.jsonl"]},
}


class Silent:
    def state(self, name: str, state: str, text: str = "") -> None:
        pass


class Place:
    """A working directory with the files that NODES reads, and a count of what ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.fail_at: str | None = None
        self.alike: str | None = None
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text("{}")
        for name in ("train", "val", "test", "general"):
            (root / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "label": "x"}) + "\n")

    def config(self, **changes: Any) -> Config:
        nodes = json.loads(json.dumps(NODES))
        for dotted, value in changes.pop("nodes", {}).items():
            name, key = dotted.split(".", 1)
            nodes[name][key] = value
        return config_from_dict(
            {
                "run": {"name": "p", "dir": str(self.root / "runs"), **changes.pop("run", {})},
                "model": {"path": str(self.root / "model")},
                "data": {"val": [str(self.root / "val.jsonl")], "test": [str(self.root / "test.jsonl")]},
                "rewards": {"default": {"family": "exact"}},
                "pipeline": {
                    "nodes": nodes,
                    "table": {"final": "final"},
                },
                **changes,
            }
        )

    def make(self, task: Task) -> Made:
        """Content that differs with all that the node reads; that of `alike` with its rows and model only."""
        self.ran.append(task.name)
        if task.name == self.fail_at:
            raise RedoneError(f"{task.name} fails")
        seen = [Path(r).read_text() for r in task.rows] + [
            p.read_text() for p in task.named.values() if p.is_file()
        ]
        model = (task.model / "config.json").read_text() if task.model is not None else ""
        mixed = of_value([seen, model, "" if task.name == self.alike else task.folder.name])
        role = {"rl": "model", "sft": "model", "evaluate": "answers", "diagnose": "bucket"}.get(
            task.node.kind, "rows"
        )
        path = task.folder / role
        if role == "model":
            path.mkdir(exist_ok=True)
            (path / "config.json").write_text(json.dumps({"made": mixed}))
        else:
            path.write_text(json.dumps({"made": mixed}))
        return Made(outputs={role: path}, facts={"made": 1})

    def run(self, cfg: Config, **choice: str) -> list[str]:
        """Names of the nodes whose function ran."""
        self.ran = []
        graph = Graph.create(cfg)
        names, again = graph.wanted(choice.get("start"), choice.get("until"), choice.get("only"))
        kinds = {node.kind for node in cfg.pipeline.nodes.values()}
        graph.run(names, again, dict.fromkeys(kinds, self.make), Silent())
        return self.ran


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


ALL = list(NODES)


def test_the_same_model_is_not_asked_the_same_items_twice(place: Place) -> None:
    """A stage that hands its model on (refused, or without rows) is measured by the answers before."""
    nodes = {"final.model": "explore", "final.data": ["val.jsonl"]}
    assert place.run(place.config(nodes=nodes)) == ALL[:-1]
    root = place.root / "runs" / "p"
    current = json.loads((root / "current.json").read_text())
    one, other = (json.loads((root / current[n] / "node.json").read_text()) for n in ("measure", "final"))
    assert other["outputs"] == one["outputs"] and (other["name"], other["seconds"]) == ("final", 0)
    cfg = place.config(nodes=nodes)
    assert place.run(cfg) == []
    graph = Graph.create(cfg)
    columns = {"explore": "measure", "refine": "final"}
    assert all(graph.look(node) for node in columns.values())
    (note,) = same_models(graph, columns)
    assert note.startswith("refine is the model of explore")
    assert place.run(cfg, only="final") == ["final"]
    nodes["final.model"] = "target"
    assert place.run(place.config(nodes=nodes)) == ["final"]
    graph = Graph.create(place.config(nodes=nodes))
    assert all(graph.look(node) for node in columns.values()) and same_models(graph, columns) == ()


def test_every_node_runs_once_and_then_never_again(place: Place) -> None:
    assert place.run(place.config()) == ALL
    assert place.run(place.config()) == []
    done = [json.loads(f.read_text()) for f in (place.root / "runs/p/nodes").glob("*/node.json")]
    assert sorted(d["name"] for d in done) == sorted(ALL)
    assert all(d["inputs"] and d["outputs"] for d in done)


def _write(name: str) -> Callable[[Place], None]:
    return lambda place: (place.root / f"{name}.jsonl").write_text('{"prompt": "new", "label": "y"}\n')


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (_write("train"), ALL),
        (_write("val"), ["explore", "measure", "diagnose", "sft_set", "labels", "target", "final"]),
        (_write("general"), ["labels", "target", "final"]),
        (_write("test"), ["explore", "measure", "diagnose", "sft_set", "labels", "target", "final"]),
        ({"nodes": {"labels.candidates": 4}}, ["labels", "target", "final"]),
        ({"nodes": {"diagnose.fail_below": 0.9}}, ["diagnose", "sft_set", "target", "final"]),
        ({"nodes": {"target.overrides": {"trainer.optim.lr": 0.5}}}, ["target", "final"]),
        ({"run": {"seed": 1}}, ALL),
        ({"record": {"samples_per_step": 1}}, []),
        ({"checkpoint": {"every": 1}}, []),
    ],
)  # fmt: skip
def test_a_change_runs_exactly_its_dependents(place: Place, change: Any, again: list[str]) -> None:
    place.run(place.config())
    if callable(change):
        change(place)
        ran = place.run(place.config())
    else:
        ran = place.run(place.config(**change))
    assert ran == again


def test_who_reads_an_output_that_came_out_the_same_need_not_run(place: Place) -> None:
    place.alike = "diagnose"
    place.run(place.config())
    assert place.run(place.config(nodes={"diagnose.fail_below": 0.9})) == ["diagnose"]


def test_taking_a_change_back_runs_nothing(place: Place) -> None:
    place.run(place.config())
    assert place.run(place.config(run={"seed": 1})) == ALL
    assert place.run(place.config()) == []


def test_a_failure_keeps_what_is_finished(place: Place) -> None:
    place.fail_at = "diagnose"
    with pytest.raises(RedoneError, match="diagnose fails"):
        place.run(place.config())
    assert place.ran == ALL[:4]
    place.fail_at = None
    assert place.run(place.config()) == ALL[3:]


def test_removed_outputs_are_made_again(place: Place) -> None:
    place.run(place.config())
    (found,) = (place.root / "runs/p/nodes").glob("labels-*/rows")
    found.unlink()
    assert place.run(place.config()) == ["labels"]


def test_choosing_nodes(place: Place) -> None:
    cfg = place.config()
    assert place.run(cfg, until="diagnose") == ALL[:4]
    with pytest.raises(RunFolderError, match=r"'sft_set' is not finished.*--until sft_set"):
        place.run(cfg, only="target")
    assert place.run(cfg) == ALL[4:]
    assert place.run(cfg, only="labels") == ["labels"]
    assert place.run(cfg, start="sft_set") == ["sft_set", "target", "final"]
    with pytest.raises(ConfigError, match="'nothing' is no node"):
        place.run(cfg, until="nothing")


def test_targets_leave_the_rest_out(place: Place) -> None:
    cfg = place.config()
    cfg = cfg.model_copy(
        update={"pipeline": cfg.pipeline.model_copy(update={"targets": ("measure",), "table": {}})}
    )
    assert place.run(cfg) == ["rows", "explore", "measure"]


def test_two_processes_exclude_each_other(place: Place) -> None:
    graph = Graph.create(place.config())
    with graph.locked(), pytest.raises(RunFolderError, match="another redone works"), graph.locked():
        pass


def test_a_training_run_is_no_pipeline_folder(place: Place) -> None:
    folder = place.root / "runs" / "p"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {schema_version: 1}\n")
    with pytest.raises(RunFolderError, match="no pipeline's folder"):
        Graph.create(place.config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure.model": "diagnose"}, r"nodes\.measure: 'diagnose' is no rl or sft node"),
        ({"diagnose.evaluation": "rows"}, "'rows' is no evaluate node; there are measure, final"),
        ({"sft_set.bucket": "measure"}, "'measure' is no diagnose node"),
        ({"explore.model": "target"}, "is a circle"),
        ({"explore.overrides": {"algorithm.total_step": 3}}, r"nodes\.explore.*algorithm\.total_step"),
        ({"explore.gate": {"enable": True}, "explore.overrides": {"evaluate.before_train": False}}, "gate"),
    ],
)
def test_bad_graphs_are_refused_before_anything_runs(place: Place, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(place.config(nodes=changes))


def test_order_and_ancestors(place: Place) -> None:
    pipeline = place.config().pipeline
    order = node_order(pipeline)
    for name in order:
        assert all(order.index(a) < order.index(name) for a in ancestors(pipeline, name))
    assert ancestors(pipeline, "final") == set(ALL) - {"final"}


def test_a_stage_is_a_complete_configuration(place: Place) -> None:
    cfg = place.config(nodes={"target.overrides": {"trainer.optim": {"lr": 0.5}, "sft.epochs": 3}})
    stage = stage_config(cfg, "target", model={"path": "elsewhere"})
    assert (stage.kind, stage.sft.epochs, stage.trainer.optim.lr, stage.model.path) == (
        "sft",
        3,
        0.5,
        "elsewhere",
    )
    assert cfg.trainer.optim.lr != 0.5 and not stage.pipeline.nodes


def test_the_resolved_configuration_reads_back(place: Place) -> None:
    cfg = place.config(nodes={"target.overrides": {"trainer.optim.lr": 0.5}})
    graph = Graph.create(cfg)
    assert load_config(graph.root / "config.yaml") == cfg


def test_labels_outside_a_bucket_wait_for_the_diagnosis(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert "diagnose" not in ancestors(place.config().pipeline, "labels")
    assert "diagnose" in ancestors(place.config(nodes={"labels.bucket": "diagnose"}).pipeline, "labels")
    with pytest.raises(ConfigError, match="'explore' is no diagnose node"):
        node_order(place.config(nodes={"labels.bucket": "explore"}).pipeline)
