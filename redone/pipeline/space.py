"""Whether the disk can hold what a run will write: better said before the first step than after the last."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from redone.config.schema import Config
from redone.errors import RunFolderError

ADAM_BYTES = 8  # two fp32 moments per parameter
ITEMSIZE = {"float32": 4, "bfloat16": 2}


def check_space(cfg: Config) -> None:
    """Raises RunFolderError when one checkpoint and the export would not fit beside run.dir's other files.

    File systems with quotas may refuse earlier than they say.
    """
    need, free = space_needed(cfg), free_bytes(Path(cfg.run.dir))
    if free < need:
        raise RunFolderError(
            f"run.dir={cfg.run.dir}: the run will write at least {need / 1e6:,.0f} MB (a checkpoint with its "
            f"optimizer state, the export), {free / 1e6:,.0f} MB are free; free some, or use another run.dir"
        )


def free_bytes(path: Path) -> int:
    """Of the file system that holds `path`, or will."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def space_needed(cfg: Config) -> int:
    """Bytes of one checkpoint (weights, fp32 copy of 16-bit ones, AdamW's moments) and of the export."""
    parameters, itemsize = parameter_count(Path(cfg.model.path)), ITEMSIZE[cfg.model.dtype]
    state = itemsize + (4 if itemsize == 2 else 0) + ADAM_BYTES
    saves = cfg.checkpoint.at_end or cfg.checkpoint.every > 0
    return parameters * (state * saves + itemsize * cfg.checkpoint.export_hf)


def parameter_count(model: Path) -> int:
    """Of the safetensors files in `model`, by their headers; 0 when it has none that can be read."""
    count = 0
    for file in model.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as tensors:
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):  # loading it will say what is wrong
            continue
    return count
