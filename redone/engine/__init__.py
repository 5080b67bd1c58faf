"""Rollout engines behind redone.api.Engine: one file per engine.

Nothing here imports an engine: the driver asks for the environment of a process that does not exist yet.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from redone.config.replay import replays_engine
from redone.config.schema import Config, VllmEngine
from redone.errors import EngineError

if TYPE_CHECKING:
    from redone.api import Engine


def engine_env(cfg: Config) -> dict[str, str]:
    """Environment variables that an engine process needs before torch is imported."""
    engine, cpu = cfg.rollout.engine, cfg.cluster.device == "cpu"
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if isinstance(engine, VllmEngine):
        env |= {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO" if cfg.run.log_level == "debug" else "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if engine.in_process else "1",
            # A forked child would inherit this process's threads and event loop in an unknown state.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if not cpu and replays_engine(cfg):
            env["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the only one that returns expert choices
    else:
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1" if cpu else "0",
            # The context has a few tokens more than the model's, which no request uses.
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        }
        ranks = cfg.rollout.tensor_model_parallel_size
        if cpu and ranks > 1:  # else it refuses more ranks than there are NUMA nodes
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([f"0-{(os.cpu_count() or 1) - 1}"] * ranks)
    if cpu:
        env |= {
            # vLLM compiles small helpers with a C++ compiler on first use even in eager mode (30 s).
            "TORCH_COMPILE_DISABLE": "1",
            # Binding would pin every engine on the machine to the same first cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(engine.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return env


def build_engine(cfg: Config, index: int) -> Engine:
    """The engine that cfg.rollout.engine names, not started.

    Args:
        index: number of this replica; it appears in errors.

    Raises:
        EngineError: this interpreter lacks the engine.
    """
    # Engines read their variables while they are imported; what the process was started with wins.
    for key, value in engine_env(cfg).items():
        os.environ.setdefault(key, value)
    name = cfg.rollout.engine.type
    try:
        match name:
            case "vllm":
                from redone.engine.vllm import make_engine
            case "sglang":
                from redone.engine.sglang import make_engine
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise EngineError(
            f"rollout.engine.type={name}, but {sys.executable} has no {name}; name the interpreter of an "
            "environment that has it in rollout.engine.python"
        ) from None
    return make_engine(cfg, index)
