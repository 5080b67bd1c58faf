"""A suite is one YAML file: where its items lie, how they become prompts, how answers are cut out and scored.

configs/suites/ holds ours; a user's own file is given by path. docs/evaluation.md explains every key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from redone.config.schema import PatternReward, RewardConfig, SandboxReward
from redone.config.section import Section
from redone.errors import ConfigError

FOLDERS = (Path("configs/suites"), Path(__file__).resolve().parents[2] / "configs" / "suites")
Where = dict[str, Any]


class RewardMetric(Section):
    """Mean raw reward, times 100."""

    kind: Literal["reward"] = "reward"
    reward: RewardConfig = Field(description="Any reward of docs/rewards.md.")


class PassAtK(Section):
    """Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1), times 100."""

    kind: Literal["pass_at_k"] = "pass_at_k"
    reward: RewardConfig = Field(description="An answer passes when this reward calls it correct.")
    k: tuple[int, ...] = Field((1,), min_length=1, description="Those above --n are left out.")


class IfevalMetric(Section):
    """IFEval's four accuracies: prompt and instruction, strict and loose."""

    kind: Literal["ifeval"] = "ifeval"


class TranslationMetric(Section):
    """Corpus BLEU, chrF++, chrF2 (sacrebleu), and the released scorer's means of sentence scores."""

    kind: Literal["translation"] = "translation"
    language: Literal["zh", "en"] = Field(description="Of the translation: decides BLEU's tokeniser.")


class SnsReleased(Section):
    """The arithmetic of SNS-Bench's released scorer, faults included."""

    kind: Literal["sns_released"] = "sns_released"
    file: str = Field(description="Name of the released file, e.g. Note-CHLW.")


class SnsCorrected(Section):
    """evaluate/corrected.py: the task as it is meant."""

    kind: Literal["sns_corrected"] = "sns_corrected"
    file: str = Field(description="Name of the released file, e.g. Note-CHLW.")


Metric = Annotated[
    RewardMetric | PassAtK | IfevalMetric | TranslationMetric | SnsReleased | SnsCorrected,
    Field(discriminator="kind"),
]


class Turn(Section):
    user: str
    assistant: str


class Shots(Section):
    """Worked examples taken from a data file."""

    data: str = Field(description="File under the data folder.")
    where: Where = Field({}, description="Rows to take, as in a part.")
    limit: int = Field(ge=1, description="The first so many of them.")
    assistant: str = Field(description="Template of the model's turn.")


class PromptTemplate(Section):
    """Templates: {field} is a row's field, {field|filter} what evaluate/items.py's FILTERS make of it."""

    system: str | None = Field(None, description="System message.")
    turns: tuple[Turn, ...] = Field((), description="Few-shot turns, written out.")
    shots: Shots | None = Field(None, description="Few-shot turns, from data.")
    user: str = Field(description="The user's message.")


class Extract(Section):
    """From a model's output to its answer."""

    drop_thinking: bool = Field(True, description="Only what follows the last </think>, where there is one.")
    patterns: tuple[str, ...] = Field((), description="Regular expressions; the first that occurs decides.")
    take: Literal["first", "last"] = Field("last", description="Which of its matches.")
    otherwise: Literal["all", "nothing"] = Field("all", description="The answer when none occurs.")
    wrap: str = Field("{answer}", description="What is handed to the metrics.")

    @model_validator(mode="after")
    def _patterns(self) -> Extract:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"extract.patterns: {pattern!r} is no regular expression: {error}"
                ) from error
        return self


class Part(Section):
    """Items of one file that are asked and scored alike."""

    id: str = Field(pattern=r"^[A-Za-z0-9._+-]+$", description="Name in tables and records.")
    data: str = Field(description="File under the data folder: .json, .jsonl, .jsonl.gz, .parquet.")
    where: Where = Field({}, description="field: value, list of values, or {from: a, to: b} (inclusive).")
    prompt: PromptTemplate
    reference: str = Field("answer", description="Field that holds the right answer.")
    adapter: Literal["none", "humaneval", "mbpp"] = Field(
        "none", description="Makes the sandbox's tests of a row of that data set; replaces `reference`."
    )
    extract: Extract = Extract()
    max_tokens: int = Field(512, ge=1, description="Longest answer.")
    metrics: dict[str, Metric] = Field(min_length=1, description="Name -> metric; the first is the main one.")
    policies: dict[str, str] = Field({}, description="Name -> template of an answer that knows nothing.")


