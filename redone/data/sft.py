"""Conversations to imitate: rows -> examples of tokens -> the batches of every epoch, by the seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redone.config.pipeline import SftConfig
from redone.config.schema import Config
from redone.data.chat import Chat
from redone.data.prompts import parse_messages, read_rows
from redone.errors import DataError
from redone.types import Batch, IntArray, Message, TrainGroup, Trajectory

LARGEST_GROUP = 64  # conversations that share one beginning


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One conversation. The response starts with the first token that is trained on."""

    id: str  # stable over files, orders and restarts; copies of a conversation have ids of their own
    task: str
    prompt_ids: IntArray  # [P] int32, P >= 1
    response_ids: IntArray  # [R] int32, R >= 1
    loss_mask: NDArray[np.bool_]  # [R] False on later turns that are not the assistant's

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    examples: tuple[Example, ...]
    too_long: int  # dropped because they exceed sft.max_length


def load_examples(files: Sequence[str], cfg: Config, chat: Chat) -> ExampleSet:
    """All conversations of all files, in order.

    Raises DataError, naming file and row, on a malformed row, one that is too long (sft.too_long=error), or
    a template that hides where an answer stands.
    """
    examples: list[Example] = []
    copies: dict[str, int] = {}
    too_long = 0
    for file in files:
        for place, values in read_rows(file):
            messages = conversation(values, cfg, place)
            try:
                ids, mask = chat.sft_tokens(messages)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            if len(ids) > cfg.sft.max_length:
                if cfg.sft.too_long == "error":
                    raise DataError(
                        f"{place}: the conversation has {len(ids)} tokens, sft.max_length="
                        f"{cfg.sft.max_length}; raise it, or set sft.too_long=drop"
                    )
                too_long += 1
                continue
            task = str(values.get("task") or values.get("data_source") or "default")
            key = json.dumps([task, [as_turn(m) for m in messages]], ensure_ascii=False)
            copies[key] = copies.get(key, 0) + 1
            examples.append(_example(key, copies[key], task, ids, mask, place))
    return ExampleSet(examples=tuple(examples), too_long=too_long)


def conversation(values: Mapping[str, Any], cfg: Config, place: str) -> tuple[Message, ...]:
    """`messages` that end with the assistant, or the prompt column and sft.response_key. Raises DataError.

    Every assistant turn of `messages` is trained on but those of "weight": 0 (the format of OpenAI's
    fine-tuning files); of a prompt and its response, the response alone.
    """
    whole = values.get("messages")
    if whole is not None:
        if not isinstance(whole, list | tuple) or len(whole) < 2:
            raise DataError(
                f"{place}: messages must be a list that ends with the assistant, got {whole!r:.80}"
            )
        last = whole[-1]
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            raise DataError(f"{place}: messages must end with the assistant, not {last!r:.80}")
        response = last.get("content")
        if last.get("weight") not in (None, 1):
            raise DataError(
                f"{place}: the last message has weight={last['weight']!r}; it is what is trained on"
            )
        turns = parse_messages(list(whole[:-1]), "messages", place)
    else:
        turns = as_context(parse_messages(values.get(cfg.data.prompt_key), cfg.data.prompt_key, place))
        response = values.get(cfg.sft.response_key)
    if not isinstance(response, str) or not response:
        raise DataError(
            f"{place}: no answer to imitate; a row needs `messages` that end with the assistant, or a column "
            f"{cfg.sft.response_key!r} (sft.response_key)"
        )
    return (*turns, Message(role="assistant", content=response))


