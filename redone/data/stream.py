"""The order in which prompts are drawn: endless, decided by the seed alone, with a cursor that can be
saved."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redone.errors import DataError, RunFolderError
from redone.types import Prompt

log = logging.getLogger(__name__)

REFERENCE = "reference"
EVERYTHING = ""  # the one bucket of an unbalanced stream

Drawn = tuple[int, Prompt]  # (epoch, prompt)


@dataclass(slots=True)
class Cursor:
    """A place in one bucket. The epoch counts passes over this bucket."""

    epoch: int = 0
    position: int = 0


class PromptStream:
    """Draws prompts over endless epochs, shuffled anew in each.

    With balance_key (`reference` or a key of Prompt.extra) the values of that key are drawn in turn. Each
    value then has its own epochs, so a rare value repeats sooner; (epoch, prompt id) is unique in both
    cases.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True, balance_key: str | None = None
    ) -> None:
        """Raises DataError without prompts, on ids that repeat, or when a prompt lacks the balance key."""
        if not prompts:
            raise DataError("no training prompts; check data.train")
        self._seed = seed
        self._shuffle = shuffle
        self._buckets = _buckets(prompts, balance_key)
        self._values = sorted(self._buckets)
        self._cursors = {value: Cursor() for value in self._values}
        self._orders: dict[str, tuple[int, list[Prompt]]] = {}
        self._turn = 0
        self._returned: list[Drawn] = []
        self._tried: set[tuple[int, str]] = set()  # (epoch, prompt id) of all that were ever given back
        self._fingerprint = _fingerprint(prompts, seed, shuffle, balance_key)

    def take(self, n: int) -> list[Drawn]:
        """The next n (epoch, prompt): what was given back, then new ones."""
        again, self._returned = self._returned[:n], self._returned[n:]
        return again + [self._next() for _ in range(n - len(again))]

    def give_back(self, drawn: Sequence[Drawn]) -> list[Drawn]:
        """Prompts that were not finished are drawn again, before new ones.

        Returns those that were given back once already and are not taken a second time: a prompt that is
        never finished would be generated for ever.
        """
        refused = [(epoch, prompt) for epoch, prompt in drawn if (epoch, prompt.id) in self._tried]
        self._returned += [one for one in drawn if one not in refused]
        self._tried |= {(epoch, prompt.id) for epoch, prompt in drawn}
        return refused

    def state_dict(self, pending: Sequence[Drawn] = ()) -> dict[str, Any]:
        """The cursor, JSON-able. `pending`: what was drawn and is to be drawn again by who goes on here."""
        cursors = {value: [c.epoch, c.position] for value, c in self._cursors.items()}
        state = {"fingerprint": self._fingerprint, "turn": self._turn, "cursors": cursors}
        if returned := [[epoch, prompt.id] for epoch, prompt in (*pending, *self._returned)]:
            state["returned"] = returned
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises RunFolderError when data, seed or options
        differ."""
        if state["fingerprint"] != self._fingerprint:
            raise RunFolderError(
                "the saved data cursor belongs to other data: data.train, data.shuffle, data.balance_key, "
                "run.seed or the chat template changed; restore them, or start a new run"
            )
        self._turn = state["turn"]
        self._cursors = {value: Cursor(*state["cursors"][value]) for value in self._values}
        prompts = {prompt.id: prompt for bucket in self._buckets.values() for prompt in bucket}
        self._returned = [(epoch, prompts[name]) for epoch, name in state.get("returned", ())]
        self._tried = set()

    def _next(self) -> Drawn:
        value = self._values[self._turn]
        self._turn = (self._turn + 1) % len(self._values)
        cursor = self._cursors[value]
        drawn = cursor.epoch, self._order(value, cursor.epoch)[cursor.position]
        cursor.position += 1
        if cursor.position == len(self._buckets[value]):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        return drawn

    def _order(self, value: str, epoch: int) -> list[Prompt]:
        """Sorting by hash: the same order with any library version and any order of files."""
        cached = self._orders.get(value)
        if cached is None or cached[0] != epoch:
            order = self._buckets[value]
            if self._shuffle:
                order = sorted(order, key=lambda prompt: _digest("order", self._seed, epoch, prompt.id))
            cached = self._orders[value] = (epoch, order)
        return cached[1]


def sampling_seed(run_seed: int, epoch: int, prompt_id: str, sample_index: int) -> int:
    """31-bit seed of one completion, independent of order, engine and retry."""
    return int.from_bytes(_digest("sample", run_seed, epoch, prompt_id, sample_index)[:4], "big") >> 1


def _buckets(prompts: Sequence[Prompt], balance_key: str | None) -> dict[str, list[Prompt]]:
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise DataError("prompt ids repeat")
    buckets: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        buckets.setdefault(_balance_value(prompt, balance_key), []).append(prompt)
    if len(buckets) > max(1, len(prompts) // 2):
        log.warning(
            "data.balance_key=%s has %d values for %d prompts", balance_key, len(buckets), len(prompts)
        )
    return buckets


def _balance_value(prompt: Prompt, balance_key: str | None) -> str:
    if balance_key is None:
        return EVERYTHING
    if balance_key == REFERENCE:
        value = prompt.reference
    elif balance_key in prompt.extra:
        value = prompt.extra[balance_key]
    else:
        raise DataError(
            f"data.balance_key={balance_key}: prompt {prompt.id} of {prompt.data_source} has no such key in "
            "extra_info; use `reference` or a key that every row has"
        )
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _fingerprint(prompts: Sequence[Prompt], seed: int, shuffle: bool, balance_key: str | None) -> str:
    """Of everything that decides what is drawn; file order counts only when nothing shuffles it."""
    entries = [f"{p.id}/{_digest(p.token_ids.tobytes().hex()).hex()}" for p in prompts]
    return _digest(*(sorted(entries) if shuffle else entries), seed, shuffle, balance_key).hex()


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
