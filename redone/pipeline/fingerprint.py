"""Which values and files decide what a node makes, beside the outputs of the nodes that it names."""

from __future__ import annotations

from typing import Any

from redone.config.nodes import references
from redone.config.pipeline import Node, SftSetNode
from redone.config.schema import Config, CustomReward
from redone.pipeline.digests import Digests, of_value

# Raise a number when the code of that kind starts to make something else from the same inputs.
VERSIONS = {
    "mix": 1, "rl": 1, "sft": 1, "evaluate": 1, "diagnose": 1, "sft_set": 1, "soft_labels": 1, "hard_set": 1,
}  # fmt: skip

# kind -> sections of its configuration that it reads
SECTIONS: dict[str, tuple[str, ...]] = {
    "mix": ("data",),
    "rl": ("model", "data", "rewards", "algorithm", "rollout", "trainer", "evaluate"),
    "sft": ("model", "data", "sft", "trainer", "evaluate"),
    "evaluate": ("model", "data", "rewards", "evaluate"),
    "diagnose": ("rewards",),
    "sft_set": ("data",),
    "soft_labels": ("model", "data", "rewards"),
    "hard_set": ("data",),
}
# What stands for files (their content counts), and what changes no result.
NOT_VALUES: dict[str, tuple[str, ...]] = {
    "model": ("path", "max_model_len"),
    "data": ("train", "val", "test"),
    "sft": ("train", "val"),
    "trainer": ("timeout_s", "num_threads"),
}


def content_of(name: str, node: Node, cfg: Config, whole: Config, digests: Digests) -> dict[str, str]:
    """key -> digest: the node itself, the sections it reads, files that these name, the code's version."""
    found = {
        "version": str(VERSIONS[node.kind]),
        "seed": str(cfg.run.seed),
        "node": of_value(_own(node)),
    }
    for section in SECTIONS[node.kind]:
        value = getattr(cfg, section)
        plain = (
            {k: v.model_dump(mode="json") for k, v in value.items()}
            if isinstance(value, dict)
            else value.model_dump(mode="json")
        )
        for key in NOT_VALUES.get(section, ()):
            plain.pop(key, None)
        found[section] = of_value(plain)
    for file in files_of(node, cfg, whole):
        found[f"file:{file}"] = digests.of(file)
    return {k if not k.startswith("file:") else f"file[{i}]": v for i, (k, v) in enumerate(found.items())}


def files_of(node: Node, cfg: Config, whole: Config) -> list[str]:
    """Files that the node reads because its configuration names them, not as its rows."""
    files: list[str] = []
    if node.kind in ("rl", "evaluate", "soft_labels", "diagnose"):
        files += [r.path for r in cfg.rewards.values() if isinstance(r, CustomReward)]
    if node.kind in ("rl", "sft", "evaluate", "soft_labels") and cfg.model.chat_template:
        files.append(cfg.model.chat_template)
    if node.kind == "rl":
        files += [*cfg.data.val, *cfg.data.test]
    if node.kind == "sft":
        files += cfg.sft.val
    if isinstance(node, SftSetNode):
        files += evaluation_files(node, whole)
    return list(dict.fromkeys(files))


def evaluation_files(node: SftSetNode, whole: Config) -> list[str]:
    """Every file that a result is measured on: no training row may overlap it."""
    pipeline = whole.pipeline
    found = [*whole.data.val, *whole.data.test, *node.decontaminate.files]
    for name in (*pipeline.table.values(), *pipeline.ablation.values()):
        found += [f for f in references(pipeline.nodes[name])["rows"] if f not in pipeline.nodes]
    return list(dict.fromkeys(found))


def _own(node: Node) -> dict[str, Any]:
    """The node's own keys; which nodes and files it names counts by content, its overrides by section."""
    plain = node.model_dump(
        mode="json", exclude={"overrides", "model", "data", "bucket", "evaluation", "base"}
    )
    if "sources" in plain:
        plain["sources"] = [
            {k: (len(v) if k == "files" else v) for k, v in s.items()} for s in plain["sources"]
        ]
    return plain
