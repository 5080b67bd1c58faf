"""Format and instruction following (RedOne 2.0 section 3.2.2, R = Match(O, A)): all checks, or their share.

A format is a gate, not a bonus: an additive format reward is inflated by the group's standardisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from redone.config.schema import Check, PatternReward
from redone.errors import ConfigError
from redone.reward.base import failed, make_score
from redone.reward.checks import CHECKERS
from redone.reward.extract import extract
from redone.reward.ifeval import loose, strict
from redone.types import Completion, Prompt, Score


class Pattern:
    """A RewardFn. Checks come from the configuration and from the row: `checks`, or IFEval's
    `instruction_id_list` and `kwargs`, in the reference or in extra_info."""

    def __init__(self, config: PatternReward) -> None:
        """Raises ConfigError on an unknown check."""
        self._config = config
        self._reading = loose if config.loose else strict
        for check in config.checks:
            if check.kind not in CHECKERS:
                raise ConfigError(f"checks.kind={check.kind}; use one of {', '.join(sorted(CHECKERS))}")

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        config = self._config
        try:
            checks = [*config.checks, *(row_checks(prompt) if config.from_row else ())]
        except ValueError as error:
            return failed(f"pattern reward: {error}")
        if not checks:
            return failed("pattern reward: neither the configuration nor the row has checks")
        if config.require_stop and completion.finish != "stop":
            return make_score(0.0, config, detail=f"not finished ({completion.finish})")
        answer = extract(completion.text, config)
        if answer is None:
            return make_score(0.0, config, detail=f"no answer found (extract={config.extract})")
        passed = []
        for check in checks:
            try:
                passed.append(self._reading(answer, CHECKERS[check.kind], check.args))
            except (KeyError, TypeError, ValueError, re.error) as error:
                return failed(
                    f"pattern reward: {check.kind} with {check.args}: {type(error).__name__} {error}"
                )
        broken = [check for check, good in zip(checks, passed, strict=True) if not good]
        raw = sum(passed) / len(passed) if config.score == "fraction" else float(not broken)
        if any(check.gate for check in broken):
            raw = 0.0
        return make_score(raw, config, detail=", ".join(check.kind for check in broken)[:200])


def row_checks(prompt: Prompt) -> list[Check]:
    """The checks that a row brings. Raises ValueError on ones that cannot be understood."""
    reference = prompt.reference
    source: Mapping[str, Any] = reference if isinstance(reference, Mapping) else prompt.extra
    if "instruction_id_list" in source:
        ids, kwargs = source["instruction_id_list"], source.get("kwargs") or []
        if len(ids) != len(kwargs):
            raise ValueError(f"{len(ids)} instruction ids, {len(kwargs)} kwargs")
        found = [
            Check(kind=kind, args={k: v for k, v in (args or {}).items() if v is not None})
            for kind, args in zip(ids, kwargs, strict=True)
        ]
    else:
        found = [Check(**check) for check in source.get("checks") or ()]
    for check in found:
        if check.kind not in CHECKERS:
            raise ValueError(f"unknown check {check.kind!r}")
    return found