class Suite(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._+-]+$")
    title: str = ""
    source: str = Field("", description="Where the data come from, licence, and what the prompts follow.")
    parts: tuple[Part, ...] = Field(min_length=1)
    tables: dict[str, dict[str, tuple[str, ...]]] = Field(
        {}, description="Table -> column -> scores (part/metric or part/metric/score) whose mean it is."
    )
    paper: dict[str, Literal["sns", "translation"]] = Field(
        {}, description="Table -> the paper's rows to print beside it with --like-paper."
    )

    @model_validator(mode="after")
    def _references(self) -> Suite:
        ids = [part.id for part in self.parts]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"parts: id {sorted(twice)[0]!r} occurs twice")
        known = {f"{part.id}/{metric}" for part in self.parts for metric in part.metrics}
        for table, columns in self.tables.items():
            for column, scores in columns.items():
                for score in scores:
                    if "/".join(score.split("/")[:2]) not in known:
                        raise ValueError(
                            f"tables.{table}.{column}: no score {score!r}; there are {sorted(known)}"
                        )
        return self


def load_suite(name: str) -> Suite:
    """By the name of a file in configs/suites, or by path. Raises ConfigError: unknown, or what is wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _find(name)
    if not path.is_file():
        raise ConfigError(f"--suite {name}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("parts"), list):
        raise ConfigError(f"{path}: a suite is a mapping with `name` and a list `parts`")
    defaults = values.pop("defaults", {}) or {}
    values["parts"] = [_over(defaults, part) if isinstance(part, dict) else part for part in values["parts"]]
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        lines = [f"{_place(values, e['loc'])}: {_said(e)}" for e in error.errors()]
        shown = "; ".join(list(dict.fromkeys(lines))[:6])
        raise ConfigError(f"{path}: {shown}. docs/evaluation.md lists the keys of a suite") from error


def shipped() -> dict[str, Path]:
    """Name -> file of every suite in configs/suites (of the working directory, else of this tree)."""
    found: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def reward_configs(suite: Suite) -> dict[str, RewardConfig]:
    """`suite/part/metric[/reading]` -> the reward that the pool must compute for it."""
    found: dict[str, RewardConfig] = {}
    for part in suite.parts:
        for name, metric in part.metrics.items():
            key = f"{suite.name}/{part.id}/{name}"
            if isinstance(metric, RewardMetric | PassAtK):
                found[key] = metric.reward
            elif isinstance(metric, IfevalMetric):
                for reading in ("strict", "loose"):
                    found[f"{key}/{reading}"] = PatternReward(
                        score="fraction", loose=reading == "loose", require_stop=False
                    )
    return found


def runs_code(part: Part) -> bool:
    """Its answers are executed: policies that nobody asked for are left out."""
    metrics = part.metrics.values()
    return any(isinstance(m, RewardMetric | PassAtK) and isinstance(m.reward, SandboxReward) for m in metrics)


def _find(name: str) -> Path:
    known = shipped()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"--suite {name}: unknown suite; {hint}There are {', '.join(known) or 'none'}; "
        "also a suite's own .yaml file, or run:RUN_FOLDER for a run's held-out split"
    )


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and key in ("prompt", "extract", "policies")
        )
        merged[key] = _over(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _place(values: Mapping[str, Any], loc: tuple[int | str, ...]) -> str:
    """parts.3.prompt.user -> parts.Note-CHLW.prompt.user"""
    parts = list(loc)
    if len(parts) > 1 and parts[0] == "parts" and isinstance(parts[1], int):
        part = values["parts"][parts[1]]
        parts[1] = part.get("id", parts[1]) if isinstance(part, dict) else parts[1]
    return ".".join(map(str, parts)) or "suite"


def _said(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "is required"
    return str(error["msg"]).removeprefix("Value error, ")
