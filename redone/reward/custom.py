"""The user's own reward from a file: verl's compute_score, or TRL's function of a batch."""

from __future__ import annotations

import importlib.util
import logging
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from redone.config.schema import CustomReward
from redone.errors import ConfigError
from redone.reward.base import failed, make_score
from redone.types import Completion, Prompt, Score

log = logging.getLogger(__name__)


class Captured:
    """Holds what the user's code raised: it may raise anything, sys.exit included. Ctrl-C passes."""

    error: BaseException | None = None

    def __enter__(self) -> Captured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Custom:
    """A RewardFn. The function returns a number in [0, 1], or a mapping with such a number as `score`
    (further numbers become Score.parts). A raising function or another result is a failed score; its
    traceback is logged.

    form=verl: compute_score(data_source=, solution_str=, ground_truth=, extra_info=).
    form=trl: name(prompts=, completions=, **columns) -> one number (or None: failed) per completion; prompts
    are lists of messages, completions [{role, content}], and columns are lists: ground_truth, data_source,
    task and every key of extra_info.
    """

    def __init__(self, config: CustomReward) -> None:
        """Raises ConfigError when the file cannot be loaded or has no such function."""
        self._config = config
        self._compute = load_function(config)

    def score_many(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """In order; one call for all with form=trl."""
        if self._config.form == "verl":
            return [self.score(p, c) for p, c in zip(prompts, completions, strict=True)]
        result: Any = None
        with Captured() as captured:
            result = self._compute(
                prompts=[[{"role": m.role, "content": m.content} for m in p.messages] for p in prompts],
                completions=[[{"role": "assistant", "content": c.text}] for c in completions],
                **columns(prompts),
            )
        if captured.error is not None:
            return [self._raised(captured, prompts[0])] * len(prompts)
        values = list(result) if isinstance(result, Sequence) and not isinstance(result, str) else None
        if values is None or len(values) != len(prompts):
            found = f"{self._config.name} returned {result!r:.80}, not {len(prompts)} numbers"
            detail = f"{self._config.path}: {found}"
            log.error("%s", detail)
            return [failed(detail)] * len(prompts)
        return [self._to_score(value) for value in values]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        if self._config.form == "trl":
            return self.score_many([prompt], [completion])[0]
        result: Any = None
        with Captured() as captured:
            result = self._compute(
                data_source=prompt.data_source,
                solution_str=completion.text,
                ground_truth=prompt.reference,
                extra_info=dict(prompt.extra),
            )
        if captured.error is not None:
            return self._raised(captured, prompt)
        score = self._to_score(result)
        if score.status != "ok":
            log.error("%s on prompt %s: %s", self._config.path, prompt.id, score.detail)
        return score

    def _raised(self, captured: Captured, prompt: Prompt) -> Score:
        assert captured.error is not None
        trace = "".join(traceback.format_exception(captured.error))
        log.error("%s raised on prompt %s:\n%s", self._config.path, prompt.id, trace)
        return failed(f"{self._config.path}: {captured}")

    def _to_score(self, result: Any) -> Score:
        pairs = result.items() if isinstance(result, Mapping) else [("score", result)]
        parts = {str(k): number for k, v in pairs if (number := _number(v)) is not None}
        raw = parts.pop("score", None)
        if raw is None:
            return failed(f"{self._config.path}: {self._config.name} returned {result!r:.80}, not a number")
        return make_score(raw, self._config, parts=parts)


def columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """TRL's keyword arguments: one list per column; None where a row lacks an extra_info key."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.extra)
    found: dict[str, list[Any]] = {str(n): [p.extra.get(n) for p in prompts] for n in names}
    found.pop("prompts", None), found.pop("completions", None)
    return found | {
        "ground_truth": [p.reference for p in prompts],
        "data_source": [p.data_source for p in prompts],
        "task": [p.task for p in prompts],
    }


def load_function(config: CustomReward) -> Callable[..., Any]:
    """Run the user's file as a module of its own and take the function out of it."""
    path = Path(config.path)
    if not path.is_file():
        raise ConfigError(f"reward path={config.path}: no such file")
    spec = importlib.util.spec_from_file_location(f"redone_custom_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward path={config.path}: not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    with Captured() as captured:
        spec.loader.exec_module(module)
    if captured.error is not None:
        raise ConfigError(f"reward path={config.path} cannot be loaded: {captured}") from captured.error
    function: Callable[..., Any] | None = getattr(module, config.name, None)
    if function is None or not callable(function):
        raise ConfigError(f"reward path={config.path} has no function {config.name}; set the reward's `name`")
    return function


def _number(value: object) -> float | None:
    """None for what is no number, and for integers that no float can hold."""
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return None
