"""The configurations of real models: they load, their layouts are legal, the planner plans them, and the name
table covers the model exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redone.config.check import check_config
from redone.config.load import load_config
from redone.config.schema import Config
from redone.layout import ModelShape, check_layout
from redone.planner.models import planned
from redone.planner.report import Options, make_plan
from redone.trainer.megatron.names import hf_tensors, rules

ROOT = Path(__file__).parents[2] / "configs/models"
FILES = sorted(ROOT.glob("*/nodes-*.yaml"))
NODES = (1, 2, 4, 8, 16, 32)
# parameters; used for one token without and with the input embedding; tensors of the published index
COUNTS = {
    "qwen3_4b": (4_022_468_096, None, 398),
    "qwen3_8b": (8_190_735_360, None, 399),
    "qwen3_32b": (32_762_123_264, None, 707),
    "qwen3_30b_a3b": (30_532_122_624, (3.04e9, 3.35e9), 18_867),
}


def shape_of(model: str) -> ModelShape:
    return ModelShape.from_hf(json.loads((ROOT / model / "architecture/config.json").read_text()))


def test_every_model_has_every_size() -> None:
    assert {(f.parent.name, f.stem) for f in FILES} == {(m, f"nodes-{n:02d}") for m in COUNTS for n in NODES}


def load(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, int]:
    monkeypatch.chdir(ROOT.parents[1])
    return load_config(file), int(file.stem.removeprefix("nodes-"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_a_layout_is_legal(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, nodes = load(file, monkeypatch)
    assert cfg.cluster.world_size == 8 * nodes
    assert cfg.rollout.replicas * cfg.rollout.tensor_model_parallel_size == 8 * nodes
    assert check_layout(cfg.trainer.parallel, cfg.cluster.world_size, shape_of(file.parent.name)) == []
    if nodes == 1:
        check_config(cfg)


def plan_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one node only with the optimizer's states on the host."""
    cfg, nodes = load(file, monkeypatch)
    hf = json.loads((Path(cfg.model.path) / "config.json").read_text())
    options = Options(nodes=nodes, gpu="h100", trainer_sleeps=True, cpu_optimizer=nodes == 1)
    assert make_plan(cfg, hf, options).chosen.fits


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_flagship_fits(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_fits(ROOT / f"qwen3_30b_a3b/nodes-{nodes:02d}.yaml", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_layout_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_fits(file, monkeypatch)


@pytest.mark.parametrize("model", COUNTS)
def test_the_name_table_is_the_published_index(model: str) -> None:
    shape = shape_of(model)
    total, active, tensors = COUNTS[model]
    table = hf_tensors(shape)
    assert len(table) == len({name for name, _ in table}) == tensors
    assert sum(_size(s) for _, s in table) == total == planned(shape).total
    exported = [r for r in rules(shape) if not r.alias]
    assert sum(_size(s) for r in exported for s in r.hf_shapes) == total
    if active:
        counted = planned(shape)
        assert counted.active == pytest.approx(active[0], rel=2e-3)
        assert counted.active_with_embedding == pytest.approx(active[1], rel=2e-3)


def _size(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
