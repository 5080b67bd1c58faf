"""What `redone eval` reads and checks before anything is started or written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redone.config.check import read_model_config
from redone.config.load import build_config
from redone.config.schema import Config, RewardConfig, VllmEngine
from redone.data.chat import Chat, load_chat
from redone.errors import ConfigError
from redone.evaluate.answer import Asking, Measures
from redone.evaluate.embedding import Embedder
from redone.evaluate.items import RUN, EvalItem, held_out, run_suite, suite_items
from redone.evaluate.measures import make_measure
from redone.evaluate.records import FORMAT, fingerprint
from redone.evaluate.suite import Suite, load_suite, reward_configs

KV_CACHE_MB = 512  # on a CPU, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is read and checked before anything is started or written."""

    cfg: Config
    chat: Chat
    suites: dict[str, Suite]
    items: dict[str, list[EvalItem]]
    measures: dict[str, Measures]
    asking: Asking
    settings: dict[str, Any]


def prepare(args: argparse.Namespace) -> Job:
    """Read and check everything."""
    if args.model is None or not args.suite:
        raise ConfigError(
            "redone eval needs --model PATH and --suite NAME; `redone eval --list` names the suites"
        )
    _check_numbers(args)
    wanted = [name.strip() for name in args.suite.split(",") if name.strip()]
    loaded = {name: load_suite(name) for name in wanted if not name.startswith(RUN)}
    runs = {name: held_out(name) for name in wanted if name.startswith(RUN)}
    data = _data_folder(args.data) if loaded else Path()
    facts = _model_facts(args.model)
    cfg = _engine_config(args.model, facts, args.words)
    chat = load_chat(cfg.model)
    suites: dict[str, Suite] = {}
    items: dict[str, list[EvalItem]] = {}
    for name in wanted:
        if name in loaded:
            suite, found = loaded[name], suite_items(loaded[name], data, chat, args.limit)
        else:
            suite, found = run_suite(*runs[name], chat, args.limit)
        if suite.name in suites:
            raise ConfigError(f"--suite {args.suite}: two suites are called {suite.name}; rename one")
        suites[suite.name], items[suite.name] = suite, found
    everything = [item for found in items.values() for item in found]
    cfg = _with_lengths(cfg, facts, everything, args.max_tokens)
    embedder = Embedder(args.embedding) if args.embedding else None
    measures: dict[str, Measures] = {
        name: {
            part.id: {
                metric: make_measure(spec, args.n, embedder.cosine if embedder else None)
                for metric, spec in part.metrics.items()
            }
            for part in suite.parts
        }
        for name, suite in suites.items()
    }
    assert cfg.model.max_model_len is not None
    asking = Asking(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop_token_ids=chat.stop_token_ids,
        limit=cfg.model.max_model_len,
    )
    settings = _settings(args, cfg, suites)
    return Job(
        cfg=cfg, chat=chat, suites=suites, items=items, measures=measures, asking=asking, settings=settings
    )


def rewards_of(job: Job) -> dict[str, RewardConfig]:
    """Every reward that the suites need, by the pool's keys."""
    return {key: config for suite in job.suites.values() for key, config in reward_configs(suite).items()}


def _settings(args: argparse.Namespace, cfg: Config, suites: Mapping[str, Suite]) -> dict[str, Any]:
    """What a record depends on: records made under other settings are refused."""
    model = {"path": str(args.model.resolve()), "fingerprint": fingerprint(args.model)}
    template = cfg.model.chat_template
    return {
        "format": FORMAT,
        "model": model,
        "dtype": cfg.model.dtype,
        "chat_template": Path(template).read_text(encoding="utf-8") if template else None,
        "system_prompt": cfg.model.system_prompt,
        "enable_thinking": cfg.model.enable_thinking,
        "n": args.n,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
        "embedding": fingerprint(args.embedding) if args.embedding else None,
        "suites": {name: suite.model_dump(mode="json") for name, suite in suites.items()},
    }


def _model_facts(model: Path) -> dict[str, Any]:
    """config.json. Raises ConfigError when the folder cannot be a model."""
    try:
        return read_model_config(model)
    except ConfigError as error:
        said = str(error).replace("model.path=", "--model ").replace("set model.path to", "give")
        raise ConfigError(said) from None


def _data_folder(given: Path | None) -> Path:
    value = given or os.environ.get("REDONE_DATA")
    if not value:
        raise ConfigError("redone eval needs the folder of data sets: --data FOLDER, or REDONE_DATA")
    if not Path(value).is_dir():
        raise ConfigError(f"--data {value}: no such folder")
    return Path(value)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value, low in (
        ("--n", args.n, 1), ("--limit", args.limit, 1), ("--max-tokens", args.max_tokens, 1),
        ("--temperature", args.temperature, 0), ("--seed", args.seed, 0),
    ):  # fmt: skip
        if value is not None and value < low:
            raise ConfigError(f"{name} {value}: it must be at least {low}")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p}: it must lie in (0, 1]")
    if args.n > 1 and args.temperature == 0:
        raise ConfigError(f"--n {args.n}: greedy answers would be equal; give --temperature, e.g. 0.7")


def _engine_config(model: Path, facts: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The engines' part of a run's configuration; what only trainers read is never looked at."""
    import torch

    cuda = torch.cuda.is_available()
    stored = facts.get("dtype") or facts.get("torch_dtype")
    tree = {
        "run": {"name": "eval"},
        "model": {"path": str(model), "dtype": "bfloat16" if cuda and stored != "float32" else "float32"},
        "data": {"train": ["unused"]},
        "rewards": {"default": {"family": "exact"}},
        "cluster": {"device": "cuda" if cuda else "cpu"},
    }
    cfg = build_config(tree, overrides, "redone eval")
    if cfg.model.path != str(model):
        raise ConfigError(f"model.path={cfg.model.path}: the model is named by --model")
    if cfg.cluster.device == "cuda":
        gpus = -(-cfg.rollout.replicas // cfg.cluster.nodes) * cfg.rollout.tensor_model_parallel_size
        gpus = max(gpus, cfg.cluster.gpus_per_node)
        cfg = cfg.model_copy(update={"cluster": cfg.cluster.model_copy(update={"gpus_per_node": gpus})})
    return cfg


def _with_lengths(
    cfg: Config, facts: Mapping[str, Any], items: Sequence[EvalItem], max_tokens: int | None
) -> Config:
    """The context that the items need, within the model's limit, and on a CPU room for two such sequences."""
    wanted = max(len(item.prompt.token_ids) + (max_tokens or item.part.max_tokens) for item in items)
    positions = int(facts.get("max_position_embeddings") or wanted)
    limit = cfg.model.max_model_len or min(wanted, positions)
    if limit > positions:
        raise ConfigError(
            f"model.max_model_len={limit} exceeds the model's max_position_embeddings={positions}"
        )
    engine = cfg.rollout.engine
    if cfg.cluster.device == "cpu" and isinstance(engine, VllmEngine) and engine.kv_cache_mb is None:
        heads = int(facts.get("num_key_value_heads") or facts.get("num_attention_heads") or 1)
        size = facts.get("head_dim") or int(facts.get("hidden_size", 0)) // int(
            facts.get("num_attention_heads", 1)
        )
        per_token = 2 * int(facts.get("num_hidden_layers", 1)) * heads * int(size) * 4
        room = max(KV_CACHE_MB, -(-2 * limit * per_token // 2**20))
        engine = engine.model_copy(update={"kv_cache_mb": room})
    return cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update={"max_model_len": limit}),
            "rollout": cfg.rollout.model_copy(update={"engine": engine}),
        }
    )
