"""A pipeline's nodes: who needs whom, in which order, and each node's own complete configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redone.config.load import config_from_dict, merge
from redone.config.pipeline import (
    BASE_MODEL,
    DiagnoseNode,
    EvaluateNode,
    HardSetNode,
    MixNode,
    Node,
    PipelineConfig,
    RlNode,
    SftNode,
    SftSetNode,
    SoftLabelNode,
)
from redone.config.schema import Config
from redone.errors import ConfigError

EVERY_TASK = "all"
MODEL_KINDS = ("rl", "sft")  # nodes that make a model
ROW_KINDS = ("mix", "sft_set", "soft_labels", "hard_set")  # nodes that make rows


def references(node: Node) -> dict[str, tuple[str, ...]]:
    """What a node names: role -> names ("model", "rows", "evaluation", "bucket"); rows may be files."""
    match node:
        case MixNode():
            return {"rows": tuple(f for source in node.sources for f in source.files)}
        case SoftLabelNode():
            bucket = () if node.bucket is None else (node.bucket,)
            return {"model": (node.model,), "rows": node.data, "bucket": bucket}
        case RlNode() | SftNode() | EvaluateNode():
            return {"model": (node.model,), "rows": node.data}
        case DiagnoseNode():
            return {"evaluation": (node.evaluation, *([node.base] if node.base else []))}
        case SftSetNode():
            bucket = () if node.bucket == EVERY_TASK else (node.bucket,)
            return {"bucket": bucket, "rows": node.data}
        case HardSetNode():
            return {"evaluation": (node.evaluation,)}


def needs(pipeline: PipelineConfig, name: str) -> tuple[str, ...]:
    """Nodes whose outputs node `name` reads. Raises ConfigError when it names one that cannot serve."""
    found: list[str] = []
    for role, names in references(pipeline.nodes[name]).items():
        for wanted in names:
            other = pipeline.nodes.get(wanted)
            if other is None and (wanted == BASE_MODEL or role == "rows"):
                continue  # the base model, or a file
            allowed = {
                "model": MODEL_KINDS, "rows": ROW_KINDS, "evaluation": ("evaluate",), "bucket": ("diagnose",)
            }[role]  # fmt: skip
            if other is None or other.kind not in allowed:
                made = [n for n, o in pipeline.nodes.items() if o.kind in allowed]
                raise ConfigError(
                    f"pipeline.nodes.{name}: {wanted!r} is no {' or '.join(allowed)} node; there are "
                    f"{', '.join(made) or 'none'}"
                )
            found.append(wanted)
    return tuple(dict.fromkeys(found))


def node_order(pipeline: PipelineConfig) -> tuple[str, ...]:
    """Every node after all that it needs, else as the file has them. Raises ConfigError on a circle."""
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ConfigError(f"pipeline.nodes: {' -> '.join([*path, name])} is a circle; cut it")
        if name in done:
            return
        for other in needs(pipeline, name):
            visit(other, (*path, name))
        done[name] = None

    for name in pipeline.nodes:
        visit(name, ())
    return tuple(done)


def ancestors(pipeline: PipelineConfig, name: str) -> set[str]:
    """All nodes that `name` rests on, itself left out."""
    found: set[str] = set()
    pending = list(needs(pipeline, name))
    while pending:
        other = pending.pop()
        if other not in found:
            found.add(other)
            pending += needs(pipeline, other)
    return found


def stage_config(cfg: Config, name: str, **sections: Mapping[str, Any]) -> Config:
    """Node `name`'s configuration: the pipeline's, with the node's overrides, then `sections` on top.

    Without `sections` the rows of a training node stand in data.train or sft.train as the file names them.
    Raises ConfigError on an override that the schema does not know.
    """
    node = cfg.pipeline.nodes[name]
    values = cfg.model_dump(mode="json", exclude={"pipeline"})
    values = merge(values, nested(node.overrides))
    rows: dict[str, Any] = {}
    if isinstance(node, RlNode):
        rows = {"data": {"train": list(node.data)}, "run": {"job": "rl"}}
    elif isinstance(node, SftNode):
        rows = {"sft": {"train": list(node.data)}, "run": {"job": "sft"}}
        rows["algorithm"] = {"loss": {"type": "sft"}, "kl": {"coef": 0.0}, "entropy_coeff": 0.0}
        rows["algorithm"]["importance"] = {"level": "off"}
    else:
        rows = {"run": {"job": "rl"}}
    values = merge(values, rows)
    for section, changed in sections.items():
        values = merge(values, {section: changed})
    return config_from_dict(values, f"pipeline.nodes.{name}.overrides")


def nested(overrides: Mapping[str, object]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}; nested mappings stay."""
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        assert isinstance(value, dict)
        tree = merge(tree, value)
    return tree
