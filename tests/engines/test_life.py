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
from tests.engines.harness import LiveEngine, engine_config
from tests.engines.test_update import assert_engine_holds


def offspring(pid: int) -> list[psutil.Process]:
    """Engine processes below `pid` (Python's resource tracker is not one)."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if not any("resource_tracker" in part for part in p.cmdline())]


@pytest.mark.slow
def test_failed_start_quotes_the_cause_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with EngineProcess(engine_config(folder, in_process=False)) as process:
        with pytest.raises(EngineError, match=rf"engine 0 did not start with model.path={folder}") as error:
            process.call("start")
        first_line = str(error.value).splitlines()[1]
        assert "256" in first_line and "root cause" not in str(error.value)
        assert offspring(process.pid) == []


def test_dead_engine_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "llama")
    with EngineProcess(engine_config(folder, in_process=False)) as process:
        process.call("start")
        children = offspring(process.pid)
        core = next(p for p in children if p.children())
        running = process.submit("generate", [5], Sampling(max_tokens=400, ignore_eos=True), [1])
        time.sleep(0.2)
        os.kill(core.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="engine 0 died"):
            running.result(timeout=60)
        with pytest.raises(EngineError, match="engine 0 died"):
            process.call("generate", [5], Sampling(max_tokens=4), [1])
    _, left = psutil.wait_procs(children, timeout=1)
    assert left == []


@pytest.mark.slow
def test_tensor_parallel_update_is_exact(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    live = LiveEngine(engine_config(folder, in_process=False, tensor_model_parallel_size=2), folder, tmp_path)
    with live.process:
        assert_engine_holds(live, live.held)
        new, buckets = live.next_weights()
        live.push(buckets, new)
        assert_engine_holds(live, new)
    live.writer.close()
