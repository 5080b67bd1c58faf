"""vLLM as a rollout engine, in two modes that differ only in where the engine's loop runs.

AsyncLLM (the default): vLLM's EngineCore and one worker per tensor-parallel rank are processes of their own.
In process (`rollout.engine.in_process`): the loop runs in a thread of this process; starts fastest.

Weights arrive through vLLM's native weight transfer with a backend of our own, `redone_shm`, which reads our
channel: every rank sees the whole weight space and its parameters' loaders take their shards.

The CUDA branch (device memory, sleep mode, kernels) follows vLLM's documentation; it was never run on a GPU.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import AsyncEngineArgs, EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.llm_engine import LLMEngine

from redone.config.replay import replays_engine
from redone.config.schema import Config, VllmEngine
from redone.engine.capture import CaptureExtension
from redone.engine.loop import LoopThread
from redone.engine.quantized import quantized_arguments
from redone.engine.receiver import Receiver, named_tensors
from redone.engine.rollout import START_FAILURES, RolloutEngine
from redone.engine.routes import MARK, RouteExtension, add_routes, unpack
from redone.errors import EngineDied, EngineError
from redone.types import Completion, Finish, FloatArray, Sampling, TensorMeta, VersionSpan, WeightBucket
from redone.weights.digest import Channel
from redone.weights.units import unit_of

BACKEND = "redone_shm"
CPU_KV_CACHE_MB, CPU_BLOCK_SIZE, CPU_BATCHED_TOKENS = 512, 32, 4096
SEED_MASK = 2**63 - 1  # vLLM reads -1 as "no seed", and torch generators take signed 64-bit integers
REQUEST_IDS = (f"r{n}" for n in itertools.count())
Requests = Sequence[tuple[str, SamplingParams]]  # each with its id
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """The channel needs no rendezvous."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One bucket's tensors within the mapped file."""

    reader: Channel
    tensors: Sequence[TensorMeta] = ()


class ShmTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """start -> receive (once per bucket) -> finish; abort instead of finish after a failure."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        self.loaded: set[str] = set()  # units
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        self.loaded |= {unit_of(t.name) for t in update_info.tensors}
        self.model.load_weights(named_tensors(update_info.reader, update_info.tensors))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_cpu_packing(self.model, self.loaded)

    def abort(self) -> None:
        """Give half-loaded layers their old tensors back.

        Left as they are, they would mix the tensors they hold with the first ones of the next update and drop
        its rest as excess.
        """
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


def refresh_cpu_packing(model: torch.nn.Module, loaded: Set[str]) -> None:
    """Pack the experts' and the language-model head's weights for the CPU kernels again.

    vLLM 0.32 stores reloaded experts unpacked and computes with them as if they were packed (wrong by about
    1 nat), and keeps the packed head of a model with tied embeddings as it was; both without an error.
    Only units of `loaded` were unpacked by the reload.
    """
    if not current_platform.is_cpu():
        return
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            # With tied embeddings no tensor of that name arrives: its packed copy would keep the old weights.
            module.quant_method.process_weights_after_loading(module)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight") and unit_of(name) in loaded:
            kernel.fused_experts.process_weights_after_loading(module)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ShmTransferEngine)


class WorkerExtension(CaptureExtension, RouteExtension):
    """Methods that vLLM mixes into its worker class, in every worker process.

    They take plain values and return error texts, because exceptions lose their type between processes.
    """

    weight_transfer_engine: ShmTransferEngine
    vllm_config: Any

    def redone_begin(self, plan_json: str) -> str | None:
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.abort()
        self._weight_update_active = False
        self._redone_receiver: Receiver | None = Receiver(plan_json)
        self.start_weight_update()  # type: ignore[attr-defined]
        return None

    def redone_load(
        self, version: int, index: int, location: str, digests: list[int], names: list[str]
    ) -> str | None:
        """Verify what this rank maps, then load the tensors `names`."""
        assert self._redone_receiver is not None
        bucket = WeightBucket(version=version, index=index, location=location, digests=tuple(digests))
        return self._redone_receiver.load(bucket, set(names), self._redone_install)

    def _redone_install(self, reader: Channel, tensors: Sequence[TensorMeta]) -> None:
        self.update_weights({"reader": reader, "tensors": tensors})  # type: ignore[attr-defined]

    def redone_commit(self) -> str | None:
        try:
            self.finish_weight_update()  # type: ignore[attr-defined]
        except START_FAILURES as error:
            return f"{type(error).__name__}: {error}"
        self._redone_receiver = None
        return None


class VllmCore(ABC):
    """Requests and results of both modes."""

    logger, logging_variable = "vllm", "VLLM_LOGGING_CONFIG_PATH"

    @abstractmethod
    async def _run(self, prompt: list[int], requests: Requests) -> list[RequestOutput]: ...

    @abstractmethod
    async def rpc(self, method: str, *args: Any) -> list[Any]: ...

    async def ping(self) -> None:
        await self.rpc("check_health")  # vLLM's own, on every rank

    async def generate(self, prompt: list[int], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """One request per seed; completions without text."""
        limits = sampling.lengths or (sampling.max_tokens,) * len(seeds)
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=limit,
                stop_token_ids=list(sampling.stop_token_ids),
                # Else vLLM adds end tokens of generation_config.json; the caller has named them all.
                ignore_eos=True,
                seed=int(seed) & SEED_MASK,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={MARK: True} if sampling.routes else None,
                routed_experts_prompt_start=len(prompt) if sampling.routes and i else 0,
            )
            for i, (seed, limit) in enumerate(zip(seeds, limits, strict=True))
        ]
        ids = [next(REQUEST_IDS) for _ in params]
        running = self._guarded(prompt, list(zip(ids, params, strict=True)))
        if not sampling.routes:
            return [_completion(output) for output in await running]
        try:
            outputs = await running
            routes = [output.outputs[0].routed_experts for output in outputs]
            if current_platform.is_cpu():
                lengths = [len(output.outputs[0].token_ids) for output in outputs]
                routes = unpack((await self.rpc("redone_take_routes", ids, len(prompt), lengths))[0])
        except BaseException:
            with suppress(EngineError):
                await self.rpc("redone_forget_routes", ids)
            raise
        return add_routes([_completion(output) for output in outputs], routes, len(prompt))

    async def score(self, sequence: list[int]) -> FloatArray:
        """[len - 1] fp32; computed from the whole sequence, whatever the prefix cache holds."""
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=True,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        (output,) = await self._guarded(sequence, [(next(REQUEST_IDS), params)])
        assert output.prompt_logprobs is not None
        # The first position has no log-probability: its row is None.
        rows = zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
        return np.asarray([row[t].logprob for t, row in rows if row is not None], np.float32)

    async def _guarded(self, prompt: list[int], requests: Requests) -> list[RequestOutput]:
        try:
            return await self._run(prompt, requests)
        except (VLLMClientError, ValueError) as error:
            raise EngineError(f"vLLM refused a request: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDied(str(error)) from error


def _completion(output: RequestOutput) -> Completion:
    choice = output.outputs[0]
    assert choice.logprobs is not None
    ids = list(choice.token_ids)
    logprobs = [at[t].logprob for at, t in zip(choice.logprobs, ids, strict=True)]
    spans = choice.weight_versions or ()
    return Completion(
        token_ids=np.asarray(ids, np.int32),
        text="",
        logprobs=np.asarray(logprobs, np.float32),
        finish=_FINISH[choice.finish_reason or "abort"],
        versions=tuple(VersionSpan(version=int(s.version), start=s.start, end=s.end) for s in spans),
    )


class AsyncCore(VllmCore):
    """AsyncLLM."""

    def __init__(self) -> None:
        self._llm: AsyncLLM | None = None

    @property
    def llm(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineError("the engine is not running; call start")
        return self._llm

    async def start(self, args: dict[str, Any]) -> None:
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args, distributed_executor_backend="mp"))

    async def _run(self, prompt: list[int], requests: Requests) -> list[RequestOutput]:
        return await asyncio.gather(*(self._one(prompt, *request) for request in requests))

    async def _one(self, prompt: list[int], name: str, params: SamplingParams) -> RequestOutput:
        last = None
        async for output in self.llm.generate(tokens_input(prompt), params, name):
            last = output
        assert last is not None
        return last

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        try:
            return await self.llm.collective_rpc(method, args=args)
        except EngineDeadError as error:
            raise EngineDied(str(error)) from error

    async def pause(self) -> None:
        await self.llm.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        await self.llm.resume_generation()

    async def drop_caches(self) -> None:
        await self.llm.reset_prefix_cache(reset_running_requests=True)

    async def set_version(self, version: int) -> None:
        await self.llm.update_weight_version(str(version))

    async def sleep(self) -> None:
        await self.llm.sleep(level=1, mode="keep")

    async def wake(self, tags: list[str] | None) -> None:
        await self.llm.wake_up(tags)

    async def close(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


class InProcessCore(VllmCore):
    """LLMEngine, stepped by a LoopThread."""

    def __init__(self) -> None:
        self._loop = LoopThread()

    async def start(self, args: dict[str, Any]) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise EngineError(
                "rollout.engine.in_process needs the environment of engine_env() from process start"
            )
        await self._loop.start(lambda: LLMEngine.from_engine_args(EngineArgs(**args)))

    async def _run(self, prompt: list[int], requests: Requests) -> list[RequestOutput]:
        return await self._loop.run([(name, tokens_input(prompt), params) for name, params in requests])

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        return await self._loop.call("collective_rpc", method, args=args)

    async def pause(self) -> None:
        await self._loop.set_paused(True)

    async def resume(self) -> None:
        await self._loop.set_paused(False)

    async def drop_caches(self) -> None:
        await self._loop.call("reset_prefix_cache", reset_running_requests=True)

    async def set_version(self, version: int) -> None:
        await self._loop.call("set_weight_version", str(version))

    async def sleep(self) -> None:
        await self._loop.call("sleep", level=1, mode="keep")

    async def wake(self, tags: list[str] | None) -> None:
        await self._loop.call("wake_up", tags)

    async def close(self) -> None:
        engine = self._loop.close()
        if engine is not None:
            engine.engine_core.shutdown()


def engine_arguments(cfg: Config, limit: int) -> dict[str, Any]:
    """vLLM's EngineArgs for a context of `limit` tokens. EngineError when this vLLM lacks the device."""
    engine, cuda = cfg.rollout.engine, cfg.cluster.device == "cuda"
    assert isinstance(engine, VllmEngine)
    if cuda == current_platform.is_cpu():
        raise EngineError(
            f"cluster.device={cfg.cluster.device}, but the installed vLLM runs on "
            f"{current_platform.device_type}; install its build for {cfg.cluster.device} or change the key"
        )
    args: dict[str, Any] = dict(
        model=cfg.model.path,
        trust_remote_code=cfg.model.trust_remote_code,
        dtype=cfg.model.dtype,
        skip_tokenizer_init=True,
        seed=cfg.run.seed,
        max_model_len=limit,
        max_num_seqs=engine.max_num_seqs,
        tensor_parallel_size=cfg.rollout.tensor_model_parallel_size,
        enforce_eager=engine.enforce_eager,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        **quantized_arguments(cfg),
    )
    if engine.block_size is not None or not cuda:
        args["block_size"] = engine.block_size or CPU_BLOCK_SIZE
    if cuda:
        args["enable_return_routed_experts"] = replays_engine(cfg)
        return args | dict(
            gpu_memory_utilization=cfg.rollout.gpu_memory_utilization, enable_sleep_mode=cfg.shared_gpus
        )
    return args | dict(
        kv_cache_memory_bytes=(engine.kv_cache_mb or CPU_KV_CACHE_MB) << 20,
        # A partial prefill makes vLLM rewind the request's random generator, which CPU generators cannot.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(CPU_BATCHED_TOKENS, limit, engine.max_num_seqs),
    )


def make_engine(cfg: Config, index: int) -> RolloutEngine:
    assert isinstance(cfg.rollout.engine, VllmEngine)
    core = InProcessCore() if cfg.rollout.engine.in_process else AsyncCore()
    return RolloutEngine(cfg, index, core, engine_arguments)