def batches(examples: Sequence[Example], sft: SftConfig, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the examples of every optimizer step of one epoch; each example once (sft.short_batch=drop
    leaves the rest out).

    batch_unit=packed: in shuffled order, examples fill sequences of max_length tokens one after the other
    (next fit); batch_size of these sequences make a step.
    """
    order = sorted(range(len(examples)), key=lambda i: _digest("sft", seed, epoch, examples[i].id))
    if sft.batch_unit == "examples":
        units = [[i] for i in order]
    else:
        units = list(_next_fit(order, examples, sft.max_length))
    steps = [units[i : i + sft.batch_size] for i in range(0, len(units), sft.batch_size)]
    if len(steps) > 1 and len(steps[-1]) < sft.batch_size / 2:
        rest = steps.pop() if sft.short_batch != "keep" else []
        if sft.short_batch == "merge":
            steps[-1] = steps[-1] + rest
    return [[i for unit in step for i in unit] for step in steps]


def as_context(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns of a prompt: nothing of them is trained on."""
    return tuple(replace(m, trained=False) for m in turns)


def as_turn(message: Message) -> dict[str, Any]:
    """As rows hold it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    return turn if message.trained or message.role != "assistant" else turn | {"weight": 0}


def _next_fit(order: Sequence[int], examples: Sequence[Example], limit: int) -> Iterator[list[int]]:
    current: list[int] = []
    used = 0
    for i in order:
        size = examples[i].tokens
        if current and used + size > limit:
            yield current
            current, used = [], 0
        current.append(i)
        used += size
    if current:
        yield current


def sft_batch(examples: Sequence[Example], share: bool = False) -> Batch:
    """The data of one optimizer step: every example a group of its own with one response.

    `share`: conversations that begin alike (a system prompt, example turns) form groups, whose prompt is
    their common beginning: the trainer computes it once. Loss and gradients are the same.
    """
    found = share_prefixes([e.prompt_ids for e in examples]) if share else None
    groups = found or [((i,), len(e.prompt_ids)) for i, e in enumerate(examples)]
    return Batch.of(
        [
            TrainGroup(
                prompt_id=examples[members[0]].id,
                prompt_ids=examples[members[0]].prompt_ids[:prefix],
                trajectories=tuple(_trajectory(examples[i], prefix) for i in members),
            )
            for members, prefix in groups
        ]
    )


def share_prefixes(prompts: Sequence[IntArray]) -> list[tuple[tuple[int, ...], int]]:
    """(members, length of their common beginning) of groups that save the most tokens.

    Exact for neighbours in lexicographic order, in which prompts with the same beginning are neighbours.
    """
    texts = [p.tolist() for p in prompts]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    common = [_common(texts[a], texts[b]) for a, b in pairwise(order)]
    saved, start = [0], [0]  # of the first n prompts; where the group that ends there begins
    for n in range(1, len(order) + 1):
        best, first, shortest = saved[n - 1], n - 1, 0
        for i in range(n - 2, max(-1, n - 1 - LARGEST_GROUP), -1):
            shortest = common[i] if i == n - 2 else min(shortest, common[i])
            if shortest == 0:
                break
            if saved[i] + (n - 1 - i) * shortest > best:
                best, first = saved[i] + (n - 1 - i) * shortest, i
        saved.append(best)
        start.append(first)
    groups = []
    end = len(order)
    while end > 0:
        first = start[end]
        length = min(common[first : end - 1], default=len(texts[order[first]]))
        groups.append((tuple(order[first:end]), length))
        end = first
    return groups[::-1]


def _common(one: list[int], other: list[int]) -> int:
    length = min(len(one), len(other))
    return next((n for n in range(length) if one[n] != other[n]), length)


def fingerprint(examples: Sequence[Example], sft: SftConfig, seed: int) -> str:
    """Of everything that decides which example is trained on when."""
    ids = sorted(e.id for e in examples)
    options = [sft.epochs, sft.batch_size, sft.batch_unit, sft.max_length, sft.short_batch]
    return _digest(*ids, seed, *options).hex()


def _example(key: str, copy: int, task: str, ids: IntArray, mask: NDArray[np.bool_], place: str) -> Example:
    trained = np.flatnonzero(mask)
    if len(trained) == 0 or trained[0] == 0:
        raise DataError(f"{place}: nothing to train on, or no prompt before it")
    start, end = int(trained[0]), int(trained[-1]) + 1
    return Example(
        id=hashlib.blake2b(f"{copy}/{key}".encode(), digest_size=8).hexdigest(),
        task=task,
        prompt_ids=ids[:start],
        response_ids=ids[start:end],
        loss_mask=mask[start:end],
    )


def _trajectory(example: Example, prefix: int) -> Trajectory:
    """What follows the first `prefix` tokens of the prompt."""
    rest = example.prompt_ids[prefix:]
    zeros = np.zeros(len(rest) + len(example.response_ids), np.float32)
    return Trajectory(
        token_ids=np.concatenate([rest, example.response_ids]),
        loss_mask=np.concatenate([np.zeros(len(rest), np.bool_), example.loss_mask]),
        advantages=zeros,
        engine_logprobs=zeros,
    )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
