"""Code against tests (RedOne 2.0 section 3.2.2): 1 iff every test passes, in a sandbox (jail.py)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redone.config.schema import SandboxReward
from redone.reward.base import failed, make_score
from redone.reward.jail import Jail
from redone.types import Completion, Prompt, Score

FENCE = re.compile(
    r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    tests: tuple[str, ...]
    setup: str = ""  # run after the program, in its process: objects that the tests hand to it
    prefix: str = ""  # run before it: imports, or the head of the function that the answer goes on with
    names: tuple[str, ...] = ()  # what the tests take from the program; empty: all but builtins


class Sandbox:
    """A RewardFn. The reference is a list of tests (each a Python source that raises when it fails), one
    test, or a mapping (or its JSON) with `tests`, and optionally `setup`, `prefix` and `entry_point`. The
    program is the last fenced code block of the response; a response without one earns nothing."""

    def __init__(self, config: SandboxReward, *, ahead: bool = False) -> None:
        """`ahead`: see Jail. Raises ConfigError where the isolation that was asked for does not work."""
        self._config = config
        self._jail = Jail(config, ahead=ahead)

    def probe(self) -> None:
        self._jail.probe()

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        tests = read_tests(prompt.reference)
        if tests is None or not tests.tests:
            return failed(f"sandbox reward: no tests in the reference {prompt.reference!r:.80}")
        code = last_block(completion.text)
        if code is None:
            return make_score(0.0, self._config, detail="no code block")
        return self.score_program(tests, code)

    def score_program(self, tests: Tests, code: str) -> Score:
        verdict = self._jail.run(assemble(tests, code), tests.tests, tests.names)
        if verdict.status == "error":
            return failed(f"sandbox: {verdict.detail}")
        share = verdict.passed / verdict.total
        raw = share if self._config.partial else float(verdict.passed == verdict.total)
        return make_score(raw, self._config, parts={"tests_passed": share}, detail=verdict.detail)


def last_block(text: str) -> str | None:
    """The last fenced block that is Python or names no language."""
    found = FENCE.findall(text)
    return found[-1] if found else None


def assemble(tests: Tests, code: str) -> str:
    return "\n".join(
        part for part in (tests.prefix + "\n" + code if tests.prefix else code, tests.setup) if part
    )


def read_tests(reference: Any) -> Tests | None:
    """Understand a reference; None when it is of another kind."""
    if isinstance(reference, str) and reference.lstrip()[:1] in ("{", "["):
        try:
            reference = json.loads(reference)
        except ValueError:
            return Tests(tests=(reference,))
    if isinstance(reference, str):
        return Tests(tests=(reference,))
    if isinstance(reference, list | tuple) and all(isinstance(t, str) for t in reference):
        return Tests(tests=tuple(reference))
    if not isinstance(reference, Mapping):
        return None
    inner = read_tests(reference.get("tests"))
    entry = reference.get("entry_point") or ()
    names = (entry,) if isinstance(entry, str) else tuple(map(str, entry))
    return inner and Tests(
        tests=inner.tests,
        setup=str(reference.get("setup") or ""),
        prefix=str(reference.get("prefix") or ""),
        names=names,
    )


def defined_names(source: str) -> tuple[str, ...]:
    """Functions, classes and variables that a source defines at its top level; none when it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            body = ast.parse(source).body
    except SyntaxError:
        return ()
    found: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return tuple(dict.fromkeys(found))


def humaneval_tests(row: Mapping[str, Any]) -> Tests:
    """Of a HumanEval row; names: the entry point and helpers that its prompt defines."""
    return Tests(
        tests=(f"{row['test']}\ncheck({row['entry_point']})\n",),
        prefix=str(row["prompt"]),
        names=tuple(dict.fromkeys([row["entry_point"], *defined_names(row["prompt"])])),
    )


def mbpp_tests(row: Mapping[str, Any]) -> Tests:
    """Of an MBPP row; names: what the published solution and the row's set-up code define."""
    setup = str(row.get("test_setup_code") or "").replace("\r\n", "\n")
    return Tests(
        tests=tuple(test.replace("\r\n", "\n") for test in row["test_list"]),
        setup=setup,
        names=tuple(dict.fromkeys(defined_names(row["code"].replace("\r\n", "\n")) + defined_names(setup))),
    )
