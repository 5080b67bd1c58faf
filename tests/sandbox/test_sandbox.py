"""The reward around the jail: references, code blocks, partial credit, refusals, faults."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.config.schema import SandboxReward
from redone.errors import ConfigError
from redone.reward import jail as jails
from redone.reward.jail import Jail, read_verdict
from redone.reward.sandbox import Sandbox, defined_names, last_block, read_tests
from redone.types import Completion, Prompt, Score

GOOD = "```python\ndef f(x):\n    return x + 1\n```"
HALF = "```python\ndef f(x):\n    return 2\n```"
TESTS = ["assert f(1) == 2", "assert f(2) == 3"]


def score(text: str, reference: Any, **config: Any) -> Score:
    ids = np.zeros(1, dtype=np.int32)
    prompt = Prompt(
        id="p",
        task="t",
        domain="general",
        data_source="d",
        messages=(),
        token_ids=ids,
        reference=reference,
        reward="r",
    )
    completion = Completion(
        token_ids=ids, text=text, logprobs=np.zeros(1, dtype=np.float32), finish="stop", versions=()
    )
    return Sandbox(SandboxReward(**{"wall_s": 30, **config})).score(prompt, completion)


@pytest.mark.parametrize(
    "reference", [TESTS, "\n".join(TESTS), json.dumps({"tests": TESTS, "entry_point": "f"}), {"tests": TESTS}]
)
def test_binary_by_default(reference: Any) -> None:
    assert score(GOOD, reference).raw == 1
    assert score(HALF, reference).raw == 0


def test_partial_credit_by_name() -> None:
    assert score(HALF, TESTS, partial=True).raw == 0.5


def test_set_up_prefix_and_objects() -> None:
    code = (
        "```\nclass P:\n    def __init__(self, x): self.x = x\n"
        "def f(p, ps=()): return p.x + sum(q.x for q in ps)\n```"
    )
    reference = {"tests": ["assert f(P(2), [P(3)]) == 5", "assert f(root) == 7"], "setup": "root = P(7)"}
    assert score(code, reference).raw == 1
    assert score(
        "```\n    return math.pi\n```", {"tests": ["assert f() > 3"], "prefix": "import math\ndef f():"}
    ).raw


def test_values_cross_unchanged() -> None:
    program = "```python\ndef same(x): return x\n```"
    values = [
        0,
        -1,
        2**200,
        1.5,
        float("inf"),
        "a\n\u4e2d\U0001f602",
        b"\0x",
        (1, [2]),
        {"a": {1, 2}},
        None,
        1j,
    ]
    values += [True, frozenset({3}), -0.0, "\ud800", {(1, 2): "x"}, int]
    tests = [f"assert repr(same({v!r})) == {repr(v)!r}" for v in values if not isinstance(v, type | str)]
    tests += ["assert same(int) is int", "assert same('\\ud800\\n') == '\\ud800\\n'"]
    tests += ["try:\n    missing()\nexcept NameError:\n    pass\nelse:\n    raise AssertionError"]
    assert (
        score(program, [t.replace("inf", "float('inf')", 1) if "inf" in t else t for t in tests]).detail == ""
    )


def test_no_code_no_reward() -> None:
    assert score("def f(x): return x + 1", TESTS).raw == 0
    assert last_block("```python\na\n```\ntext\n```py\nb\n```") == "b\n"
    assert last_block("```python\nunclosed") is None


def test_unusable_references_are_errors() -> None:
    for reference in (None, 3, {"code": "x"}, []):
        assert score(GOOD, reference).status == "error"
    assert read_tests({"tests": [], "entry_point": "f"}) is not None
    assert defined_names("import a\nx, y = 1, 2\ndef f(): pass\nclass C: pass") == ("x", "y", "f", "C")


def test_a_fault_of_the_sandbox_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox(SandboxReward())
    monkeypatch.setattr(box._jail, "_command", ["bwrap", "--no-such-option"])
    verdict = box._jail.run("x = 1", ["pass"])
    assert verdict.status == "error" and "no-such-option" in verdict.detail
    monkeypatch.setattr(box._jail, "_command", ["/no/such/program"])
    assert box._jail.run("x = 1", ["pass"]).status == "error"


@pytest.mark.parametrize(
    ("output", "late", "status", "passed"),
    [
        (b"", False, "error", 0),
        (b"", True, "error", 0),
        (b"ready\n", False, "done", 0),
        (b"ready\n", True, "timeout", 0),
        (b"ready\nN 2 2 \n", False, "done", 2),
        (b"ready\nM 2 2 \n", False, "done", 0),
        (b"ready\nN 2 3 \n", False, "done", 0),
        (b"ready\nN 2 2 \nN 2 2 \n", False, "done", 0),
    ],
)
def test_verdicts(output: bytes, late: bool, status: str, passed: int) -> None:
    verdict = read_verdict(output, b"", late, "N", 2)
    assert (verdict.status, verdict.passed) == (status, passed)


def test_without_bubblewrap_the_run_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jails.shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"no `bwrap` on PATH; .*apt-get install bubblewrap.*isolation: rlimits"
    ):
        Jail(SandboxReward())
    unsafe = Jail(SandboxReward(isolation="rlimits", wall_s=30))
    assert unsafe.run("def one(): return 1", ["assert one() == 1"]).passed == 1


def test_rlimits_still_limit() -> None:
    unsafe = Jail(SandboxReward(isolation="rlimits", wall_s=5, cpu_s=1, memory_mb=256))
    assert unsafe.run("while True: pass", ["pass"]).passed == 0
    assert "MemoryError" in unsafe.run("x = bytearray(1 << 34)", ["pass"]).detail
    assert unsafe.run("import time\ntime.sleep(60)", ["pass"]).status == "timeout"


def test_an_interpreter_that_nobody_may_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="no interpreter that its unprivileged user may read"):
        jails.find_interpreter(str(Path.home() / "no-such-python"), True)


ALONE = """
import sys, time
from redone.config.schema import SandboxReward
from redone.reward.jail import Jail
jail = Jail(SandboxReward(wall_s=60), ahead=True)
assert jail.run("def f(): return 1", ["assert f() == 1"]).passed == 1
print(jail._spare.pid, flush=True)
sys.stdin.read()
"""


def test_a_sandbox_started_ahead_serves_one_program_and_a_dead_one_is_replaced() -> None:
    jail = Jail(SandboxReward(wall_s=60), ahead=True)
    program = "import os\ndef fresh():\n    found = os.path.exists('/tmp/x')\n    open('/tmp/x', 'w')\n"
    program += "    return not found"
    served = []
    for _ in range(3):
        served.append(jail._spare)
        assert jail.run(program, ["assert fresh()"]).passed == 1
    assert served[0] is None and all(spare.poll() is not None for spare in served[1:])
    assert jail._spare is not None and jail._spare.poll() is None
    jail._spare.kill()
    jail._spare.wait()
    assert jail.run(program, ["assert fresh()"]).passed == 1
    jail._spare.kill()
    jail._spare.communicate()


def test_a_sandbox_started_ahead_ends_with_its_process() -> None:
    owner = subprocess.Popen([sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    spare = Path("/proc") / owner.stdout.readline().decode().strip()
    assert b"bwrap" in (spare / "cmdline").read_bytes()
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 30
    while spare.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not spare.exists()
