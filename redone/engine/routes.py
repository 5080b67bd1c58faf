"""The experts that an engine's tokens were sent to, for training under the same choices (replay R3).

vLLM returns them itself on CUDA; its CPU build cannot. There a worker keeps the choices of every KV slot, as
long as the slot holds the keys and values of the same forward pass: so what a request reads from the prefix
cache has its choices too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from redone.errors import EngineError
from redone.types import Completion, RouteArray

MARK = "redone_routes"  # in a request's extra_args: its choices will be asked for

Packed = tuple[int, int, list[bytes]]  # layers L, choices K, int16 values of [tokens, L, K] per request


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one forward pass computed of a request: its tokens [start, start + length)."""

    request: str
    start: int
    length: int
    prompt: int  # tokens of the prompt
    capacity: int  # most tokens that are ever routed; 0: nobody will ask
    blocks: Sequence[int]  # KV blocks of its tokens from 0 on


@dataclass(slots=True)
class _Known:
    rows: RouteArray  # [capacity, L, K], valid up to `count`
    prompt: int
    count: int  # tokens whose successor was sampled, so that their choices are final


class RouteRecorder:
    """Choices by KV slot, and by request until they are taken or forgotten.

    A response's token keeps the choices of the pass that sampled its successor, whatever is computed again
    after a preemption or a weight update; a prompt's those of the pass whose keys and values were used.
    """

    def __init__(self, blocks: int, block_size: int, layers: int, choices: int) -> None:
        self._block_size = block_size
        self._by_slot = np.zeros((blocks * block_size, layers, choices), np.int16)
        self._known: dict[str, _Known] = {}

    def resume(self, request: str, sampled: int) -> None:
        """`request` starts again from its first tokens, of which `sampled` are its response so far."""
        if (known := self._known.get(request)) is not None:
            known.count = min(known.count, known.prompt + sampled - 1 if sampled else 0)

    def record(self, turns: Sequence[Turn], chosen: RouteArray) -> None:
        """One pass: chosen [T, L, K], the tokens of all turns in order."""
        if sum(turn.length for turn in turns) != len(chosen):
            raise RuntimeError(f"{len(chosen)} tokens were routed of {sum(t.length for t in turns)}")
        # All slots first: a request may read the blocks that another one fills in the same pass.
        offset = 0
        for turn in turns:
            self._by_slot[self._slots(turn, turn.start)] = chosen[offset : offset + turn.length]
            offset += turn.length
        for turn in turns:
            if turn.capacity:
                self._extend(turn)

    def _extend(self, turn: Turn) -> None:
        shape = (turn.capacity, *self._by_slot.shape[1:])
        known = self._known.setdefault(turn.request, _Known(np.empty(shape, np.int16), turn.prompt, 0))
        end = min(turn.start + turn.length, turn.capacity)
        if end > known.count:
            slots = self._slots(turn, known.count)
            known.rows[known.count : end] = self._by_slot[slots[: end - known.count]]
        if end >= turn.prompt:
            known.count = max(known.count, end)

    def _slots(self, turn: Turn, start: int) -> NDArray[np.int64]:
        """Of the tokens [start, turn.start + turn.length)."""
        tokens = np.arange(start, turn.start + turn.length)
        blocks = np.asarray(turn.blocks)[tokens // self._block_size]
        return blocks * self._block_size + tokens % self._block_size

    def take(self, request: str, start: int, end: int) -> RouteArray:
        """[end - start, L, K] of these tokens, once. KeyError, ValueError: it has none, or fewer."""
        known = self._known.pop(request)
        if known.count < end:
            raise ValueError(f"{known.count} of {end} tokens were seen")
        return known.rows[start:end]

    def forget(self, request: str) -> None:
        self._known.pop(request, None)


class RouteExtension:
    """Worker methods; plain values only, because they cross processes.

    Rank 0 of an engine answers: every tensor-parallel rank routes all tokens alike.
    """

    rank: int
    model_runner: Any
    _redone_routes: RouteRecorder | None = None

    def redone_record_routes(self) -> str | None:
        """Record from now on; the reason when this model's choices cannot be."""
        if self.rank:
            return None
        runner = self.model_runner
        routers = {
            module.layer_id: module.router
            for module in runner.model.modules()
            if hasattr(getattr(module, "router", None), "set_capture_fn")
        }
        layers, groups = runner.model_config.get_total_num_hidden_layers(), runner.kv_cache_config
        if sorted(routers) != list(range(layers)):
            return f"{len(routers)} of {layers} layers of this model route tokens to experts"
        if len(groups.kv_cache_groups) != 1:
            return "this model's layers do not share their KV blocks"
        self._redone_routes = RouteRecorder(
            groups.num_blocks,
            groups.kv_cache_groups[0].kv_cache_spec.block_size,
            layers,
            routers[0].top_k,
        )
        chosen: dict[int, torch.Tensor] = {}
        for layer, router in routers.items():
            router.set_capture_fn(_keeper(chosen, layer))
        compute = runner.execute_model

        def watched(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            chosen.clear()
            output = compute(scheduled, *args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                self._redone_note(scheduled, [chosen[layer] for layer in range(layers)])
            return output

        runner.execute_model = watched
        return None

    def _redone_note(self, scheduled: Any, chosen: list[torch.Tensor]) -> None:
        """After a pass: the runner's batch still stands in the order in which its tokens were computed."""
        assert self._redone_routes is not None
        cached, runner = scheduled.scheduled_cached_reqs, self.model_runner
        for name, sampled in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self._redone_routes.resume(_external(name), sampled)
        turns = []
        for name in runner.input_batch.req_ids:
            if name not in scheduled.num_scheduled_tokens:
                continue
            state, params = runner.requests[name], runner.requests[name].sampling_params
            marked = params is not None and params.extra_args and MARK in params.extra_args
            turns.append(
                Turn(
                    request=_external(name),
                    start=state.num_computed_tokens,
                    length=scheduled.num_scheduled_tokens[name],
                    prompt=state.num_prompt_tokens,
                    capacity=state.num_prompt_tokens + params.max_tokens if marked else 0,
                    blocks=state.block_ids[0],
                )
            )
        rows = torch.stack(chosen, 1)[: scheduled.total_num_scheduled_tokens]
        self._redone_routes.record(turns, rows.to("cpu", torch.int16).numpy())

    def redone_take_routes(self, names: list[str], prompt: int, lengths: list[int]) -> Packed | str | None:
        """Of finished requests for one prompt, whose tokens come with the first; or what went wrong."""
        if self._redone_routes is None:
            return None if self.rank else "they were not recorded"
        try:
            rows = [
                self._redone_routes.take(name, prompt if i else 0, prompt + length - 1)
                for i, (name, length) in enumerate(zip(names, lengths, strict=True))
            ]
        except (KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return rows[0].shape[1], rows[0].shape[2], [r.tobytes() for r in rows]

    def redone_forget_routes(self, names: list[str]) -> None:
        """Of requests that were given up."""
        for name in names:
            if self._redone_routes is not None:
                self._redone_routes.forget(name)


def add_routes(
    completions: Sequence[Completion], routes: Sequence[RouteArray | None], prompt: int
) -> list[Completion]:
    """routes: the first [prompt + R - 1, L, K], others [R - 1, L, K], or longer. EngineError: one lacks."""
    found = [r.astype(np.int16) for r in routes if r is not None]
    if len(found) < len(completions):
        raise EngineError(
            f"{len(completions) - len(found)} of {len(completions)} responses carry no expert choices; set "
            "trainer.moe.routing_replay=trainer"
        )
    of_prompt, found[0] = found[0][:prompt], found[0][prompt:]
    return [
        dataclasses.replace(c, prompt_experts=of_prompt, routed_experts=rows[: len(c.token_ids) - 1])
        for c, rows in zip(completions, found, strict=True)
    ]


def unpack(answer: Packed | str) -> list[RouteArray]:
    """[tokens, L, K] per request, as redone_take_routes cuts them. EngineError when it could not."""
    if isinstance(answer, str):
        raise EngineError(f"the expert choices of a response are missing: {answer}")
    layers, choices, rows = answer
    return [np.frombuffer(data, np.int16).reshape(-1, layers, choices) for data in rows]


def _keeper(chosen: dict[int, torch.Tensor], layer: int) -> Any:
    return lambda ids: chosen.__setitem__(layer, ids.detach().clone())


def _external(name: str) -> str:
    """vLLM appends random characters to the ids that requests were given."""
    return name.rsplit("-", 1)[0]
