"""Starts that fail, engines that die, tensor parallelism: each with its own AsyncLLM."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from redone.data.tiny import make_tiny_model
from redone.errors import EngineError
from redone.types import Sampling
from tests.engines.engine_process import EngineProcess
from tests.engines.harness import HeldWeights, LiveEngine, engine_config
from tests.engines.test_update import assert_engine_holds


def offspring(pid: int) -> list[psutil.Process]:
    """Engine processes below `pid` (Python's resource tracker is not one)."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if not any("resource_tracker" in part for part in p.cmdline())]


def test_failed_start_quotes_the_cause_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    process = EngineProcess(engine_config(folder, in_process=False))
    with pytest.raises(EngineError, match=rf"engine 0 did not start with model.path={folder}") as error:
        process.call("start")
    assert "See root cause above" not in str(error.value).splitlines()[1]
    assert "size" in str(error.value) or "shape" in str(error.value)
    assert offspring(process.pid) == []
    process.stop()


def test_dead_engine_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama")
    process = EngineProcess(engine_config(folder, in_process=False))
    process.call("start")
    children = offspring(process.pid)
    assert len(children) >= 2
    running = process.submit("generate", [5], Sampling(max_tokens=400, ignore_eos=True), [1])
    time.sleep(0.2)
    os.kill(max(children, key=lambda p: len(p.children())).pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="engine 0 died"):
        running.result(timeout=60)
    with pytest.raises(EngineError, match="died"):
        process.call("generate", [5], Sampling(max_tokens=4), [1])
    process.stop()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)


def test_tensor_parallel_update_is_exact(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    cfg = engine_config(folder, in_process=False, tensor_model_parallel_size=2)
    live = LiveEngine(cfg, folder, tmp_path)
    assert isinstance(live.held, HeldWeights)
    assert_engine_holds(live, live.held)
    new, buckets = live.next_weights()
    live.push(buckets, new)
    assert_engine_holds(live, new)
    live.process.stop()
    live.writer.close()
