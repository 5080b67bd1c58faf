"""Relations: each rule is broken once, alone, and the message names key, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redone.config.check import check_config, read_model_config
from redone.config.load import config_from_dict, load_config
from redone.config.schema import Config
from redone.errors import ConfigError

ROOT = Path(__file__).parents[2]
DENSE: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}  # fmt: skip


def config(**changes: Any) -> Config:
    """A legal configuration with dotted keys changed (`__` stands for the dot)."""
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {
            "train": ["t"], "val": ["v"], "test": ["x"], "max_prompt_length": 100, "max_response_length": 20,
        },
        "rewards": {"default": {"family": "exact"}},
        "algorithm": {"train_batch_size": 16, "ppo_mini_batch_size": 8, "total_steps": 10},
        "cluster": {"gpus_per_node": 2},
    }  # fmt: skip
    for dotted, value in changes.items():
        *sections, leaf = dotted.split("__")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return config_from_dict(values)


def test_a_legal_configuration_passes_in_silence() -> None:
    assert check_config(config()) == ()
    assert check_config(config(), DENSE) == ()
    assert check_config(config(trainer__parallel={"expert": 2}), MOE) == ()
    ahead = config(rollout__max_staleness=1, algorithm__importance__level="token")
    assert check_config(ahead, DENSE) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__head": {"backend": "fused"}}, "trainer.head.backend=fused needs cluster.device=cuda"),
        ({"trainer__optim": {"cpu_offload": 0.5}}, "cpu_offload=0.5 needs cluster.device=cuda; set it to 0"),
        ({"trainer__optim": {"precision_aware": True}}, "precision_aware=true needs cluster.device=cuda"),
        (
            {"trainer__moe": {"dispatcher": "deepep"}},
            "dispatcher=deepep needs cluster.device=cuda; set it to",
        ),
        ({"trainer__fp8": "blockwise"}, "trainer.fp8=blockwise needs cluster.device=cuda; set it to off"),
        (
            {"trainer__fp8": "delayed", "cluster__device": "cuda", "model__dtype": "float32"},
            "trainer.fp8=delayed needs model.dtype=bfloat16",
        ),
        (
            {"trainer__moe": {"dispatcher": "hybridep", "router_fp32": False}, "cluster__device": "cuda"},
            "dispatcher=hybridep needs trainer.moe.router_fp32=true",
        ),
        (
            {"trainer__moe": {"dispatcher": "hybridep"}, "cluster__device": "cuda"},
            "dispatcher=hybridep needs trainer.parallel.expert or expert_tensor > 1",
        ),
        (
            {"algorithm__ppo_mini_batch_size": 32},
            "exceeds algorithm.train_batch_size=16",
        ),
        ({"algorithm__ppo_mini_batch_size": 7}, "algorithm.ppo_mini_batch_size=7; use 8"),
        ({"rollout__n": 1}, "rollout.n=1: a group's advantage"),
        ({"rollout__engine": {"block_size": 48}}, "block_size=48: vLLM on CPU takes multiples of 32"),
        ({"cluster__nodes": 2}, "cluster.nodes=2: weights.channel=shm"),
        (
            {"trainer__max_token_len_per_rank": 119},
            "exceeds trainer.max_token_len_per_rank=119; raise",
        ),
        ({"model__max_model_len": 119}, "= 120 exceeds model.max_model_len=119"),
        ({"data__max_prompt_length": 493}, "= 513 exceeds the model's max_position_embeddings=512"),
        (
            {"model__max_model_len": 513},
            "model.max_model_len=513 exceeds the model",
        ),
        ({"weights__canary__length": 121}, "weights.canary.length=121 exceeds the engine's limit 120"),
        ({"evaluate__sampling__max_tokens": 21}, "evaluate.sampling.max_tokens = 121 exceeds"),
        ({"data__task_max_response_length": {"t": 21}}, "task_max_response_length.t=21 exceeds"),
        ({"algorithm__overlong_buffer": {"enable": True, "len": 21}}, "overlong_buffer.len=21 exceeds"),
        (
            {"algorithm__loss": {"type": "sft"}, "algorithm__kl__coef": 0.1},
            "algorithm.kl.coef=0.1 has no",
        ),
        (
            {"algorithm__loss": {"type": "sft"}, "algorithm__entropy_coeff": 0.1},
            "entropy_coeff=0.1 has no",
        ),
        ({"algorithm__loss": {"type": "sft"}, "algorithm__importance__level": "token"}, "level=token has no"),
        (
            {"rollout__max_staleness": 2},
            "rollout.max_staleness=2 trains on tokens of older weights, which algorithm.importance.level=off "
            "leaves uncorrected; set algorithm.importance.level=token",
        ),
        (
            {"rollout__max_staleness": 1, "algorithm__loss": {"type": "sft"}},
            "rollout.max_staleness=1 with algorithm.loss.type=sft, which has no importance weights",
        ),
        (
            {
                "rollout__max_staleness": 1,
                "algorithm__importance__level": "token",
                "cluster__device": "cuda",
            },
            "rollout.max_staleness=1: engines and trainer use the same GPUs in turn",
        ),
        ({"trainer__optim__lr_warmup_steps": 10}, "trainer.optim.lr_warmup_steps=10 leaves no step"),
        ({"data__val": []}, "evaluate.keep_best=true needs validation files; set data.val"),
        ({"data__val": [], "evaluate__keep_best": False, "evaluate__every": 2}, "evaluate.every=2 needs"),
        ({"evaluate__early_stop__enable": True}, "set evaluate.every"),
        ({"data__test": [], "evaluate__baselines": ["constant"]}, "evaluate.baselines=['constant'] needs"),
        ({"evaluate__sampling__n": 4}, "evaluate.sampling.n=4 greedy samples would be equal"),
        ({"rewards": {}}, "rewards is empty"),
        ({"rewards__x": {"family": "custom", "path": "no.py"}}, "rewards.x.path=no.py: no such file"),
        ({"model__chat_template": "no.jinja"}, "model.chat_template=no.jinja: no such file"),
        (
            {"rollout__engine": {"in_process": True}, "rollout__tensor_model_parallel_size": 2},
            "rollout.tensor_model_parallel_size=2 with rollout.engine.in_process=true",
        ),
        (
            {"cluster__device": "cuda", "rollout__tensor_model_parallel_size": 3},
            "rollout.tensor_model_parallel_size=3 does not divide cluster.gpus_per_node=2",
        ),
        ({"cluster__device": "cuda", "rollout__replicas": 3}, "= 3 exceeds the 2 GPUs"),
        (
            {"trainer__parallel__tensor": 4, "cluster__gpus_per_node": 4},
            "does not divide key/value heads (2)",
        ),
        ({"trainer__parallel__pipeline": 3, "cluster__gpus_per_node": 3}, "does not divide layers (4)"),
        ({"trainer__parallel__tensor": 2, "cluster__gpus_per_node": 3}, "does not divide the world size 3"),
        ({"trainer__parallel__expert": 2}, "this model is dense"),
        (
            {"trainer__moe__routing_replay": "engine"},
            "trainer.moe.routing_replay=engine: the model is dense, nothing is routed; use auto",
        ),
    ],
)
def test_each_relation(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config(**changes), DENSE)
    text = str(caught.value)
    assert message in text
    assert text.startswith("configuration: ")
    if not text.splitlines()[0].endswith("problems"):
        assert "\n" not in text


def test_expert_choices_are_not_asked_of_an_engine_that_has_none() -> None:
    check_config(config(trainer__moe__routing_replay="engine", trainer__parallel__expert=2), MOE)
    with pytest.raises(ConfigError, match=r"routing_replay=engine: rollout.engine.type=sglang .* use vllm"):
        check_config(config(trainer__moe__routing_replay="engine", rollout__engine={"type": "sglang"}), None)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"expert": 3}, "trainer.parallel.expert=3 does not divide model.num_experts=8; use 1, 2, 4, 8"),
        ({"tensor": 2}, "expert=1 and expert_tensor=1"),
    ],
)
def test_mixture_of_experts_layouts(parallel: dict[str, int], message: str) -> None:
    world = 3 if parallel.get("expert") == 3 else 2
    with pytest.raises(ConfigError) as caught:
        check_config(config(trainer__parallel=parallel, cluster__gpus_per_node=world), MOE)
    assert message in str(caught.value)


def test_world_size_is_checked_without_a_model() -> None:
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        check_config(config(trainer__parallel__pipeline=2, cluster__gpus_per_node=3))
    with pytest.raises(ConfigError, match=r"tensor=1 \* trainer.parallel.context=2 .* the 3 ranks"):
        check_config(config(trainer__parallel__context=2, cluster__gpus_per_node=3))


def test_several_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config(rollout__n=1, algorithm__ppo_mini_batch_size=7, data__val=[]), DENSE)
    assert str(caught.value).splitlines()[0] == "configuration: 3 problems"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rollout__top_p": 0.9}, "rollout.top_p=0.9"),
        ({"rollout__top_k": 20}, "rollout.top_k=20"),
        ({"evaluate__every": 11}, "evaluate.every=11 exceeds algorithm.total_steps=10"),
        ({"algorithm__loss": {"type": "dr_grpo", "length": 20}}, "algorithm.adv_estimator=grpo"),
    ],
)
def test_warnings(changes: dict[str, Any], warning: str) -> None:
    (found,) = check_config(config(**changes), DENSE)
    assert warning in found


def test_unsupported_models() -> None:
    with pytest.raises(ConfigError, match=r"model\.path=m: model_type='gpt2' is not supported"):
        check_config(config(), {"model_type": "gpt2"})
    with pytest.raises(ConfigError, match=r"model\.path=m: config\.json lacks 'rms_norm_eps'"):
        check_config(config(), {k: v for k, v in DENSE.items() if k != "rms_norm_eps"})


def test_model_folder_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for message, prepare in (
        ("no such folder", lambda: None),
        ("it has no config.json", folder.mkdir),
        ("it has no weights", lambda: (folder / "config.json").write_text("{")),
        ("not valid JSON", lambda: (folder / "model.safetensors").touch()),
        ("does not hold a JSON object", lambda: (folder / "config.json").write_text("[]")),
    ):
        prepare()
        with pytest.raises(ConfigError, match=message) as caught:
            read_model_config(folder)
        assert "redone data prepare" in str(caught.value)
    (folder / "config.json").write_text(json.dumps(DENSE))
    assert read_model_config(folder) == DENSE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": {"moe": {"load_balancing": "expert_bias"}}}, ("expert_bias", "sigmoid", "aux_loss")),
        (
            {"checkpoint": {"asynchronous": True, "export_hf": False}},
            ("checkpoint.asynchronous=true", "checkpoint.export_hf=true"),
        ),
    ],
)
def test_what_the_trainer_cannot_do_is_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    base = {
        "model": {"path": "m"},
        "data": {"train": ["t"], "val": ["v"]},
        "rewards": {"default": {"family": "exact"}},
    }
    with pytest.raises(ConfigError) as caught:
        check_config(config_from_dict({**base, **change}))
    assert all(word in str(caught.value) for word in words)


def test_shipped_configurations_are_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    elsewhere = {"models", "suites"}  # see test_model_configs.py; what `redone eval` reads
    folders = {f: f.relative_to(ROOT / "configs").parts[0] for f in (ROOT / "configs").rglob("*.yaml")}
    files = sorted(f for f, folder in folders.items() if folder not in elsewhere)
    assert {file.name for file in files} >= {"rl.yaml", "smollm2.yaml"}
    for file in files:
        assert check_config(load_config(file)) == ()
    check_config(load_config(ROOT / "configs/tiny/rl.yaml"), MOE)
