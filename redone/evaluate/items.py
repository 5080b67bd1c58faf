"""Items of a suite: rows of its files, filtered, rendered with its templates, tokenized for one model."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redone.config.load import load_config
from redone.config.schema import Config
from redone.data.chat import Chat
from redone.data.prompts import load_prompts
from redone.errors import ConfigError, DataError
from redone.evaluate.suite import Extract, Part, PromptTemplate, RewardMetric, Suite
from redone.reward.sandbox import Tests, humaneval_tests, mbpp_tests
from redone.types import Message, Prompt

Row = Mapping[str, Any]
FIELD = re.compile(r"\{(\w+)(?:\|(\w+))?\}")
RUN = "run:"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvalItem:
    """One question. `prompt.extra` is the row; `prompt.id` changes when its row or its prompt does."""

    suite: str
    part: Part
    index: int  # in the part
    prompt: Prompt

    @property
    def row(self) -> Row:
        return self.prompt.extra


def suite_items(suite: Suite, data: Path, chat: Chat, limit: int | None = None) -> list[EvalItem]:
    """The first `limit` items of every part. Raises DataError naming file, row or field."""
    items: list[EvalItem] = []
    for part in suite.parts:
        rows = select(read_file(data / part.data, suite.name), part.where)
        if not rows:
            raise DataError(f"{data / part.data}: no row is left by parts.{part.id}.where of {suite.name}")
        shots = shot_turns(part.prompt, data, suite.name)
        rows = rows[:limit]
        places = [f"{part.data}, item {n} of {suite.name}/{part.id}" for n in range(len(rows))]
        turns = [messages(part.prompt, shots, r, p) for r, p in zip(rows, places, strict=True)]
        ids = chat.prompt_ids_batch(turns)
        for n, (row, talk, tokens) in enumerate(zip(rows, turns, ids, strict=True)):
            prompt = Prompt(
                id=f"{part.id}:{n:05d}:{_digest(row, talk)}",
                task=part.id,
                domain="general",
                data_source=suite.name,
                messages=talk,
                token_ids=tokens,
                reference=reference(part, row, places[n]),
                reward="",
                extra=dict(row),
            )
            items.append(EvalItem(suite=suite.name, part=part, index=n, prompt=prompt))
    return items


def held_out(argument: str) -> tuple[Config, str]:
    """(configuration, split) of `run:FOLDER` or `run:FOLDER#val`. Raises ConfigError when there is none."""
    folder, _, split = argument.removeprefix(RUN).partition("#")
    split = split or "test"
    if split not in ("test", "val", "train"):
        raise ConfigError(f"--suite {argument}: {split!r} is no split; use test or val")
    if not (Path(folder) / "config.yaml").is_file():
        raise ConfigError(f"--suite {argument}: {folder} is no run folder (no config.yaml)")
    cfg = load_config(Path(folder) / "config.yaml")
    if not getattr(cfg.data, split):
        raise ConfigError(f"--suite {argument}: the run has no data.{split}; use {folder}#val or #train")
    return cfg, split


def run_suite(cfg: Config, split: str, chat: Chat, limit: int | None = None) -> tuple[Suite, list[EvalItem]]:
    """A run's held-out files with the run's own rewards, a part per task."""
    files: tuple[str, ...] = getattr(cfg.data, split)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in load_prompts(files, cfg, chat).prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    name = _plain(f"run-{cfg.run.name}" + ("" if split == "test" else f"-{split}"))
    items = []
    for task, prompts in by_task.items():
        part = Part(
            id=_plain(task),
            data=files[0],
            prompt=PromptTemplate(user="(the run's own prompts)"),
            metrics={"score": RewardMetric(reward=cfg.rewards[prompts[0].reward])},
            extract=Extract(drop_thinking=False),
            max_tokens=cfg.evaluate.sampling.max_tokens or cfg.data.max_response_length,
        )
        items += [EvalItem(suite=name, part=part, index=n, prompt=p) for n, p in enumerate(prompts[:limit])]
    parts = tuple({item.part.id: item.part for item in items}.values())
    tables = {"score": {part.id: (f"{part.id}/score",) for part in parts}} if len(parts) > 1 else {}
    return Suite(name=name, title=f"{split} split of {cfg.run.name}", parts=parts, tables=tables), items


def read_file(path: Path, suite: str) -> list[Row]:
    """All rows of a .json list, .jsonl, .jsonl.gz or .parquet file."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, which suite {suite} needs; --data (or REDONE_DATA) names the folder of "
            "data sets, `redone data fetch` lists what can be downloaded"
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        found = json.loads(text) if path.suffix == ".json" else _lines(text)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not readable as {path.suffix}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path}: a data file holds a list of objects")
    return found


