"""record.profile: what is traced, where the trace lies, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from redone.cluster.profile import RankProfiler, runtime_env, trace_path
from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import ConfigError, TrainerError


def config(device: str = "cpu", **profile: Any) -> Config:
    return config_from_dict(
        {
            "model": {"path": "m"},
            "data": {"train": [__file__]},
            "rewards": {"default": {"family": "exact"}},
            "cluster": {"device": device, "gpus_per_node": 2},
            "record": {"profile": profile},
            "evaluate": {"keep_best": False},
        }
    )


def test_a_torch_trace_holds_what_ran(tmp_path: Path) -> None:
    profiler = RankProfiler(config(tool="torch"))
    with pytest.raises(TrainerError, match="not running"):
        profiler.stop("x")
    profiler.start()
    with pytest.raises(TrainerError, match="already"):
        profiler.start()
    torch.ones(8, 8) @ torch.ones(8, 8)
    path = trace_path(str(tmp_path / "trainer-1.log"), 3)
    assert profiler.stop(path) == path == str(tmp_path / "trainer-1.step3.trace.json.gz")
    with gzip.open(path, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::matmul" in names


def test_nsys_wraps_the_chosen_ranks_and_needs_cuda() -> None:
    cfg = config("cuda", tool="nsys", ranks=[1])
    assert runtime_env(cfg, 0) == {} and runtime_env(config(tool="torch"), 0) == {}
    assert runtime_env(cfg, 1)["nsight"]["capture-range"] == "cudaProfilerApi"
    with pytest.raises(TrainerError, match=r"needs cluster\.device=cuda"):
        RankProfiler(config(tool="nsys")).start()


@pytest.mark.parametrize(
    ("profile", "message"),
    [({"tool": "nsys"}, "needs cluster.device=cuda"), ({"tool": "torch", "ranks": [2]}, "ranks 0 .. 1")],
)
def test_bad_profiles_are_refused(profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(config(**profile))
    assert message in str(refused.value)
    check_config(config(tool="torch", ranks=[0, 1]))
