"""Loading: what a user writes becomes a Config, or one message that says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from redone.config.docs import render
from redone.config.load import config_from_dict, dump_config, load_config
from redone.config.paths import known_keys
from redone.config.schema import SCHEMA_VERSION, DapoLoss, ExactReward, GspoLoss
from redone.config.verl_keys import RENAMED, explain
from redone.config.versions import check_run_folder
from redone.errors import ConfigError, RunFolderError

ROOT = Path(__file__).parents[2]
MINIMAL = """
model: {path: some/model}
data: {train: [train.parquet]}
rewards: {default: {family: exact}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_values_and_overrides_are_yaml(file: Path) -> None:
    cfg = load_config(
        file,
        [
            "trainer.optim.lr=3e-3",
            "rollout.n=8",
            "data.val=[a.parquet, b.parquet]",
            "model.system_prompt=null",
        ],
    )
    assert cfg.trainer.optim.lr == 3e-3 and cfg.rollout.n == 8
    assert cfg.data.val == ("a.parquet", "b.parquet") and cfg.model.system_prompt is None
    assert cfg.rewards["default"] == ExactReward() and cfg.model.path == "some/model"


def test_interpolation(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MINIMAL.replace("some/model", '"${oc.env:REDONE_ASSETS,assets}/m"')
    file.write_text(text + "run: {name: '${data.prompt_key}'}\n")
    monkeypatch.delenv("REDONE_ASSETS", raising=False)
    cfg = load_config(file, ["data.prompt_key=chat"])
    assert cfg.model.path == "assets/m" and cfg.run.name == "chat"
    monkeypatch.setenv("REDONE_ASSETS", "elsewhere")
    assert load_config(file, ["data.prompt_key=chat"]).model.path == "elsewhere/m"
    assert "run.name" in refused(file)  # the file does not set data.prompt_key


def test_base_files_are_merged_below(tmp_path: Path, file: Path) -> None:
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("base: [../run.yaml]\nrollout: {n: 4}\ndata: {val: [v.parquet]}\n")
    cfg = load_config(top)
    assert cfg.rollout.n == 4
    assert cfg.data.train == ("train.parquet",) and cfg.data.val == ("v.parquet",)
    top.write_text("base: [top.yaml]\n")
    assert "includes itself" in refused(top)
    top.write_text("base: [absent.yaml]\n")
    assert "absent.yaml" in refused(top) and "top.yaml" in refused(top)


def test_another_variant_replaces_the_numbers_of_the_one_below(file: Path) -> None:
    file.write_text(MINIMAL + "algorithm: {loss: {type: dapo, clip_ratio_c: 3.0, clip_ratio_high: 0.3}}\n")
    assert load_config(file).algorithm.loss == DapoLoss(clip_ratio_c=3.0, clip_ratio_high=0.3)
    assert load_config(file, ["algorithm.loss.clip_ratio_low=0.1"]).algorithm.loss == DapoLoss(
        clip_ratio_low=0.1, clip_ratio_c=3.0, clip_ratio_high=0.3
    )
    assert load_config(file, ["algorithm.loss.type=gspo"]).algorithm.loss == GspoLoss()


def test_loss_numbers_alone_keep_the_default_loss(file: Path) -> None:
    cfg = load_config(file, ["algorithm.loss.clip_ratio_high=0.4"])
    assert cfg.algorithm.loss == DapoLoss(clip_ratio_high=0.4)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.paralel.tensor", "trainer.parallel.tensor"),
        ("trainer.lr", "trainer.optim.lr"),
        ("algorithm.loss.clip_ratio_hihg", "algorithm.loss.clip_ratio_high"),
        ("rewards.default.ignorecase", "rewards.default.ignore_case"),
        ("rolout.n", "rollout.n"),
        ("weights.canary.tolerence", "weights.canary.tolerance"),
    ],
)
def test_unknown_key_names_the_nearest(file: Path, key: str, nearest: str) -> None:
    assert f"unknown key {key}; did you mean {nearest}?" in refused(file, f"{key}=1")


def test_key_of_another_variant(file: Path) -> None:
    message = refused(file, "algorithm.loss.type=gspo", "algorithm.loss.clip_ratio_c=3")
    assert "algorithm.loss.clip_ratio_c; it exists only for the variants dapo, grpo" in message


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("actor_rollout_ref.rollout.n", "rollout.n"),
        ("actor_rollout_ref.actor.clip_ratio_high", "algorithm.loss.clip_ratio_high"),
        ("data.train_files", "data.train"),
        ("trainer.total_epochs", "algorithm.total_steps"),
        ("+actor_rollout_ref.actor.megatron.expert_model_parallel_size", "trainer.parallel.expert"),
    ],
)
def test_verl_key_names_ours(file: Path, key: str, ours: str) -> None:
    assert f"unknown key {key.lstrip('+')}; this is verl's name; here it is {ours}" in refused(
        file, f"{key}=1"
    )


