"""Batch inference: every row of a file gets the model's answers; a cut output file is gone on with."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from redone.api import EngineFleet
from redone.config.schema import Config
from redone.data.chat import Chat
from redone.data.prompts import parse_messages, read_rows, task_of
from redone.errors import DataError
from redone.evaluate.runner import sample_seed
from redone.pipeline.answers import CONCURRENCY, in_order
from redone.pipeline.digests import of_value
from redone.types import IntArray, Sampling

BLOCK = 1024  # rows in memory at once


@dataclass(frozen=True, slots=True)
class Request:
    values: Mapping[str, Any]
    ids: IntArray
    key: str  # decides the seeds: the prompt, not its place
    longest: int | None  # of data.task_max_response_length


def generate(
    source: str,
    target: Path,
    cfg: Config,
    chat: Chat,
    engines: EngineFleet,
    progress: Callable[[int], None] = lambda rows: None,
) -> int:
    """Append a line per row of `source` to `target`: the row, `responses` and `finish`. Returns the rows that
    `target` holds now.

    Lines that are there already are kept and their rows skipped. Raises DataError, naming file and row, on a
    row without a prompt or one longer than data.max_prompt_length.
    """
    done = repair(target)
    wanted = cfg.evaluate.sampling
    sampling = Sampling(
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        max_tokens=wanted.max_tokens or cfg.data.max_response_length,
        stop_token_ids=chat.stop_token_ids,
    )

    async def answer(request: Request) -> dict[str, Any]:
        seeds = [sample_seed(cfg.run.seed, request.key, i) for i in range(wanted.n)]
        completions = await engines.generate(request.ids.tolist(), sampling.within(request.longest), seeds)
        return {
            **request.values,
            "responses": [c.text for c in completions],
            "finish": [c.finish for c in completions],
        }

    rows = islice(requests(source, cfg, chat), done, None)
    with target.open("a", encoding="utf-8") as file:
        while block := list(islice(rows, BLOCK)):
            before = done
            found = in_order(
                block, answer, lambda r: json.dumps(r, ensure_ascii=False, default=str), file, CONCURRENCY,
                lambda n, b=before: progress(b + n),  # type: ignore[misc]
            )  # fmt: skip
            done += len(asyncio.run(found))
        os.fsync(file.fileno())
    return done


def requests(source: str, cfg: Config, chat: Chat) -> Iterator[Request]:
    """Rows as the engines take them."""
    for place, values in read_rows(source):
        messages = parse_messages(values.get(cfg.data.prompt_key), cfg.data.prompt_key, place)
        ids = chat.prompt_ids(messages)
        if len(ids) > cfg.data.max_prompt_length:
            raise DataError(
                f"{place}: the prompt has {len(ids)} tokens, data.max_prompt_length="
                f"{cfg.data.max_prompt_length}; raise it"
            )
        longest = cfg.data.task_max_response_length.get(task_of(values, place)[0])
        yield Request(values, ids, of_value([[m.role, m.content] for m in messages]), longest)


def repair(path: Path) -> int:
    """Complete lines of a file; a last one that a kill cut short is removed."""
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        count = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            count, end = count + 1, end + len(line)
    return count
