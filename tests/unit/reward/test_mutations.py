"""The reward tests can fail: each break below, put into the code of a family, is found by the test beside it.

No process is started per break: the family's modules are loaded once more with one source changed, and the
test's function is called with its own parameters until one of them fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from redone.errors import RedoneError

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
OURS = ("redone.reward", "redone.evaluate")
DICTIONARY = "redone.reward.segment"  # takes a second to load and holds no fault of the table
# module of redone, what is there, what is put there, file of the test (without test_), its function
Fault = tuple[str, str, str, str, str]
FAULTS: dict[str, Fault] = {
    # exact
    "exact: any choice named counts": ("reward.exact", "if len(hits) == 1:", "if hits:", "exact", "choice"),
    "exact: two numbers are one": (
        "reward.exact", 'len({f.rstrip("%") for f in found}) != 1', "not found", "exact", "number",
    ),
    "exact: every label pays": (
        "reward.exact", "if everything and found >= everything and gold != found:", "if False:",
        "exact", "labels",
    ),
    "exact: any number of labels": ("reward.exact", "if len(listed) > limit:", "if False:", "exact",
        "listing_every_label_of_a_large_open_set_earns_nothing"),
    "exact: substring": ("reward.exact", "any(found == self._normal(a)", "any(self._normal(a) in found",
        "exact", "text"),
    "pattern: no NFKC": ("reward.extract", 'text = unicodedata.normalize("NFKC", text)\n    return',
        "pass\n    return", "pattern", "checks"),
    "exact: first tag": ("reward.extract", 'text.rfind(f"</{tag}>")', 'text.find(f"</{tag}>")',
        "exact", "extraction"),
    "exact: an unfinished answer scores": (
        "reward.exact", 'config.require_stop and completion.finish != "stop"', "False",
        "exact", "unfinished_and_unusable",
    ),
    # metric
    "metric: no upper length": ("reward.metric", "if excess >= config.max_length_ratio:", "if False:",
        "metric", "length_gaming_does_not_score"),
    "metric: no lower length": ("reward.metric", "if ratio < config.min_length_ratio", "if False",
        "metric", "length_gaming_does_not_score"),
    "metric: a repeated answer pays": ("reward.metric", "if tight.count(wanted) > 1", "if False",
        "metric", "length_factor_is_linear_and_short_references_have_slack"),
    "metric: no effective order": ("reward.metric", "effective_order=True", "effective_order=False",
        "metric", "the_reference_itself_scores_one"),
    "metric: Chinese by 13a": ("reward.metric", '"zh" if chinese else "13a"', '"13a"', "metric",
        "values_are_sacrebleus"),
    "metric: worst reference": ("reward.metric", "return max(scored", "return min(scored",
        "metric", "several_references_and_bad_ones"),
    "metric: weights unused": ("reward.metric", "w / sum(weights)", "1 / len(weights)", "metric",
        "values_are_sacrebleus"),
    # pattern
    "pattern: a gate is a bonus": ("reward.pattern", "if any(check.gate for check in broken):", "if False:",
        "pattern", "a_gate_decides_over_everything"),
    "pattern: one check will do": ("reward.pattern", "float(not broken)", "float(any(passed))",
        "pattern", "ifeval_rows_strict_and_fraction"),
    "pattern: loose is strict": ("reward.pattern", "loose if config.loose else strict", "strict",
        "pattern", "ifeval_rows_strict_and_fraction"),
    "pattern: words inside words": ("reward.extract", 'rf"(?<![0-9A-Za-z]){re.escape(word)}'
        '(?![0-9A-Za-z])"', "re.escape(word)", "pattern", "checks"),
    "pattern: schema ignored": ("reward.checks", 'if "schema" not in args:', "if True:", "pattern", "checks"),
    "ifeval: at least is more than": ("reward.ifeval", "count >= limit", "count > limit", "ifeval",
        "pairs_strict_and_loose"),
    "ifeval: loose keeps asterisks": ("reward.ifeval", 'cut.replace("*", "")', "cut", "ifeval",
        "loose_reading_drops_first_line_last_line_and_asterisks"),
    "ifeval: greedy placeholder": ("reward.ifeval", 'line.find("]", start)', 'line.rfind("]", start)',
        "ifeval", "linear_readings_are_the_published_ones"),
    # custom
    "custom: no range": ("reward.base", "math.isfinite(raw) and 0.0 <= raw <= 1.0", "math.isfinite(raw)",
        "custom", "anything_else_is_an_error_and_no_zero"),
    "custom: NaN passes": ("reward.base", "math.isfinite(raw) and 0.0 <= raw <= 1.0",
        "not raw > 1 and not raw < 0",
        "custom", "anything_else_is_an_error_and_no_zero"),
    "custom: errors are zeros": ("reward.base", 'detail=detail, status="error"', "detail=detail",
        "custom", "anything_else_is_an_error_and_no_zero"),
    "custom: too few scores": ("reward.custom", "len(values) != len(prompts)", "False",
        "custom", "trl_batches_and_columns"),
    "custom: silent": ("reward.custom", 'log.error("%s raised', 'log.debug("%s raised',
        "custom", "what_it_raises_is_logged_with_its_traceback"),
    # judge
    "judge: one order": ("reward.judge", "((False, (text, other)), (True, (other, text)))",
        "((False, (text, other)), (False, (text, other)))", "judge", "a_pair_is_asked_in_both_orders"),
    "judge: the second place wins": ("reward.judge", "1.0 - v.value if q.flip else v.value", "v.value",
        "judge", "a_pair_is_asked_in_both_orders"),
    "judge: off the scale is clamped": ("reward.rubric", "if low <= number <= high else None", "",
        "judge", "an_unreadable_verdict_is_asked_for_again_and_never_a_zero"),
    "judge: length pays": ("reward.judge", "score=judged * factor", "score=judged", "judge",
        "longer_is_not_better"),
    "judge: verdicts are not kept": ("reward.verdicts", "file.write(line.encode())", "pass",
        "judge", "a_judge_that_is_down_is_named_and_finished_labels_are_kept"),
    "judge: an answer fills fields": ("reward.rubric", "FIELD.sub(lambda found: quoted(found[1], "
        'texts.get(found[1], "")), self._template)',
        "__import__('functools').reduce(lambda t, k: t.replace('{' + k + '}', "
        "quoted(k, texts[k])), ('answer', 'prompt', 'reference'), self._template)", "judge",
        "an_answer_cannot_leave_its_quotation_or_fill_a_field"),
    "judge: no retries": ("reward.chat", "range(config.retries + 1)", "range(1)", "judge",
        "a_passing_trouble_is_retried"),
    # released and corrected scorers
    "released: LCS turns the other way": ("evaluate.rouge_released", "if up > left:", "if up >= left:",
        "../evaluate/rouge_released", "the_same_subsequence_of_longer_texts"),
    "corrected: too many labels pay": ("evaluate.corrected", "if len(distinct) > 2 * len(gold):",
        "if False:", "../evaluate/corrected", "sets_of_labels"),
    "corrected: every candidate pays": ("evaluate.corrected", "if everything and set(found) >= everything",
        "if False", "../evaluate/corrected", "sets_of_labels"),
    "released: names are evaluated": ("evaluate.released", "ast.literal_eval(found", "eval(found",
        "../evaluate/corrected", "a_name_of_the_scorer_is_a_wrong_answer_not_a_leak"),
    # sandbox
    "sandbox: a share is all": ("reward.sandbox", "share if self._config.partial", "share if True",
        "../../sandbox/sandbox", "binary_by_default"),
    "sandbox: its own fault is a zero": ("reward.jail", 'Verdict(status="error", passed=0, total=total, '
        "detail=detail)", 'Verdict(status="done", passed=0, total=total, detail=detail)',
        "../../sandbox/sandbox", "verdicts"),
    "sandbox: no nonce": ("reward.jail", "fields[0] != nonce or", "", "../../sandbox/sandbox", "verdicts"),
    "sandbox: first block": ("reward.sandbox", "found[-1] if found", "found[0] if found",
        "../../sandbox/sandbox", "no_code_no_reward"),
}  # fmt: skip


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a changed source."""

    def __init__(self, name: str, old: str, new: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        assert old in text, f"{name} no longer holds {old!r}"
        self.name, self.origin, self.text = name, spec.origin, text.replace(old, new)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(name, self.origin, loader=self)
            if name == self.name
            else None
        )

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.text, self.origin, "exec"), module.__dict__)


