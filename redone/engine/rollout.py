"""The rollout engine that the pipeline sees: life, checks, text, rules of a weight update."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from transformers import AutoTokenizer

from redone.api import Awake
from redone.config.replay import replays_engine
from redone.config.schema import Config
from redone.engine.folder import ModelFolder, context_limit
from redone.engine.process import Children, ErrorLog
from redone.engine.update import UpdateState
from redone.errors import EngineDied, EngineError, SyncError
from redone.types import CanaryReading, Completion, FloatArray, Sampling, WeightBucket, WeightPlan
from redone.weights.plan import plan_to_json

# What a vendor raises for a model or a machine that it cannot serve; anything else is a bug.
START_FAILURES = (
    RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
PROBE_TOKENS = 4  # what the canary lets the engine write behind the probe prompt


class Core(Protocol):
    """A vendor's engine. `rpc` calls a method on every rank and returns one error text (or None) per rank.

    logger: root of the vendor's loggers. logging_variable: the environment variable that names the file its
    processes configure logging from.
    """

    logger: str
    logging_variable: str

    async def start(self, args: dict[str, Any]) -> None: ...

    async def generate(
        self, prompt: list[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]: ...

    async def score(self, sequence: list[int]) -> FloatArray: ...

    async def rpc(self, method: str, *args: Any) -> list[Any]: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def drop_caches(self) -> None: ...

    async def set_version(self, version: int) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self, tags: list[str] | None) -> None: ...

    async def ping(self) -> None:
        """See redone.api.Engine."""

    async def close(self) -> None: ...


class RolloutEngine:
    """redone.api.Engine. After begin_update it stays paused until resume(), which refuses mixed weights.

    Args:
        index: number of this replica; it appears in errors.
        core: the vendor's engine, not started.
        arguments: (config, context length in tokens) -> the vendor's arguments.
    """

    def __init__(
        self,
        cfg: Config,
        index: int,
        core: Core,
        arguments: Callable[[Config, int], dict[str, Any]],
    ) -> None:
        self.cfg, self.name = cfg, f"engine {index}"
        self._core, self._arguments = core, arguments
        self._cuda, self._shared = cfg.cluster.device == "cuda", cfg.shared_gpus
        self._routes = replays_engine(cfg)
        self._awake: Awake | None = None
        self._state: UpdateState | None = None
        self._children = Children()
        self._errors = ErrorLog(core.logger, "INFO" if cfg.run.log_level == "debug" else "WARNING")

    @property
    def _update(self) -> UpdateState:
        if self._state is None:
            raise EngineError(f"{self.name} is not running; call start")
        return self._state

    async def start(self) -> dict[str, Any]:
        """Load the model; returns {"pid", "max_model_len", "vocab_size", "seconds"}.

        Raises EngineError with the last lines of the cause when that fails; nothing stays behind then.
        """
        began = time.monotonic()
        self._folder = ModelFolder.read(self.cfg.model.path)
        self.limit = context_limit(self.cfg, self._folder)
        os.environ.setdefault(self._core.logging_variable, str(self._errors.config_path))
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.cfg.model.path, trust_remote_code=self.cfg.model.trust_remote_code
            )
            await self._core.start(self._arguments(self.cfg, self.limit))
        except START_FAILURES as error:
            cause = self._errors.cause() or f"{type(error).__name__}: {error}"
            await self.close()
            raise EngineError(
                f"{self.name} did not start with model.path={self.cfg.model.path}:\n{cause}"
            ) from error
        self._children.remember()
        await self._record_routes()
        self._state = UpdateState(self.name, self._folder)
        await self._core.set_version(0)
        self._awake = "all"
        return {
            "pid": os.getpid(),
            "max_model_len": self.limit,
            "vocab_size": self._folder.vocab_size,
            "seconds": time.monotonic() - began,
        }

    async def _record_routes(self) -> None:
        """On CUDA the vendor's engine does so by its own argument."""
        if self._routes and not self._cuda:
            refused = (await self._core.rpc("redone_record_routes"))[0]
            if refused is not None:
                await self.close()
                raise EngineError(
                    f"{self.name}: {refused}, so that the trainer cannot repeat the engine's expert choices;"
                    " set trainer.moe.routing_replay=trainer"
                )

    async def close(self) -> None:
        """End the engine and every process behind it; safe to call twice."""
        self._awake = self._state = None
        self._children.remember()
        await self._core.close()
        self._children.end()
        self._errors.close()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """One request per seed: a completion depends on weights, prompt, sampling and its seed only.

        Without sampling.stop_token_ids the model folder's own end tokens stop; with ignore_eos nothing does.
        Raises EngineError: asleep, poisoned, dead, prompt and max_tokens exceed the context length, or
        sampling.routes of an engine that records none.
        """
        self._update.check_usable()
        if self._awake != "all":
            raise EngineError(f"{self.name} is asleep; wake('all') before generate")
        prompt = [int(t) for t in prompt_ids]
        if not prompt or len(prompt) + sampling.max_tokens > self.limit:
            raise EngineError(
                f"{self.name}: a prompt of {len(prompt)} tokens and max_tokens={sampling.max_tokens} do not "
                f"fit the context of {self.limit} tokens; raise model.max_model_len or shorten "
                "data.max_prompt_length / data.max_response_length"
            )
        if sampling.routes and not self._routes:
            raise EngineError(f"{self.name} records no expert choices; set trainer.moe.routing_replay=engine")
        stops = sampling.stop_token_ids or self._folder.eos_token_ids
        sampling = dataclasses.replace(sampling, stop_token_ids=() if sampling.ignore_eos else stops)
        with self._explain_death():
            completions = await self._core.generate(prompt, sampling, seeds)
        return [dataclasses.replace(c, text=self._text(c)) for c in completions]

    def _text(self, completion: Completion) -> str:
        ids = completion.token_ids.tolist()
        shown = ids[:-1] if completion.finish == "stop" else ids
        return str(self._tokenizer.decode(shown, skip_special_tokens=True))

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[FloatArray]:
        """[len - 1] fp32 log-probabilities at temperature 1 of tokens 1.. of each sequence.

        Needs room for one token more than the longest sequence. Wakes the KV cache when only weights are.
        """
        await self._ready_to_score()
        for i, sequence in enumerate(sequences):
            if not 2 <= len(sequence) < self.limit:
                raise EngineError(
                    f"{self.name}: cannot score sequence {i} of {len(sequence)} tokens; it needs 2 to "
                    f"{self.limit - 1} (model.max_model_len - 1)"
                )
        with self._explain_death():
            return await asyncio.gather(*(self._core.score([int(t) for t in s]) for s in sequences))

    async def _ready_to_score(self) -> None:
        self._update.check_usable()
        if self._awake == "weights":
            await self.wake("all")
        if self._awake is None:
            raise EngineError(f"{self.name} is asleep; wake('weights') before score")

    async def canary(self, sequences: Sequence[Sequence[int]], probe: Sequence[int]) -> CanaryReading:
        """See redone.api: scores from scratch, then PROBE_TOKENS sampled tokens, prefix cache in use."""
        scores = await self.score(sequences)
        sampling = Sampling(max_tokens=PROBE_TOKENS, ignore_eos=True)
        with self._explain_death():
            (written,) = await self._core.generate([int(t) for t in probe], sampling, [0])
        return CanaryReading(
            scores=tuple(scores), probe_ids=written.token_ids, probe_logprobs=written.logprobs
        )

    async def streams(self, sequence: Sequence[int], cached: bool) -> dict[str, FloatArray]:
        """See redone.api."""
        await self._ready_to_score()
        ids = [int(t) for t in sequence]
        with self._explain_death():
            refused = await self._core.rpc("redone_watch")
            if cached:
                await self._core.generate(ids, Sampling(max_tokens=1, ignore_eos=True), [0])
            else:
                await self._core.score(ids)
            answer = (await self._core.rpc("redone_streams", ids))[0]  # every rank holds the whole stream
        if refused[0] is not None or isinstance(answer, str):
            raise EngineError(f"{self.name}: {refused[0] or answer}")
        points, length, data = answer
        values = np.frombuffer(data, np.float32).reshape(len(points), length, -1)
        return dict(zip(points, values, strict=True))

    async def ping(self) -> None:
        """See redone.api."""
        await self._core.ping()

    async def begin_update(self, plan: WeightPlan) -> None:
        """Pause (running requests are kept) and expect every bucket of `plan`. SyncError for another plan."""
        if self._awake is None:
            raise EngineError(f"{self.name} is asleep; wake('weights') before a weight update")
        self._update.begin(plan)
        with self._poison_on_failure():
            await self._core.pause()
            await self._rpc("redone_begin", plan_to_json(plan))

    async def load(self, bucket: WeightBucket) -> None:
        """Every rank verifies the digests of the bytes it maps and only then loads them."""
        with self._poison_on_failure():
            self._update.check_bucket(bucket)
            await self._rpc("redone_load", *self._update.assignment(bucket))
            self._update.arrived(bucket)

    async def commit(self, version: int) -> None:
        """Post-process weights, drop the KV cache (kept requests are recomputed), expose the version."""
        with self._poison_on_failure():
            self._update.check_complete()
            await self._rpc("redone_commit")
            await self._core.drop_caches()
            await self._core.set_version(version)
        self._update.committed(version)

    async def pause(self) -> None:
        """Freeze running requests; new ones queue."""
        await self._core.pause()

    async def resume(self) -> None:
        """Continue after pause or commit. EngineError in the middle of an update and on a poisoned engine."""
        self._update.check_usable()
        self._update.check_idle()
        # Without a KV cache nothing can run; wake("all") resumes.
        if not (self._shared and self._awake != "all"):
            await self._core.resume()

    async def sleep(self) -> None:
        """Keep requests, run nothing. On shared GPUs weights move to the host and the KV cache goes."""
        if self._awake is None:
            return
        await self._core.pause()
        if self._shared:
            await self._core.sleep()
        self._awake = None

    async def wake(self, what: Awake) -> None:
        """ "weights" is enough for an update; "all" continues generation."""
        if self._shared:
            await self._core.wake(["weights"] if what == "weights" else None)
        self._awake = what
        if what == "all":
            await self.resume()

    async def _rpc(self, method: str, *args: Any) -> None:
        """Raises SyncError with what the first rank that failed says."""
        with self._explain_death():
            answers = await self._core.rpc(method, *args)
        for rank, answer in enumerate(answers):
            if answer is not None:
                raise SyncError(f"{self.name}, rank {rank}: {answer}")

    @contextmanager
    def _explain_death(self) -> Iterator[None]:
        try:
            yield
        except EngineDied as error:
            raise EngineDied(f"{self.name} died:\n{self._errors.cause() or error}") from error

    @contextmanager
    def _poison_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._update.poison(str(error))
            raise
