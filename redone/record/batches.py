"""A step's batch as one .npz file: flat arrays and their lengths, no pickled objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from redone.errors import RunFolderError
from redone.types import Batch, RouteArray, TrainGroup, Trajectory

FORMAT = 1
FIELDS = ("token_ids", "loss_mask", "advantages", "engine_logprobs", "old_logprobs", "ref_logprobs", "routes")


def write_batch(path: Path, batch: Batch, parts: int) -> None:
    """Write `batch`, which was trained in `parts` optimizer updates per epoch."""
    trajectories = [t for g in batch.groups for t in g.trajectories]
    arrays: dict[str, Any] = {
        "lengths": np.asarray([len(t.token_ids) for t in trajectories], np.int64),
        "prompt_ids": _flat([g.prompt_ids for g in batch.groups]),
        "prompt_lengths": np.asarray([len(g.prompt_ids) for g in batch.groups], np.int64),
        "sizes": np.asarray([len(g.trajectories) for g in batch.groups], np.int64),
        "versions": np.asarray([t.version for t in trajectories], np.int64),
        "meta": np.asarray(
            json.dumps({"format": FORMAT, "parts": parts, "ids": [g.prompt_id for g in batch.groups]})
        ),
    }
    for field in FIELDS:
        values = [getattr(t, field) for t in trajectories]
        if values and values[0] is not None:
            arrays[field] = _flat(values)
    if batch.has_routes:
        arrays["prompt_routes"] = _flat(
            [g.prompt_routes for g in batch.groups if g.prompt_routes is not None]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def read_batch(path: Path) -> tuple[Batch, int]:
    """(batch, parts). Raises RunFolderError when the file is missing or of another format."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is no saved batch: {error}") from None
    meta = json.loads(str(arrays["meta"]))
    if meta["format"] != FORMAT:
        raise RunFolderError(f"{path} has format {meta['format']}, this version reads {FORMAT}")
    edges = np.cumsum(arrays["lengths"])[:-1]
    columns = {f: np.split(arrays[f], edges) if f in arrays else None for f in FIELDS}
    trajectories = [
        Trajectory(
            **{f: None if column is None else column[i] for f, column in columns.items()},
            version=int(version),
        )
        for i, version in enumerate(arrays["versions"])
    ]
    prompt_edges = np.cumsum(arrays["prompt_lengths"])[:-1]
    prompts = np.split(arrays["prompt_ids"], prompt_edges)
    routes: Sequence[RouteArray | None] = [None] * len(prompts)
    if "prompt_routes" in arrays:
        routes = np.split(arrays["prompt_routes"], prompt_edges)
    groups, at = [], 0
    for i, size in enumerate(arrays["sizes"]):
        members = tuple(trajectories[at : at + int(size)])
        groups.append(
            TrainGroup(
                prompt_id=meta["ids"][i], prompt_ids=prompts[i], trajectories=members, prompt_routes=routes[i]
            )
        )
        at += int(size)
    return Batch.of(groups), int(meta["parts"])


def _flat(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