@contextmanager
def fresh_modules(change: Changed | None) -> Iterator[None]:
    """Our modules are loaded anew inside, and as they were afterwards."""
    kept = {name: module for name, module in sys.modules.items() if _is_reloaded(name)}
    for name in kept:
        del sys.modules[name]
    if change is not None:
        sys.meta_path.insert(0, change)
    try:
        yield
    finally:
        if change is not None:
            sys.meta_path.remove(change)
        for name in [name for name in sys.modules if _is_reloaded(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _is_reloaded(name: str) -> bool:
    return name.startswith(OURS) and name != DICTIONARY


def load(file: str) -> ModuleType:
    """A test file as a new module."""
    folder, _, name = file.rpartition("/")
    path = (HERE / folder / f"test_{name}.py").resolve()
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(function: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The arguments of every case of a parametrised test."""
    sets: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = names.split(",") if isinstance(names, str) else names
            sets.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    for chosen in itertools.product(*sets):
        yield {key: value for part in chosen for key, value in part.items()}


def fails(function: Callable[..., None], fixtures: dict[str, Any]) -> bool:
    wanted: Sequence[str] = ()
    if not hasattr(function, "hypothesis"):
        wanted = list(inspect.signature(function).parameters)
    for index, case in enumerate(parameters(function)):
        given = {name: value for name, value in fixtures.items() if name in wanted}
        if "tmp_path" in given:
            given["tmp_path"] = fixtures["tmp_path"] / str(index)
            given["tmp_path"].mkdir()
        try:
            function(**case, **given)
        except (AssertionError, RedoneError, NameError, pytest.fail.Exception):
            return True
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(
    name: str,
    tmp_path: Path,
    redone_data: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, old, new, file, test = FAULTS[name]
    fixtures = {"tmp_path": tmp_path, "redone_data": redone_data, "caplog": caplog}
    with fresh_modules(Changed(f"redone.{module}", old, new)):
        assert fails(getattr(load(file), f"test_{test}"), fixtures), f"not found by test_{test}"


def test_without_a_fault_nothing_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else the table above would prove nothing."""
    with fresh_modules(None):
        for index, (file, test) in enumerate(
            [("exact", "choice"), ("judge", "longer_is_not_better"), ("custom", "trl_batches_and_columns")]
        ):
            folder = tmp_path / str(index)
            folder.mkdir()
            assert not fails(getattr(load(file), f"test_{test}"), {"tmp_path": folder, "caplog": caplog})
