"""Load a Hugging Face folder into this rank's module, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redone.errors import ModelError
from redone.layout import ModelShape, layer_ranges
from redone.trainer.megatron.names import Rule, local_name, rules, to_shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that some exporters store; they are derived from the config.
IGNORED = ("rotary_emb.inv_freq",)


def read_shape(folder: str | Path) -> ModelShape:
    """Shape of the model in `folder`. Raises ModelError when config.json cannot be used."""
    path = Path(folder) / "config.json"
    try:
        return ModelShape.from_hf(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ModelError(f"model.path={folder}: no config.json there; give a Hugging Face folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.path={folder}: config.json cannot be used: {error}") from error


class Weights:
    """Tensors of a folder by name; files stay open and memory-mapped while it is in use."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, str] = _locate(self.folder)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, on CPU. Raises ModelError when it is missing or has another shape."""
        file = self.files.get(name)
        if file is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.folder / file}: cannot read {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.folder}: tensor {name} has shape {tuple(tensor.shape)}; config.json implies {shape}"
            )
        return tensor


def _locate(folder: Path) -> dict[str, str]:
    """Tensor name -> file. Raises ModelError for a folder without weights."""
    try:
        if (folder / INDEX).is_file():
            return dict(json.loads((folder / INDEX).read_text())["weight_map"])
        if (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"model.path={folder}: the weights cannot be read: {error}") from error
    raise ModelError(
        f"model.path={folder}: no weights there (neither {SINGLE} nor {INDEX}); convert them to safetensors"
    )


def check_names(weights: Weights, shape: ModelShape) -> None:
    """Refuse missing tensors, and tensors that we would ignore though they change the model (biases)."""
    known = {name for rule in rules(shape) for name in rule.hf}
    missing = sorted(known - set(weights.files))
    if missing:
        raise ModelError(f"{weights.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    known.add("lm_head.weight")  # some exporters store the tied copy
    unknown = sorted(n for n in weights.files if n not in known and not n.endswith(IGNORED))
    if unknown:
        raise ModelError(
            f"{weights.folder}: {len(unknown)} tensors are not part of a {shape.family} model,"
            f" first {unknown[0]}"
        )


def _owned(rule: Rule, names: Container[str], layers: range, shape: ModelShape) -> bool:
    """Whether a chunk with these layers holds (a part of) the rule's tensor; `names` are its parameters."""
    if rule.layer is None:
        return rule.mcore in names
    if rule.layer not in layers:
        return False
    if rule.expert is None:
        return True
    first, count = expert_range(shape)
    return first <= rule.expert < first + count


def chunk_layers(shape: ModelShape) -> list[range]:
    """The layers of each chunk of this pipeline stage."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return layer_ranges(shape.num_layers, stages, chunks)[parallel_state.get_pipeline_model_parallel_rank()]


def expert_range(shape: ModelShape) -> tuple[int, int]:
    """(first expert, number of experts) of this rank."""
    count = shape.num_experts // parallel_state.get_expert_model_parallel_world_size()
    return parallel_state.get_expert_model_parallel_rank() * count, count


def tensor_group(rule: Rule) -> tuple[int, int]:
    """(size, rank) of the tensor-parallel group that shards this tensor."""
    if rule.expert is None:
        return (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


def local_parameters(modules: Sequence[torch.nn.Module], shape: ModelShape) -> dict[str, torch.nn.Parameter]:
    """Global Megatron name -> this rank's parameter, for every rule it owns, in export order."""
    first_expert = expert_range(shape)[0] if shape.num_experts else 0
    found: dict[str, torch.nn.Parameter] = {}
    for module, layers in zip(modules, chunk_layers(shape), strict=True):
        named = dict(module.named_parameters())
        names = set(named)
        for rule in rules(shape):
            if _owned(rule, names, layers, shape):
                found[rule.mcore] = named.pop(local_name(rule, layers.start, first_expert))
        if named:
            raise ModelError(f"the name table does not cover {sorted(named)[0]}")
    return {rule.mcore: found[rule.mcore] for rule in rules(shape) if rule.mcore in found}


@torch.no_grad()
def load_weights(modules: Sequence[torch.nn.Module], shape: ModelShape, folder: str | Path) -> None:
    """Fill every parameter of this rank. Raises ModelError naming the tensor that is missing or misshapen."""
    parameters = local_parameters(modules, shape)
    with Weights(folder) as weights:
        check_names(weights, shape)
        for rule in rules(shape):
            if rule.mcore not in parameters:
                continue
            tensors = [weights.get(n, s) for n, s in zip(rule.hf, rule.hf_shapes, strict=True)]
            size, rank = tensor_group(rule)
            parameters[rule.mcore].copy_(to_shard(rule, shape, tensors, size, rank))
