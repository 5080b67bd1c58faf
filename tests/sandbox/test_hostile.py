"""Hostile programs earn nothing, reach nothing, and leave nothing behind."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from redone.config.schema import SandboxReward
from redone.reward.jail import Jail, Verdict

TEST = "assert one() == 1"
FILE = Path(__file__).parent / "hostile.txt"
FOUND = re.findall(
    r"^#: (\w+) (\w+)\n(.*?)(?=^#: |\Z)", FILE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
HOSTILE = {name: program for kind, name, program in FOUND if kind == "wrong"}
RIGHT_ANSWER = {name: program for kind, name, program in FOUND if kind == "right"}
SECRET = "the canary sings"
MARK = rb"REDONE_SANDBOX[=\0]%d\b" % os.getpid()


@pytest.fixture(scope="module")
def jail() -> Jail:
    """Short limits: a healthy program needs some 30 ms of CPU."""
    found = Jail(SandboxReward(wall_s=6.0, cpu_s=1, memory_mb=256, processes=8, file_mb=4))
    found.probe()
    return found


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[dict[str, object]]:
    """A file, a TCP port and an abstract socket that a program might reach; checked afterwards."""
    os.chmod(tmp_path, 0o777)
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    os.chmod(canary, 0o666)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind("\0redone-canary")
        for listener in (tcp, unix):
            listener.listen()
            listener.setblocking(False)
        yield {"canary": str(canary), "port": tcp.getsockname()[1], "pid": os.getpid()}
        for listener in (tcp, unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert canary.read_text() == SECRET
    assert [p.name for p in tmp_path.iterdir()] == ["canary"]
    assert not [p for p in ("/planted", "/usr/planted", "/dev/planted") if Path(p).exists()]
    assert survivors() == []


def survivors(patience_s: float = 5.0) -> list[str]:
    """Processes that carry the mark of this process's sandboxes."""
    end = time.monotonic() + patience_s
    while found := [p for p in Path("/proc").iterdir() if p.name.isdigit() and _is_ours(p)]:
        if time.monotonic() > end:
            return [str(p) for p in found]
        time.sleep(0.05)
    return []


def _is_ours(process: Path) -> bool:
    try:
        texts = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z" and any(re.search(MARK, text) for text in texts)


def fill(program: str, values: dict[str, object]) -> str:
    for name in ("canary", "port", "pid"):
        program = program.replace(f"{{{name}!r}}", repr(values[name])).replace(
            f"{{{name}}}", str(values[name])
        )
    return program


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) + len(RIGHT_ANSWER) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_earns_nothing(jail: Jail, surroundings: dict[str, object], name: str) -> None:
    verdict = jail.run(fill(HOSTILE[name], surroundings), [TEST])
    assert verdict.status in ("done", "timeout"), verdict  # not the sandbox's fault
    assert verdict.passed == 0, verdict


@pytest.mark.parametrize("name", RIGHT_ANSWER)
def test_right_answer_counts_and_the_rest_dies(
    jail: Jail, surroundings: dict[str, object], name: str
) -> None:
    assert jail.run(fill(RIGHT_ANSWER[name], surroundings), [TEST]).passed == 1


def test_the_limits_do_not_hurt_an_honest_program(jail: Jail) -> None:
    program = (
        "import json, re, collections, math\n"
        "def one():\n    open('/tmp/x', 'w').write('1')\n    return int(open('/tmp/x').read())"
    )
    assert jail.run(program, [TEST]) == Verdict(status="done", passed=1, total=1)


def test_executions_do_not_see_each_other(jail: Jail) -> None:
    assert jail.run("open('/tmp/x', 'w').write('1')\ndef one(): return 1", [TEST]).passed == 1
    assert jail.run("import os\ndef one(): return len(os.listdir('/tmp'))", ["assert one() == 0"]).passed == 1


def test_a_killed_worker_takes_its_sandbox_along(jail: Jail) -> None:
    """bubblewrap dies with the process that started it, and the namespace with bubblewrap."""
    child = os.fork()
    if child == 0:
        jail.run("import time\ntime.sleep(97531)", [TEST])
        os._exit(0)
    time.sleep(1.0)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert survivors() == []


def test_threads_of_the_host_are_untouched(jail: Jail) -> None:
    before = threading.active_count()
    jail.run("while True: pass", [TEST])
    assert threading.active_count() == before
