"""The user's own reward: verl's compute_score(data_source, solution_str, ground_truth, extra_info) from a
file."""

from __future__ import annotations

import importlib.util
import logging
import numbers
import traceback
from collections.abc import Callable, Mapping
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
    """

    def __init__(self, config: CustomReward) -> None:
        """Raises ConfigError when the file cannot be loaded or has no such function."""
        self._config = config
        self._compute = load_function(config)

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        result: Any = None
        with Captured() as captured:
            result = self._compute(
                data_source=prompt.data_source,
                solution_str=completion.text,
                ground_truth=prompt.reference,
                extra_info=dict(prompt.extra),
            )
        if captured.error is not None:
            trace = "".join(traceback.format_exception(captured.error))
            log.error("%s raised on prompt %s:\n%s", self._config.path, prompt.id, trace)
            return failed(f"{self._config.path}: {captured}")
        score = self._to_score(result)
        if score.status != "ok":
            log.error("%s on prompt %s: %s", self._config.path, prompt.id, score.detail)
        return score

    def _to_score(self, result: Any) -> Score:
        parts: dict[str, float] = {}
        raw = result
        if isinstance(result, Mapping):
            raw = result.get("score")
            parts = {str(k): float(v) for k, v in result.items() if k != "score" and _is_number(v)}
        if not _is_number(raw):
            return failed(f"{self._config.path}: {self._config.name} returned {result!r:.80}, not a number")
        return make_score(float(raw), self._config, parts=parts)


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


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)
