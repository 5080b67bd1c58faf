"""SGLang as a rollout engine: its Engine in this process, one scheduler process per tensor-parallel rank.

In every scheduler process two things are replaced, through SGLang's own registries: the sampler (a seed per
request, log-probabilities of the distribution that was sampled from), and the Scheduler by a subclass whose
methods load weights from the shared-memory channel. SGLang's own update ends the process on a bad tensor.

A scheduler that dies takes this process with it (SGLang sends it SIGQUIT): the fleet sees a dead actor.

The CUDA branch (memory saver, CUDA graphs, kernels) follows SGLang 0.5.23's source; it never ran on a GPU.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
    EndWeightUpdateReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightVersionReqInput,
)
from sglang.srt.managers.scheduler import Scheduler, run_scheduler_process
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from redone.config.schema import Config
from redone.engine.draws import draw, restricted
from redone.engine.receiver import Receiver, named_tensors
from redone.engine.rollout import RolloutEngine
from redone.engine.sglang_format import (
    SAMPLER,
    completion_of,
    request_parameters,
    score_parameters,
    scores_of,
    sglang_arguments,
)
from redone.errors import EngineError, SyncError
from redone.types import Completion, FloatArray, Sampling, TensorMeta, WeightBucket
from redone.weights.digest import Channel

TAGS = (GPU_MEMORY_TYPE_WEIGHTS, GPU_MEMORY_TYPE_KV_CACHE)
# Its layers return partial sums and keep the rest in the batch, so hooks do not see the residual stream.
NO_STREAMS = "the layers of SGLang's models cannot be watched; compare them with an engine of type vllm"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
NEW_BATCH = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"


class SeededSampler(Sampler):
    """A token depends on its distribution, its request's seed and its position, not on its batch.

    SGLang knows seeds only in its deterministic mode, and returns log-probabilities from before top-p.
    """

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
        *,
        logprob_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n] int32 tokens of [n, vocabulary] logits; writes log-probabilities into logits_output."""
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info).float()
        logprobs = torch.log_softmax(logits / sampling_info.temperatures, -1)
        top_ks, top_ps = sampling_info.top_ks, sampling_info.top_ps
        greedy = top_ks <= 1
        best = logprobs.argmax(-1)
        if sampling_info.is_all_greedy:
            tokens = best
        else:
            if sampling_info.need_top_p_sampling or sampling_info.need_top_k_sampling:
                cut = (top_ps < 1) | (top_ks < logprobs.shape[-1])
                narrowed = restricted(logprobs, top_ks, top_ps)
                logprobs = torch.where((cut & ~greedy)[:, None], narrowed, logprobs)
            if sampling_info.sampling_seed is None:
                raise RuntimeError(f"no seeds in a batch: SGLang did not apply our hook on {NEW_BATCH}")
            drawn = draw(logprobs, sampling_info.sampling_seed, positions)
            tokens = torch.where(greedy, best, drawn)
        if return_logprob:
            result = self.output_logprob_processor.compute_logprobs(
                logprobs, top_logprobs_nums, token_ids_logprobs, tokens
            )
            result.write_output_to(logits_output)
        tokens = tokens.to(torch.int32)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def with_seeds(info: SamplingBatchInfo, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After SamplingBatchInfo.from_schedule_batch: fill in the seeds that it drops."""
    seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device)


class RankScheduler(Scheduler):
    """SGLang's scheduler of one rank, with the rank's end of a weight update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Else the end tokens of the model folder stop besides those that the caller has named.
        self.model_config.hf_eos_token_id = set()

    def get_model(self) -> torch.nn.Module:
        return self.tp_worker.model_runner.model

    def redone_call(self, name: str, arguments: str, answers: str) -> None:
        """Run method `name` on every rank (SGLang broadcasts); rank 0 writes what they returned into a file.

        SGLang's own answer has room for one error text only.
        """
        mine = getattr(self, name)(*json.loads(arguments))
        everyone: list[Any] = [None] * torch.distributed.get_world_size(self.tp_cpu_group)
        torch.distributed.all_gather_object(everyone, mine, group=self.tp_cpu_group)
        if torch.distributed.get_rank(self.tp_cpu_group) == 0:
            Path(answers).write_bytes(pickle.dumps(everyone))

    def redone_here(self) -> None:
        """An answer is all that is asked for."""

    def redone_begin(self, plan_json: str) -> str | None:
        self._redone_receiver: Receiver | None = Receiver(plan_json)
        return None

    def redone_load(
        self, version: int, index: int, location: str, digests: list[int], names: list[str]
    ) -> str | None:
        """Verify what this rank maps, then load the tensors `names`."""
        assert self._redone_receiver is not None
        bucket = WeightBucket(version=version, index=index, location=location, digests=tuple(digests))
        return self._redone_receiver.load(bucket, set(names), self._redone_install)

    def _redone_install(self, reader: Channel, tensors: Sequence[TensorMeta]) -> None:
        self.get_model().load_weights(named_tensors(reader, tensors))

    def redone_commit(self) -> str | None:
        self._redone_receiver = None
        return None


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """Target of a scheduler process."""
    HookRegistry.register(SCHEDULER, RankScheduler, HookType.REPLACE)
    HookRegistry.register(NEW_BATCH, with_seeds, HookType.AFTER)
    HookRegistry.apply_hooks()
    run_scheduler_process(*args, **kwargs)


# The scheduler processes import this module too, to find run_scheduler.
register_sampler_backend(SAMPLER, SeededSampler)


class RankedEngine(Engine):
    run_scheduler_process_func = staticmethod(run_scheduler)


def _stay(signum: int, frame: Any) -> None:
    """While starting: a child that fails signals us, and its failure reaches us by its pipe too."""


class SglangCore:
    """redone.engine.rollout.Core over SGLang's Engine."""

    logger, logging_variable = "sglang", "SGLANG_LOGGING_CONFIG_PATH"

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._engine: RankedEngine | None = None
        self._dir = Path(tempfile.mkdtemp(prefix="redone-sglang-"))
        self._one_call = asyncio.Lock()  # SGLang's RPC socket carries one call at a time
        self._updating = False
        self._away: set[str] = set()  # memory tags that sleep

    @property
    def engine(self) -> RankedEngine:
        if self._engine is None:
            raise EngineError("the engine is not running; call start")
        return self._engine

    @property
    def manager(self) -> Any:
        return self.engine.tokenizer_manager

    async def start(self, args: dict[str, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            args = args | dict(custom_sigquit_handler=_stay)
            signal.signal(signal.SIGQUIT, _stay)
        self._engine = RankedEngine(**args)

    async def generate(self, prompt: list[int], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """One request per seed; completions without text."""
        limits = sampling.lengths or (sampling.max_tokens,) * len(seeds)
        pairs = list(zip(seeds, limits, strict=True))
        outputs = await asyncio.gather(
            *(self._request(prompt, request_parameters(sampling, limit, seed), -1) for seed, limit in pairs)
        )
        return [completion_of(output, limit) for output, (_, limit) in zip(outputs, pairs, strict=True)]

    async def score(self, sequence: list[int]) -> FloatArray:
        """[len - 1] fp32; SGLang reads no prefix from its cache where it must return log-probabilities."""
        return scores_of(await self._request(sequence, score_parameters(), 0), sequence)

    async def _request(self, ids: list[int], parameters: dict[str, Any], logprobs_from: int) -> Any:
        """logprobs_from: first prompt token with a log-probability; -1: none of the prompt."""
        key = f"r{next(self._ids):012d}"  # one length: SGLang aborts whatever begins with an id
        try:
            return await self.engine.async_generate(
                input_ids=ids, sampling_params=parameters, return_logprob=True,
                logprob_start_len=logprobs_from, rid=key,
            )  # fmt: skip
        except asyncio.CancelledError:
            self.manager.abort_request(rid=key)
            raise
        except ValueError as error:
            raise EngineError(f"SGLang refused a request: {error}") from error

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """One answer per rank, or SGLang's own refusal."""
        if method in ("redone_watch", "redone_streams"):
            return [NO_STREAMS]
        if method == "redone_begin":
            refused = await self._begin()
        elif method == "redone_commit":
            refused = await self._end()
        else:
            refused = None
        return [refused] if refused else await self._call(method, *args)

    async def _begin(self) -> str | None:
        if self._updating:  # the last update failed; SGLang must leave it before the next
            await self._end()
        done, message = await self.manager.begin_weight_update(BeginWeightUpdateReqInput())
        self._updating = done
        return None if done else str(message)

    async def _end(self) -> str | None:
        done, message = await self.manager.end_weight_update(EndWeightUpdateReqInput())
        self._updating = False
        return None if done else str(message)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        answers = self._dir / "answers"
        async with self._one_call:
            try:
                await asyncio.to_thread(
                    self.engine.collective_rpc, "redone_call",
                    name=method, arguments=json.dumps(args), answers=str(answers),
                )  # fmt: skip
            except AssertionError as error:  # what SGLang raises for a method that failed
                raise SyncError(f"{method} failed: {error}") from error
            found: list[Any] = pickle.loads(answers.read_bytes())
            return found

    async def pause(self) -> None:
        await self.manager.pause_generation(PauseGenerationReqInput(mode="retract"))

    async def resume(self) -> None:
        await self.manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    async def drop_caches(self) -> None:
        result = await self.manager.flush_cache()
        if not result.success:
            raise SyncError("SGLang did not drop its prefix cache: requests still hold a part of it")

    async def set_version(self, version: int) -> None:
        request = UpdateWeightVersionReqInput(new_version=str(version), abort_all_requests=False)
        await self.manager.update_weight_version(request)

    async def sleep(self) -> None:
        tags = [tag for tag in TAGS if tag not in self._away]
        if tags:
            await self.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags))
            self._away.update(tags)

    async def wake(self, tags: list[str] | None) -> None:
        wanted = [tag for tag in TAGS if tag in self._away and (tags is None or tag in tags)]
        if wanted:
            await self.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=wanted))
            self._away.difference_update(wanted)

    async def ping(self) -> None:
        """Every rank's scheduler answers between two steps of its loop."""
        await self._call("redone_here")

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
        shutil.rmtree(self._dir, ignore_errors=True)


def make_engine(cfg: Config, index: int) -> RolloutEngine:
    return RolloutEngine(cfg, index, SglangCore(), sglang_arguments)
