"""site.env and the job script: what is refused, what is rendered, and that bash takes it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from redone_launcher.site import Site, read_site
from redone_launcher.slurm import gpus_in
from redone_launcher.submit import TEMPLATES, render

from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import ConfigError

EXAMPLE = TEMPLATES / "site.env.example"


def config(**sections: object) -> Config:
    return config_from_dict(
        {
            "model": {"path": "m"},
            "data": {"train": ["t"]},
            "rewards": {"default": {"family": "exact"}},
            **sections,
        }
    )


def site_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.env"
    path.write_text(text)
    return path


def test_the_example_is_the_defaults_and_names_every_key() -> None:
    assert read_site(EXAMPLE) == Site()
    text = EXAMPLE.read_text()
    assert [k for k in Site.model_fields if f"REDONE_{k.upper()}=" not in text] == []


def test_values_may_use_the_shell(tmp_path: Path) -> None:
    site = read_site(
        site_file(tmp_path, 'X=/big\nREDONE_SHARED="$X/$((1 + 1))"\nexport REDONE_TIME=1-00:00:00\n')
    )
    assert site.shared == "/big/2" and site.time == "1-00:00:00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("REDONE_PARTITON=x\n", "unknown key REDONE_PARTITON; did you mean REDONE_PARTITION?"),
        ("REDONE_SIGNAL_LEAD_S=soon\n", "REDONE_SIGNAL_LEAD_S='soon'"),
        ("REDONE_TIME=tomorrow\n", "REDONE_TIME='tomorrow'"),
        ("REDONE_LAUNCH=docker\n", "REDONE_LAUNCH='docker'"),
        ("REDONE_LAUNCH=pyxis\n", "needs REDONE_IMAGE"),
        ("if\n", "bash cannot source it"),
        (f"REDONE_SCRATCH=/{'x' * 60}\n", "REDONE_SCRATCH="),
    ],
)
def test_a_wrong_site_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_site(site_file(tmp_path, text))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_site_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no\.env: No such file or directory; copy slurm/site\.env\.example"
    ):
        read_site(tmp_path / "no.env")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_site(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_site(tmp_path / "binary")


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ("venv", '"$PYTHON" -m redone_launcher.main "$@" </dev/null'),
        ("pyxis", '--container-image="$REDONE_IMAGE" --container-mounts="$MOUNTS"'),
        ("apptainer", "apptainer exec --bind"),
    ],
)
def test_every_variant_is_a_script_that_bash_reads(tmp_path: Path, launch: str, expected: str) -> None:
    site = Site.model_validate(
        {"launch": launch, "image": "i.sqsh", "partition": "gpu", "sbatch_args": "--a=b -C x"}
    )
    cfg = config(
        cluster={"nodes": 4, "device": "cuda", "gpus_per_node": 8},
        weights={"channel": "file", "dir": str(tmp_path / "w")},
    )
    script = render(cfg, site, tmp_path / "it's here", tmp_path)
    assert expected in script and "{{" not in script and "{%" not in script
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --signal=B:USR1@600\n" in script and "#SBATCH -C\n" in script
    (tmp_path / "job.sh").write_text(script)
    done = subprocess.run(
        ["bash", "-n", str(tmp_path / "job.sh")], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        ["bash", "-c", f"{next(x for x in script.splitlines() if x.startswith('RUN='))}; echo \"$RUN\""],
        capture_output=True, text=True, timeout=20,
    ).stdout  # fmt: skip
    assert said.strip() == str(tmp_path / "it's here")


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a:2,gpu:b:1,shard:4", 3),
        ("gpu:h100_80:4", 4),
    ],
)
def test_gpus_in_gres(gres: str, count: int) -> None:
    assert gpus_in(gres) == count
