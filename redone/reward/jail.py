"""One execution of untrusted Python against tests: bubblewrap around checker.py, and the verdict it sends.

Isolation: own user, mount, pid, net, ipc, uts and cgroup namespaces, no network, the system's /usr and the
interpreter read-only and nothing else of the host, a fresh writable /tmp of limited size, no /proc, a
seccomp filter, no capabilities, rlimits, a wall clock. As root, bubblewrap itself runs as `nobody`: the
kernel does not apply the process limit to root. The memory limit holds per process, so the worst case of one
execution is memory_mb * processes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from redone.config.schema import SandboxReward
from redone.errors import ConfigError
from redone.reward import seccomp

NOBODY = 65534
MESSAGE_BYTES = 8 * 2**20  # longest single value that a program may return
START_S = 20.0  # a sandbox that has not started after this is a fault of the machine
FIX = (
    "install it (Debian: apt-get install bubblewrap), or accept code that can read and write your files with "
    "isolation: rlimits"
)
# The checker's code object comes first on descriptor 0. It is compiled once: that takes as long as starting
# Python.
START = """
import marshal, os
data = b""
while len(data) < %d:
    data += os.read(0, %d - len(data)) or os._exit(1)
exec(marshal.loads(data))
"""
COMPILE = """
import marshal, sys
sys.stdout.buffer.write(marshal.dumps(compile(sys.stdin.read(), "checker", "exec")))
"""
Status = Literal["done", "timeout", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`error`: the sandbox failed, which says nothing about the program. A program that runs too long, dies
    or breaks its checker has failed its tests."""

    status: Status
    passed: int
    total: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Interpreter:
    path: str
    prefix: str  # folder of its standard library, bound read-only