def test_verl_table_points_at_keys_that_exist() -> None:
    ours = set(known_keys())
    assert {target for target, _ in RENAMED.values()} <= ours
    assert not set(RENAMED) & ours
    assert len(RENAMED) >= 60


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("actor_rollout_ref.model.lora_rank", "LoRA is not supported"),
        ("model.lora.rank", "LoRA is not supported"),
        ("critic.optim.lr", "value models"),
        ("data.image_key", "multimodal inputs are not supported"),
        ("actor_rollout_ref.rollout.multi_turn.enable", "agentic multi-turn rollouts are not supported"),
    ],
)
def test_unsupported_feature_is_refused_by_name(file: Path, key: str, reason: str) -> None:
    assert reason in refused(file, f"{key}=1")
    assert "did you mean" not in refused(file, f"{key}=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.n=0", "rollout.n=0; it must be >= 1"),
        ("rollout.temperature=warm", "rollout.temperature='warm'; it must be a number"),
        ("trainer.optim.lr=.inf", "trainer.optim.lr=inf; it must be a finite number"),
        ("trainer.num_threads=1.5", "trainer.num_threads=1.5; it must be an integer"),
        ("data.shuffle=7", "data.shuffle=7; it must be true or false"),
        ("data.train=a.parquet", "data.train='a.parquet'; it must be a list"),
        ("cluster=3", "cluster=3; it must be a section"),
        ("model.dtype=float16", "model.dtype='float16'; use one of float32, bfloat16"),
        ("algorithm.loss.type=ppo", "algorithm.loss.type=ppo; use one of dapo, grpo"),
        ("rewards.default.family=umpire", "rewards.default.family=umpire; use one of exact, metric, sandbox"),
        ("rewards.other.scale=2", "rewards.other.family is required; use one of exact, metric, sandbox"),
        ("run.name='a b'", "run.name='a b'; it must match"),
        ("trainer.optim.min_lr=1", "trainer.optim: min_lr=1.0 exceeds lr=1e-06"),
        ("trainer.optim.betas=[0.9, 1.5]", "betas=[0.9, 1.5]; each must be"),
        ("algorithm.overlong_buffer.enable=true", "algorithm.overlong_buffer: enable=true with len=0"),
        ("run.schema_version=0", f"run.schema_version=0, but this redone reads {SCHEMA_VERSION}"),
    ],
)
def test_wrong_value_names_key_value_and_remedy(file: Path, override: str, message: str) -> None:
    assert message in refused(file, override)


def test_every_problem_is_listed_once(file: Path) -> None:
    message = refused(file, "rollout.n=0", "trainer.lr=1", "model.dtype=float16")
    lines = message.splitlines()
    assert lines[0].endswith("3 problems") and len(lines) == 4
    assert "pydantic" not in message and len(set(lines)) == 4


def test_a_section_name_that_is_also_a_tag_keeps_its_place() -> None:
    values = yaml.safe_load(MINIMAL)
    values["rewards"] = {"exact": {"family": "exact", "colour": "red"}}
    with pytest.raises(ConfigError, match=r"unknown key rewards\.exact\.colour"):
        config_from_dict(values)


def test_missing_keys_and_files(file: Path, tmp_path: Path) -> None:
    file.write_text("rewards: {default: {family: exact}}\nmodel: {}\ndata: {train: [a]}\n")
    assert "model.path is required: Local Hugging Face folder" in refused(file)
    assert "no configuration file" in refused(tmp_path / "absent.yaml")
    assert "must have the form a.b=value" in refused(file, "rollout.n")


@pytest.mark.parametrize(
    ("text", "line"), [("run: {name: a}\nmodel: [1\n", 3), ("run: 1\nrun: 2\n", 2), ("a: 1\n\tb: 2\n", 2)]
)
def test_bad_yaml_names_the_line(file: Path, text: str, line: int) -> None:
    file.write_text(text)
    assert f"{file}:{line}: not valid YAML" in refused(file)


def test_a_list_is_no_configuration(file: Path) -> None:
    file.write_text("- 1\n")
    assert "holds a list" in refused(file)


@pytest.mark.parametrize(
    "text", ["plain", "${x}", "a\\${x}", "\\\\${x} \\ ${y", "日本 #1: x", "1e3", "null", ""]
)
def test_dump_and_load_round_trip(file: Path, tmp_path: Path, text: str) -> None:
    values = yaml.safe_load(MINIMAL)
    values["model"]["system_prompt"] = text
    values["trainer"] = {"optim": {"lr": 1.5e-5, "eps": 1e-8}}
    values["algorithm"] = {"loss": {"type": "gspo"}}
    cfg = config_from_dict(values)
    dump_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert cfg.model.system_prompt == text
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_run_folder_of_another_version_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        check_run_folder(tmp_path)
    target = tmp_path / "config.yaml"
    dump_config(load_config(file), target)
    check_run_folder(tmp_path)
    text = target.read_text()
    for version, message in (
        (0, "migration 0 -> 1: none exists"),
        (99, "newer redone"),
        ("x", "must be a number"),
    ):
        target.write_text(text.replace(f"schema_version: {SCHEMA_VERSION}", f"schema_version: {version}"))
        with pytest.raises(RunFolderError, match=message):
            check_run_folder(tmp_path)


def test_documentation_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == render()


def test_documentation_holds_every_key_and_no_empty_meaning() -> None:
    text = render()
    for key in known_keys():
        assert f"`{key}`" in text
    assert "| |\n" not in text.split("## Coming from verl")[0]
    assert explain("trainer.nnodes") == "this is verl's name; here it is cluster.nodes"
