"""Prompts from the users' own files: verl parquet and slime jsonl, unchanged.

verl row: data_source, prompt [{role, content}], ability, reward_model {ground_truth}, extra_info.
slime row: prompt (a string is one user message), label, metadata.
Both may carry `task` and `domain`. The reward of a row is that of its task, else of its data source, else
`default`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from redone.config.schema import Config
from redone.data.chat import Chat
from redone.errors import DataError
from redone.types import IntArray, Message, Prompt

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
DOMAINS = ("sns", "general")
TOKENIZE_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    too_long: int  # rows dropped because their prompt exceeds data.max_prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row understood, its messages not tokenized yet."""

    place: str  # "file, line 7": for messages to the user
    task: str
    domain: str
    data_source: str
    messages: tuple[Message, ...]
    reference: Any
    reward: str
    extra: Mapping[str, Any]


def load_prompts(files: Sequence[str], cfg: Config, chat: Chat) -> PromptSet:
    """All rows of all files, in order.

    Raises DataError, naming file and row, on: a missing or unreadable file, a malformed row, a row without
    a reward in cfg.rewards, a prompt that is too long (data.truncation=error), no prompt left.
    """
    rows = (parse_row(values, place, cfg) for file in files for place, values in read_rows(file))
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    too_long = 0
    limit = cfg.data.max_prompt_length
    while part := list(islice(rows, TOKENIZE_ROWS)):
        for row, ids in zip(part, _tokenize(part, chat), strict=True):
            key = content_key(row)
            seen[key] += 1
            if len(ids) > limit:
                if cfg.data.truncation == "error":
                    raise DataError(
                        f"{row.place}: the prompt has {len(ids)} tokens, data.max_prompt_length={limit}; "
                        "raise it, or set data.truncation=drop to leave such rows out"
                    )
                too_long += 1
                continue
            longest = cfg.data.task_max_response_length.get(row.task)
            prompts.append(_prompt(row, ids, prompt_id(key, seen[key]), longest))
    if too_long:
        log.warning("%d prompts over data.max_prompt_length=%d were dropped", too_long, limit)
    if files and not prompts:
        raise DataError(f"no usable prompt in {', '.join(files)} ({too_long} were too long)")
    return PromptSet(prompts=tuple(prompts), too_long=too_long)


def read_rows(file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of a .parquet file (rows counted from 0) or a .jsonl file (lines counted from 1)."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such file; check data.train, data.val and data.test")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _jsonl_rows(path)
    else:
        raise DataError(f"{file}: files end in .parquet or .jsonl, not {path.suffix or 'nothing'}")


def parse_row(values: Mapping[str, Any], place: str, cfg: Config) -> Row:
    """Raises DataError that says which column of the row is wrong."""
    task, source = task_of(values, place)
    domain = values.get("domain") or "sns"
    if domain not in DOMAINS:
        raise DataError(f"{place}: domain={domain!r} is not one of {', '.join(DOMAINS)}")
    extra = values.get("extra_info") or values.get("metadata") or {}
    if not isinstance(extra, Mapping):
        raise DataError(f"{place}: extra_info={extra!r} is not a mapping")
    reward = next((key for key in (task, source, "default") if key in cfg.rewards), None)
    if reward is None:
        raise DataError(f"{place}: no reward for task {task!r}; add rewards.{task} (or rewards.default)")
    return Row(
        place=place,
        task=task,
        domain=domain,
        data_source=source,
        messages=parse_messages(values.get(cfg.data.prompt_key), cfg.data.prompt_key, place),
        reference=_reference(values, cfg.data.label_key, place),
        reward=reward,
        extra=dict(extra),
    )


def task_of(values: Mapping[str, Any], place: str) -> tuple[str, str]:
    """(task, data source) of a row."""
    source = values.get("data_source") or "default"
    if not isinstance(source, str):
        raise DataError(f"{place}: data_source={source!r} is not a text")
    return str(values.get("task") or source), source


def parse_messages(value: Any, key: str, place: str) -> tuple[Message, ...]:
    """A string becomes one user message; otherwise a list of {role, content} that ends with the user's
    turn."""
    if value is None:
        raise DataError(f"{place}: no column {key!r}; set data.prompt_key if it has another name")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"{place}: {key} must be a text or a list of messages, got {value!r:.80}")
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{place}: {key}[{number}] must have a role of {', '.join(ROLES)} and a text content, "
                f"got {turn!r:.80}"
            )
        weight = 1 if turn.get("weight") is None else turn["weight"]  # parquet fills in what a turn lacks
        if weight not in (0, 1):
            raise DataError(f"{place}: {key}[{number}] has weight={weight!r}; 0 (context only) or 1 is known")
        messages.append(Message(role=role, content=content, trained=weight == 1))
    if messages[-1].role != "user":
        raise DataError(f"{place}: {key} must end with a user message, not {messages[-1].role}")
    return tuple(messages)


def content_key(row: Row) -> str:
    """What makes a prompt this prompt, wherever its row stands: task, messages and reference."""
    content = [row.task, [[m.role, m.content] for m in row.messages], row.reference]
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def prompt_id(key: str, occurrence: int) -> str:
    """Stable over files, orders and restarts; the n-th copy of a prompt (from 1) has its own id."""
    return hashlib.blake2b(f"{occurrence}/{key}".encode(), digest_size=8).hexdigest()


def _prompt(row: Row, ids: IntArray, identifier: str, max_tokens: int | None) -> Prompt:
    return Prompt(
        id=identifier,
        task=row.task,
        domain=row.domain,
        data_source=row.data_source,
        messages=row.messages,
        token_ids=ids,
        reference=row.reference,
        reward=row.reward,
        extra=row.extra,
        max_tokens=max_tokens,
    )


def _reference(values: Mapping[str, Any], label_key: str, place: str) -> Any:
    model = values.get("reward_model")
    found = model.get("ground_truth") if isinstance(model, Mapping) else values.get(label_key)
    if found is None:
        raise DataError(
            f"{place}: no ground truth; a row needs reward_model.ground_truth or a column {label_key!r} "
            "(data.label_key)"
        )
    return found


def _tokenize(rows: Sequence[Row], chat: Chat) -> list[IntArray]:
    try:
        return chat.prompt_ids_batch([row.messages for row in rows])
    except DataError:
        for row in rows:  # again, one by one, to name the row
            try:
                chat.prompt_ids(row.messages)
            except DataError as error:
                raise DataError(f"{row.place}: {error}") from error
        raise


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=TOKENIZE_ROWS):
            for values in batch.to_pylist():
                yield f"{path}, row {number}", values
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{place}: not valid JSON ({error})") from error
                if not isinstance(values, dict):
                    raise DataError(f"{place}: not a JSON object")
                yield place, values
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from error