class Jail:
    """Runs programs, each in a sandbox of its own."""

    def __init__(self, config: SandboxReward, *, ahead: bool = False) -> None:
        """`ahead`: while a program runs, the next one's sandbox starts; it ends with this process.

        Raises ConfigError where the isolation that was asked for is not to be had, with the fix.
        """
        self._config = config
        self._ahead = ahead and config.isolation == "bubblewrap"  # else the running program could reach it
        self._spare: subprocess.Popen[bytes] | None = None
        self._isolated = config.isolation == "bubblewrap"
        self._drop = self._isolated and os.geteuid() == 0
        if self._isolated and shutil.which("bwrap") is None:
            raise ConfigError(f"isolation: bubblewrap, but there is no `bwrap` on PATH; {FIX}")
        if self._isolated and not seccomp.supported():
            raise ConfigError(f"isolation: bubblewrap has no seccomp filter for {os.uname().machine}; {FIX}")
        self._python = find_interpreter(config.python, as_nobody=self._drop)
        self._checker = compiled_checker(self._python.path)
        self._command = self._build_command()

    def probe(self) -> None:
        """Run one trivial program. Raises ConfigError with bubblewrap's own message when that fails."""
        verdict = self.run("def one():\n    return 1", ["assert one() == 1"])
        if verdict.status != "done" or verdict.passed != 1:
            raise ConfigError(
                f"isolation: {self._config.isolation} does not work here: {verdict.detail}. "
                "Inside a container it needs permission to create user namespaces; or " + FIX
            )

    def run(self, program: str, tests: Sequence[str], names: Sequence[str] = ()) -> Verdict:
        """`tests`: Python sources, each passes when it ends without an exception. `names`: what the program
        provides to them; empty: every name that is not a builtin."""
        nonce, total = secrets.token_hex(16), len(tests)
        if any("\0" in text for text in (program, *tests)):
            return Verdict(status="done", passed=0, total=total, detail="a NUL character in the program")
        source = program.encode("utf-8", "surrogatepass")
        rest = "\0".join([nonce, " ".join(names), *tests]).encode("utf-8", "surrogatepass")
        try:
            output, errors, late = self._execute(self._checker + self._header(source, rest) + source + rest)
        except OSError as error:
            return Verdict(status="error", passed=0, total=total, detail=f"cannot start: {error}")
        return read_verdict(output, errors, late, nonce, total)

    def _start(self) -> subprocess.Popen[bytes]:
        """A sandbox that waits for its input."""
        command = list(self._command)
        options: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if self._drop else {}
        with ExitStack() as stack:
            if self._isolated:
                filter_fd = seccomp.descriptor()
                stack.callback(os.close, filter_fd)
                command[1:1] = ["--seccomp", str(filter_fd)]
                options["pass_fds"] = (filter_fd,)
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
                cwd="/",
                **options,
            )

    def _execute(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """(the checker's output, bubblewrap's errors, whether the wall clock ended it)."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.poll() is not None:  # somebody ended it
            spare.communicate()
            spare = None
        with spare or self._start() as process:
            if self._ahead:
                with suppress(OSError):  # the next program tries again, and says so
                    self._spare = self._start()
            try:
                output, errors = process.communicate(data, timeout=self._config.wall_s)
                return output, errors, False
            except subprocess.TimeoutExpired:
                _kill(process, whole_session=not self._isolated)
                output, errors = process.communicate()
                return output, errors, True

    def _header(self, source: bytes, rest: bytes) -> bytes:
        c, mega = self._config, 2**20
        processes = c.processes if self._isolated else 0
        limits = (c.cpu_s, c.memory_mb * mega, processes, c.file_mb * mega, MESSAGE_BYTES)
        return (" ".join(map(str, (len(source), len(rest), *limits))) + "\n").encode()

    def _build_command(self) -> list[str]:
        size = len(self._checker)
        run = [self._python.path, "-I", "-S", "-B", "-c", START % (size, size)]
        if not self._isolated:
            return run
        binds = ["--ro-bind", "/usr", "/usr"]
        for name in ("lib", "lib32", "lib64", "bin", "sbin"):
            path = Path("/", name)
            if path.is_symlink():
                binds += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                binds += ["--ro-bind", str(path), str(path)]
        if not f"{self._python.prefix}/".startswith("/usr/"):
            binds += ["--ro-bind", self._python.prefix, self._python.prefix]
        for device in ("null", "zero", "random", "urandom"):
            binds += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        room = str(self._config.file_mb * 2**20)
        return [
            "bwrap",
            *("--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--new-session"),
            *("--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"),
            *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
            *("--setenv", "REDONE_SANDBOX", str(os.getpid())),  # whose it is, for whoever cleans up
            *binds,
            *("--size", room, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"),
            *run,
        ]


def read_verdict(output: bytes, errors: bytes, late: bool, nonce: str, total: int) -> Verdict:
    """The verdict in the checker's output. Only a sandbox that never got ready is an error."""
    lines = output.decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "ready":
        detail = errors.decode("utf-8", "replace").strip()[-300:] or "the sandbox did not start"
        return Verdict(status="error", passed=0, total=total, detail=detail)
    if late:
        return Verdict(status="timeout", passed=0, total=total, detail="wall clock")
    fields = lines[-1].split(" ", 3)
    if len(lines) != 2 or len(fields) < 3 or fields[0] != nonce or fields[2] != str(total):
        return Verdict(status="done", passed=0, total=total, detail="no verdict: the checker was ended")
    return Verdict(
        status="done", passed=int(fields[1]), total=total, detail=fields[3] if len(fields) > 3 else ""
    )


def _kill(process: subprocess.Popen[bytes], whole_session: bool) -> None:
    """bubblewrap's death ends its namespace; without one the session is all there is to end."""
    if whole_session:
        os.killpg(process.pid, 9)
    process.kill()


@lru_cache(maxsize=8)
def find_interpreter(wanted: str | None, as_nobody: bool) -> Interpreter:
    """The first usable of: `wanted`, the interpreter under this environment, the system's python3.

    Raises ConfigError when none can be read by the user that the sandbox runs as.
    """
    own = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")
    tried = [wanted] if wanted else [own, "/usr/bin/python3", "/usr/local/bin/python3"]
    for candidate in tried:
        path = Path(os.path.realpath(candidate))
        if path.is_file() and (not as_nobody or _readable_by_all(path)):
            asked = subprocess.run(
                [str(path), "-I", "-S", "-c", "import sys; print(sys.base_prefix)"],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.returncode == 0:
                return Interpreter(str(path), asked.stdout.strip())
    raise ConfigError(
        f"the sandbox found no interpreter that its unprivileged user may read (tried {', '.join(tried)}); "
        "set the reward's `python` to one outside a private home folder"
    )


@lru_cache(maxsize=8)
def compiled_checker(interpreter: str) -> bytes:
    """checker.py as a marshalled code object of `interpreter`."""
    source = (Path(__file__).parent / "checker.py").read_bytes()
    command = [interpreter, "-I", "-S", "-c", COMPILE]
    return subprocess.run(command, input=source, capture_output=True, check=True).stdout


def _readable_by_all(path: Path) -> bool:
    folders = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
    return folders and bool(path.stat().st_mode & stat.S_IXOTH) and bool(path.stat().st_mode & stat.S_IROTH)
