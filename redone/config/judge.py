"""The LLM judge: a chat endpoint and what it is asked. The base of the judge reward and of soft labels."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from redone.config.section import Section


class JudgeConfig(Section):
    base_url: str = Field(description="OpenAI-compatible endpoint, with its version: http://host:8000/v1.")
    model: str = Field(description="Model name as the endpoint knows it.")
    api_key_env: str | None = Field(
        None, description="NAME of the environment variable that holds the API key; keys never stand here."
    )
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="A score per answer, or comparisons of two answers, always in both orders."
    )
    opponents: Literal["reference", "candidates"] = Field(
        "reference", description="mode=pairwise: what an answer is compared with."
    )
    rubric: str | None = Field(
        None,
        description="Template of the question: {prompt}, {answer} (pairwise: {answer_a}, {answer_b}), "
        "{reference}. How to give the verdict is added to it. Default: a general one.",
    )
    rubric_file: str | None = Field(None, description="The same from a file.")
    lowest: int = Field(1, description="mode=pointwise: the score that becomes 0.")
    highest: int = Field(10, description="mode=pointwise: the score that becomes 1.")
    temperature: float = Field(0.0, ge=0, description="Of the judge.")
    max_tokens: int = Field(512, ge=1, description="Longest verdict.")
    seed: int = Field(0, description="Sent with every request.")
    structured: bool = Field(
        False, description="Ask for JSON of a fixed schema (response_format; vLLM and others enforce it)."
    )
    extra_body: dict[str, object] = Field({}, description="Further keys of every request.")
    concurrency: int = Field(16, ge=1, description="Requests at once.")
    request_timeout_s: float = Field(120.0, gt=0, description="Of one request.")
    deadline_s: float = Field(600.0, gt=0, description="Of one question with all its retries.")
    retries: int = Field(5, ge=0, description="Of one question: connection lost, timeout, HTTP 429 or 5xx.")
    backoff_s: float = Field(1.0, gt=0, description="Pause before the first retry; doubles, up to 30 s.")
    parse_retries: int = Field(
        1, ge=0, description="How often an unreadable verdict is asked for again; then it counts as failed."
    )
    free_length_ratio: float = Field(
        2.0, ge=1, description="Length guard: up to this multiple of the wanted length nothing is deducted."
    )
    max_length_ratio: float | None = Field(
        4.0,
        ge=1,
        description="From this multiple on the score is 0, linear from free_length_ratio; null: no guard. "
        "Wanted: the reference's length; without one, the median of the prompt's candidates.",
    )
    cache: str | None = Field(
        None,
        description="jsonl file of finished verdicts: they survive a crash and are never asked for again.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> JudgeConfig:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url={self.base_url!r}: not an http(s) address such as http://host:8000/v1"
            )
        if parts.username or parts.password:
            raise ValueError(
                "base_url holds credentials; put the key into a variable and name it: api_key_env"
            )
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        if self.rubric is not None and self.rubric_file is not None:
            raise ValueError("rubric and rubric_file exclude each other")
        if self.max_length_ratio is not None and self.free_length_ratio > self.max_length_ratio:
            raise ValueError(
                f"free_length_ratio={self.free_length_ratio} exceeds max_length_ratio={self.max_length_ratio}"
            )
        return self
