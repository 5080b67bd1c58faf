"""The reward families of the paper (RedOne 2.0 section 3.2.2), the user's own code, and the pool for them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from redone.config.judge import JudgeConfig
from redone.config.section import Section


class RewardBase(Section):
    threshold: float = Field(1.0, ge=0, le=1, description="raw >= threshold counts as correct.")
    scale: float = Field(1.0, gt=0, description="value = scale * raw (before length shaping).")
    timeout_s: float = Field(30.0, gt=0, description="Longest scoring of one response; then it is dropped.")


class AnswerReward(RewardBase):
    """A reward that first cuts the answer out of the response."""

    extract: Literal["none", "tag", "last_line", "box"] = Field(
        "none", description="Where the answer stands."
    )
    tag: str = Field("answer", description="Tag name for extract=tag.")
    require_stop: bool = Field(True, description="A response cut by the length limit scores 0.")


class ExactReward(AnswerReward):
    family: Literal["exact"] = "exact"
    answer: Literal["text", "number", "choice", "labels"] = Field(
        "text",
        description="What is compared: the text, a number, one of a closed set, or a set of labels (F1).",
    )
    ignore_case: bool = Field(True, description="Fold case.")
    strip_punctuation: bool = Field(True, description="Drop ASCII and full-width punctuation at both ends.")
    labels: tuple[str, ...] = Field(
        (), description="The closed set for answer=choice or labels; default: extra_info.choices of the row."
    )
    separators: str = Field(",，、;；|\n", min_length=1, description="Characters between labels.")
    max_labels: int | None = Field(
        None, ge=1, description="answer=labels: more labels than this earn 0; default: twice the reference's."
    )


class MetricReward(AnswerReward):
    family: Literal["metric"] = "metric"
    metrics: tuple[Literal["bleu", "chrf", "chrf++", "rouge1", "rouge2", "rougeL"], ...] = Field(
        ("bleu", "chrf"), min_length=1, description="Metrics that are mixed."
    )
    weights: tuple[float, ...] = Field(
        (), description="Weight of each metric, normalised to sum 1; default: equal weights."
    )
    language: Literal["auto", "zh", "en"] = Field(
        "auto", description="Tokeniser: zh (Chinese) or 13a; auto looks at the reference."
    )
    min_length_ratio: float = Field(
        0.5, ge=0, le=1, description="A response shorter than this share of the reference earns 0."
    )
    free_length_ratio: float = Field(
        1.15, ge=1, description="Up to this multiple of the reference's length nothing is deducted."
    )
    max_length_ratio: float = Field(
        1.4, ge=1, description="From this multiple on the reward is 0; linear from free_length_ratio."
    )

    @model_validator(mode="after")
    def _weights(self) -> MetricReward:
        if self.weights and (
            len(self.weights) != len(self.metrics) or min(self.weights) < 0 or sum(self.weights) <= 0
        ):
            raise ValueError(f"weights={list(self.weights)}: one per metric, none negative, not all 0")
        if self.free_length_ratio > self.max_length_ratio:
            raise ValueError(
                f"free_length_ratio={self.free_length_ratio} exceeds max_length_ratio={self.max_length_ratio}"
            )
        return self


class SandboxReward(RewardBase):
    family: Literal["sandbox"] = "sandbox"
    isolation: Literal["bubblewrap", "rlimits"] = Field(
        "bubblewrap",
        description="rlimits: no isolation of files, network and processes; for trusted code only.",
    )
    partial: bool = Field(
        False, description="Share of the tests that pass instead of all or nothing (the paper)."
    )
    wall_s: float = Field(10.0, gt=0, description="Wall clock of one execution; longer is a failed test.")
    cpu_s: int = Field(8, ge=1, description="CPU seconds per process.")
    memory_mb: int = Field(512, ge=64, description="Address space per process.")
    processes: int = Field(
        16, ge=2, description="Processes and threads of the program, the checker included."
    )
    file_mb: int = Field(16, ge=1, description="Largest file, and the size of the writable folder.")
    workers: int = Field(2, ge=1, description="Executions at once.")
    python: str | None = Field(
        None, description="Interpreter that runs the program; default: ours, else python3 of the system."
    )


class Check(Section):
    """One check; `kind` is an IFEval instruction id or one of those in reward/checks.py."""

    kind: str = Field(
        description="IFEval instruction id, regex, json_schema, required, forbidden, count, language."
    )
    args: dict[str, object] = Field({}, description="Arguments of the check.")
    gate: bool = Field(False, description="When it fails the whole reward is 0.")


class PatternReward(AnswerReward):
    family: Literal["pattern"] = "pattern"
    checks: tuple[Check, ...] = Field((), description="Checks of every row, before the row's own.")
    from_row: bool = Field(
        True, description="Also take instruction_id_list and kwargs (IFEval) or `checks` from the row."
    )
    score: Literal["strict", "fraction"] = Field("strict", description="All checks, or their share.")
    loose: bool = Field(
        False, description="IFEval's loose reading: also without first or last line and without asterisks."
    )

    @model_validator(mode="after")
    def _patterns(self) -> PatternReward:
        for check in self.checks:
            if check.kind == "regex":
                try:
                    re.compile(str(check.args.get("pattern", "")))
                except re.error as error:
                    raise ValueError(f"pattern={check.args.get('pattern')!r}: {error}") from error
        return self


class CustomReward(RewardBase):
    family: Literal["custom"] = "custom"
    path: str = Field(description="Python file of the user.")
    name: str = Field(
        "compute_score", description="compute_score(data_source, solution_str, ground_truth, extra_info)."
    )
    form: Literal["verl", "trl"] = Field(
        "verl", description="trl: name(prompts, completions, **columns) -> list of numbers."
    )
    workers: int = Field(1, ge=1, description="Processes that run the user's code.")


class JudgeReward(JudgeConfig, RewardBase):
    family: Literal["judge"] = "judge"
    timeout_s: float = Field(
        600.0, gt=0, description="As deadline_s; the smaller one counts. Waiting for a free request does not."
    )
    require_stop: bool = Field(True, description="A response cut by the length limit scores 0.")

    @model_validator(mode="after")
    def _alone(self) -> JudgeReward:
        if self.mode == "pairwise" and self.opponents == "candidates":
            raise ValueError(
                "opponents=candidates needs all answers to a prompt at once, a reward sees one: use "
                "opponents=reference or mode=pointwise"
            )
        return self


RewardConfig = Annotated[
    ExactReward | MetricReward | SandboxReward | PatternReward | JudgeReward | CustomReward,
    Field(discriminator="family"),
]


class RewardPoolConfig(Section):
    workers: int = Field(1, ge=1, description="Processes for exact, metric and pattern rewards.")
    max_pending: int = Field(
        4096, ge=1, description="Responses in the pool at once; more wait (back-pressure)."
    )