def select(rows: Iterable[Row], where: Mapping[str, Any]) -> list[Row]:
    """Rows whose fields have the wanted value, one of a list, or one in {from, to}."""
    return [row for row in rows if all(_fits(row.get(key), wanted) for key, wanted in where.items())]


def render(template: str, row: Row, place: str) -> str:
    """Fill {field} and {field|filter}. Raises DataError for a field that the row lacks."""

    def fill(found: re.Match[str]) -> str:
        name, filter_name = found.groups()
        if name not in row:
            raise DataError(f"{place}: the template wants {{{name}}}, the row has {', '.join(row)}")
        if filter_name is not None and filter_name not in FILTERS:
            raise DataError(f"{place}: unknown filter |{filter_name}; there are {', '.join(FILTERS)}")
        return FILTERS[filter_name](row[name]) if filter_name else as_text(row[name])

    return FIELD.sub(fill, template)


def as_text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _list(value: Any) -> str:
    """A Python list that holds the whole text; brackets are dropped, else it could not be parsed back."""
    return repr([re.sub(r"[\[\]]", "", as_text(value))])


def _parts(value: Any) -> list[str]:
    text = as_text(value)
    found = re.search(r"\[(.*?)\]", text, re.DOTALL)
    inner = found[1] if found and text.lstrip().startswith("[") else text
    return [part.strip().strip("'\"") for part in inner.split(",")]


def _options(value: Any) -> str:
    """The last [...] of a text: the candidates at the end of a prompt, as a list."""
    found = re.findall(r"\[[^\[\]]*\]", as_text(value))
    return next((f for f in reversed(found) if f != "[]"), "[]")


FILTERS: dict[str, Callable[[Any], str]] = {
    "list": _list,
    "first": lambda value: _parts(value)[0],
    "options": _options,
    "commas": lambda value: ", ".join(_parts(value)),
    "json": lambda value: json.dumps(value, ensure_ascii=False),
    "strip": lambda value: as_text(value).strip(),
}


def messages(template: PromptTemplate, shots: Sequence[Message], row: Row, place: str) -> tuple[Message, ...]:
    """System message, worked examples, the question."""
    system = [Message(role="system", content=render(template.system, row, place))] if template.system else []
    return (*system, *shots, Message(role="user", content=render(template.user, row, place)))


def shot_turns(template: PromptTemplate, data: Path, suite: str) -> list[Message]:
    """The written turns, then those from data."""
    pairs = [(turn.user, turn.assistant) for turn in template.turns]
    if template.shots is not None:
        rows = select(read_file(data / template.shots.data, suite), template.shots.where)
        place = f"{template.shots.data} (shots of {suite})"
        pairs += [
            (render(template.user, row, place), render(template.shots.assistant, row, place))
            for row in rows[: template.shots.limit]
        ]
    found = []
    for user, assistant in pairs:
        found += [Message(role="user", content=user), Message(role="assistant", content=assistant)]
    return found


def reference(part: Part, row: Row, place: str) -> Any:
    """What the rewards compare with."""
    try:
        if part.adapter == "humaneval":
            return _tests(humaneval_tests(row))
        if part.adapter == "mbpp":
            return _tests(mbpp_tests(row))
        return row[part.reference]
    except KeyError as error:
        raise DataError(f"{place}: the row has no field {error}; it has {', '.join(row)}") from error


def answer_of(text: str, rule: Extract) -> str:
    """What of a model's output counts."""
    if rule.drop_thinking and "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    answer = text if rule.otherwise == "all" else ""
    for pattern in rule.patterns:
        if found := list(re.finditer(pattern, text)):
            match = found[0] if rule.take == "first" else found[-1]
            answer = match[1] if match.re.groups else match[0]
            break
    return rule.wrap.replace("{answer}", answer)


def _tests(tests: Tests) -> dict[str, Any]:
    return {
        "tests": list(tests.tests),
        "setup": tests.setup,
        "prefix": tests.prefix,
        "entry_point": list(tests.names),
    }


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return bool(wanted["from"] <= value <= wanted["to"])
    return value in wanted if isinstance(wanted, list) else bool(value == wanted)


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _digest(row: Row, talk: Sequence[Message]) -> str:
    content = [dict(row), [[m.role, m.content] for m in talk]]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "-", text) or "run"
