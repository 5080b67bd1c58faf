"""Environment of every test process, the time report per folder, and the rule that CI skips nothing."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_COMPILE_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # worker start-up is import-bound

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

seconds_used: dict[str, float] = defaultdict(float)  # folder -> seconds of set-up, call and tear-down
forbidden_skips: list[str] = []


def budgets(readme: Path = TESTS / "README.md") -> dict[str, float]:
    """folder -> minutes, from the table in tests/README.md."""
    rows = re.findall(r"^\| (\w+)\s*\| (\d+)\s*\|", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {folder: float(minutes) for folder, minutes in rows}


def folder_of(nodeid: str) -> str:
    """tests/dist/test_x.py::t -> dist; files directly in tests/ count as unit."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "unit"


@pytest.fixture(scope="session")
def redone_data() -> Path:
    """The folder of shared data sets, REDONE_DATA."""
    value = os.environ.get("REDONE_DATA")
    if value and Path(value).is_dir():
        return Path(value)
    message = f"REDONE_DATA={value!r} is no folder: set it to the folder of shared data sets"
    if IN_CI:
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return TESTS.parent


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import settings

    settings.register_profile("redone", deadline=None, max_examples=50, derandomize=IN_CI)
    settings.load_profile("redone")


def _marked(report: pytest.TestReport | pytest.CollectReport, *names: str) -> bool:
    return any(name in getattr(report, "keywords", {}) for name in names)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds_used[folder_of(report.nodeid)] += report.duration
    if report.skipped and not hasattr(report, "wasxfail") and not _marked(report, "gpu", "sglang"):
        forbidden_skips.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped and folder_of(report.nodeid) != "gpu":
        forbidden_skips.append(report.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    if IN_CI and forbidden_skips and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if IN_CI and forbidden_skips:
        terminalreporter.section("skipped in CI: not allowed", red=True)
        for nodeid in forbidden_skips:
            write(nodeid)
    if not seconds_used:
        return
    limits = budgets()
    terminalreporter.section("minutes per folder")
    for folder in sorted(seconds_used):
        used, limit = seconds_used[folder] / 60, limits.get(folder)
        over = limit is not None and used > limit
        budget = "" if limit is None else f" of {limit:g}{'  OVER BUDGET' if over else ''}"
        write(f"{folder:<8} {used:6.2f}{budget}", red=over)
