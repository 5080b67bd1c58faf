"""Relations between sections, and between the configuration and the model: everything that can be known to
be wrong
before a process is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from redone.config.load import format_problems
from redone.config.nodes import node_order, stage_config
from redone.config.pipeline import EvaluateNode, RlNode, SftNode, SoftLabelNode
from redone.config.schema import Config, CustomReward, DrGrpoLoss, SftLoss, VllmEngine
from redone.errors import ConfigError
from redone.layout import ModelShape, check_layout

Purpose = Literal["rl", "sft", "pipeline", "generate"]
PURPOSES: dict[str, Purpose] = {"rl": "rl", "sft": "sft", "evaluate": "generate", "soft_labels": "generate"}
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_PREPARE = "run `redone data prepare` or set model.path to a Hugging Face folder"


def read_model_config(path: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises ConfigError when the folder, the file or the weights are
    missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model.path={path}: no such folder; {_PREPARE}")
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path={path}: it has no config.json; {_PREPARE}")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise ConfigError(f"model.path={path}: it has no weights (*.safetensors); {_PREPARE}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); {_PREPARE}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} does not hold a JSON object; {_PREPARE}")
    return found


def check_config(
    cfg: Config, model_config: Mapping[str, Any] | None = None, purpose: Purpose | None = None
) -> tuple[str, ...]:
    """Returns warnings (legal, but probably not meant).

    `model_config` is config.json of the model; without it, relations to the model are not checked.
    `purpose`: what the configuration is used for; default: its kind (a pipeline's nodes are checked each).
    Raises ConfigError: one message that lists every problem.
    """
    wanted = purpose or cfg.kind
    problems = [*_lengths(cfg, model_config), *_files(cfg, wanted), *_engines(cfg)]
    problems += [*_trainer(cfg), *_layout(cfg, model_config)]
    if wanted == "rl":
        problems += [*_batch(cfg), *_algorithm(cfg), *_asynchronous(cfg), *_evaluation(cfg), *_profile(cfg)]
    elif wanted == "sft":
        problems += _sft(cfg)
    elif wanted == "pipeline":
        problems += _pipeline(cfg, model_config)
    if problems:
        raise ConfigError(format_problems("configuration", list(dict.fromkeys(problems))))
    return tuple(_warnings(cfg)) if wanted == "rl" else ()


def _sft(cfg: Config) -> Iterator[str]:
    s, budget = cfg.sft, cfg.trainer.max_token_len_per_rank
    if not s.train:
        yield "sft.train is empty; give files of conversations"
    if s.max_length > budget:
        yield (
            f"sft.max_length={s.max_length} exceeds trainer.max_token_len_per_rank={budget}: the longest "
            f"example would not fit a micro-batch; raise the latter to {s.max_length} or more"
        )


def _pipeline(cfg: Config, model_config: Mapping[str, Any] | None) -> Iterator[str]:
    if not cfg.pipeline.nodes:
        yield "pipeline.nodes is empty; name its nodes, or set run.job"
    try:
        order = node_order(cfg.pipeline)
    except ConfigError as error:
        yield str(error)
        return
    for name in order:
        node = cfg.pipeline.nodes[name]
        if not isinstance(node, RlNode | SftNode | EvaluateNode | SoftLabelNode):
            continue
        try:
            stage = stage_config(cfg, name)
            check_config(stage, model_config, PURPOSES[node.kind])
            gated = isinstance(node, RlNode) and node.gate.enable
            if gated and not (stage.data.val and stage.evaluate.before_train):
                yield (
                    f"pipeline.nodes.{name}.gate.enable=true compares validation before and after; set "
                    "data.val and evaluate.before_train=true"
                )
        except ConfigError as error:
            yield f"pipeline.nodes.{name}: {str(error).removeprefix('configuration: ')}"


def _batch(cfg: Config) -> Iterator[str]:
    a = cfg.algorithm
    if a.ppo_mini_batch_size > a.train_batch_size:
        yield (
            f"algorithm.ppo_mini_batch_size={a.ppo_mini_batch_size} exceeds "
            f"algorithm.train_batch_size={a.train_batch_size}; lower it to {a.train_batch_size} (one update "
            "per batch)"
        )
    elif a.train_batch_size % a.ppo_mini_batch_size:
        divisors = [d for d in range(1, a.train_batch_size + 1) if a.train_batch_size % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - a.ppo_mini_batch_size))
        yield (
            f"algorithm.train_batch_size={a.train_batch_size} is not a multiple of "
            f"algorithm.ppo_mini_batch_size={a.ppo_mini_batch_size}; use {nearest}"
        )
    if cfg.rollout.n < 2 and not isinstance(a.loss, SftLoss):
        yield f"rollout.n={cfg.rollout.n}: a group's advantage compares its responses; use 2 or more"


def _lengths(cfg: Config, model_config: Mapping[str, Any] | None) -> Iterator[str]:
    d, longest = cfg.data, cfg.data.max_prompt_length + cfg.data.max_response_length
    lengths = f"data.max_prompt_length + data.max_response_length = {longest}"
    budget = cfg.trainer.max_token_len_per_rank
    if longest > budget:
        yield f"{lengths} exceeds trainer.max_token_len_per_rank={budget}; raise it to {longest} or more"
    if forced := [n for n in cfg.rollout.forced_lengths if n > d.max_response_length]:
        yield (
            f"rollout.forced_lengths holds {max(forced)}, over data.max_response_length="
            f"{d.max_response_length}; raise the latter"
        )
    for task, length in d.task_max_response_length.items():
        if length > d.max_response_length:
            yield (
                f"data.task_max_response_length.{task}={length} exceeds data.max_response_length="
                f"{d.max_response_length}; raise the latter"
            )
    engine_limit = cfg.model.max_model_len
    if engine_limit is not None and longest > engine_limit:
        yield f"{lengths} exceeds model.max_model_len={engine_limit}; raise it or shorten the data"
    model_limit = (model_config or {}).get("max_position_embeddings")
    if model_limit is not None:
        if longest > model_limit:
            yield f"{lengths} exceeds the model's max_position_embeddings={model_limit}; shorten one of them"
        if engine_limit is not None and engine_limit > model_limit:
            yield (
                f"model.max_model_len={engine_limit} exceeds the model's "
                f"max_position_embeddings={model_limit}"
            )
    limit = engine_limit or longest
    if cfg.weights.canary.every and cfg.weights.canary.length > limit:
        yield (
            f"weights.canary.length={cfg.weights.canary.length} exceeds the engine's limit {limit}; lower it"
        )
    wanted = cfg.evaluate.sampling.max_tokens
    if wanted is not None and d.max_prompt_length + wanted > limit:
        yield (
            f"data.max_prompt_length + evaluate.sampling.max_tokens = {d.max_prompt_length + wanted} "
            "exceeds the "
            f"engine's limit {limit}; raise model.max_model_len or lower evaluate.sampling.max_tokens"
        )
    if (overlong := cfg.algorithm.overlong_buffer).enable and overlong.len > d.max_response_length:
        yield (
            f"algorithm.overlong_buffer.len={overlong.len} exceeds "
            f"data.max_response_length={d.max_response_length}; use a part of it"
        )


def _algorithm(cfg: Config) -> Iterator[str]:
    a = cfg.algorithm
    if isinstance(a.loss, SftLoss):
        for key, value, off in (
            ("algorithm.kl.coef", a.kl.coef, 0.0),
            ("algorithm.entropy_coeff", a.entropy_coeff, 0.0),
            ("algorithm.importance.level", a.importance.level, "off"),
        ):
            if value != off:
                yield f"{key}={value} has no meaning with algorithm.loss.type=sft; set it to {off}"
    o = cfg.trainer.optim
    if o.lr_warmup_steps >= a.total_steps and o.lr_warmup_steps > 0:
        yield (
            f"trainer.optim.lr_warmup_steps={o.lr_warmup_steps} leaves no step of algorithm.total_steps="
            f"{a.total_steps} at full rate; lower it"
        )


def _asynchronous(cfg: Config) -> Iterator[str]:
    if not (ahead := cfg.rollout.max_staleness):
        return
    key = f"rollout.max_staleness={ahead}"
    if isinstance(cfg.algorithm.loss, SftLoss):
        yield f"{key} with algorithm.loss.type=sft, which has no importance weights; set it to 0"
    elif cfg.algorithm.importance.level == "off":
        yield (
            f"{key} trains on tokens of older weights, which algorithm.importance.level=off leaves "
            "uncorrected; set algorithm.importance.level=token, or rollout.max_staleness=0"
        )
    if cfg.shared_gpus:
        yield (
            f"{key}: engines and trainer use the same GPUs in turn, so neither can go on while the other "
            "works; give engines GPUs of their own (rollout.gpus_per_node), or set rollout.max_staleness=0"
        )


def _evaluation(cfg: Config) -> Iterator[str]:
    e = cfg.evaluate
    if e.keep_best and not cfg.data.val:
        yield "evaluate.keep_best=true needs validation files; set data.val, or evaluate.keep_best=false"
    if e.every and not cfg.data.val:
        yield f"evaluate.every={e.every} needs validation files; set data.val, or evaluate.every=0"
    if e.early_stop.enable and not e.every:
        yield "evaluate.early_stop.enable=true needs validations during training; set evaluate.every"
    if e.baselines and not cfg.data.test:
        yield f"evaluate.baselines={list(e.baselines)} needs held-out files; set data.test"
    if e.sampling.n > 1 and e.sampling.temperature == 0:
        yield f"evaluate.sampling.n={e.sampling.n} greedy samples would be equal; use n=1 or a temperature"


def _files(cfg: Config, purpose: Purpose) -> Iterator[str]:
    if purpose == "rl" and not cfg.data.train:
        yield "data.train is empty; give training files"
    if not cfg.rewards and purpose != "sft":
        yield "rewards is empty; add one per task, or `default: {family: exact}`"
    for name, reward in cfg.rewards.items():
        if isinstance(reward, CustomReward) and not Path(reward.path).is_file():
            yield (
                f"rewards.{name}.path={reward.path}: no such file (paths are relative to the working "
                "directory)"
            )
    template = cfg.model.chat_template
    if template is not None and not Path(template).is_file():
        yield f"model.chat_template={template}: no such file; give a Jinja file"


def _engines(cfg: Config) -> Iterator[str]:
    r, c = cfg.rollout, cfg.cluster
    tensor = r.tensor_model_parallel_size
    if r.engine.python is not None and not Path(r.engine.python).is_file():
        yield f"rollout.engine.python={r.engine.python}: no such interpreter; give /path/venv/bin/python"
    if isinstance(r.engine, VllmEngine) and r.engine.in_process and tensor > 1:
        yield (
            f"rollout.tensor_model_parallel_size={tensor} with rollout.engine.in_process=true; use 1, or "
            "false"
        )
    if cfg.trainer.moe.routing_replay == "engine" and not isinstance(r.engine, VllmEngine):
        yield (
            f"trainer.moe.routing_replay=engine: rollout.engine.type={r.engine.type} returns no expert "
            "choices; use vllm, or trainer.moe.routing_replay=auto"
        )
    if cfg.trainer.offload and r.max_staleness:
        yield (
            f"trainer.offload=true with rollout.max_staleness={r.max_staleness}: trainer and engines work at "
            "the same time and cannot share memory in turn; use offload=false, or max_staleness=0"
        )
    if cfg.weights.channel == "ipc" and not cfg.shared_gpus:
        why = "there is no CUDA" if c.device != "cuda" else f"rollout.gpus_per_node={r.gpus_per_node}"
        yield (
            f"weights.channel=ipc needs engines and trainer on the same GPUs ({why}); use "
            f"{'shm' if c.device != 'cuda' else 'collective'}"
        )
    if c.nodes > 1 and cfg.weights.channel == "shm":
        yield (
            f"cluster.nodes={c.nodes}: weights.channel=shm reaches one node only; use "
            "weights.channel=collective, weights.channel=file with weights.dir=FOLDER on a file system that "
            "all nodes share, or cluster.nodes=1"
        )
    if c.device != "cuda":
        if cfg.trainer.head.backend == "fused":
            yield "trainer.head.backend=fused needs cluster.device=cuda; use auto or chunked"
        block = r.engine.block_size if isinstance(r.engine, VllmEngine) else None
        if block is not None and block % 32:
            yield (f"rollout.engine.block_size={block}: vLLM on CPU takes multiples of 32; use 32")
        if r.gpus_per_node:
            yield f"rollout.gpus_per_node={r.gpus_per_node} needs cluster.device=cuda; set it to 0"
        return
    key = "rollout.gpus_per_node" if r.gpus_per_node else "cluster.gpus_per_node"
    per_node = r.gpus_per_node or c.gpus_per_node
    if per_node % tensor:
        yield (
            f"rollout.tensor_model_parallel_size={tensor} does not divide {key}={per_node}; an engine "
            "lives on one node"
        )
    if r.replicas * tensor > c.nodes * per_node:
        yield (
            f"rollout.replicas * rollout.tensor_model_parallel_size = {r.replicas * tensor} exceeds the "
            f"{c.nodes * per_node} GPUs of cluster.nodes * {key}; lower one of them"
        )
    if cfg.trainer.offload and r.gpus_per_node:
        yield (
            f"trainer.offload=true with {key}={per_node}: the engines have GPUs of their own, nothing is "
            "shared; set one of them to its default"
        )


def _profile(cfg: Config) -> Iterator[str]:
    profile, world = cfg.record.profile, cfg.cluster.world_size
    if profile.tool == "nsys" and cfg.cluster.device != "cuda":
        yield "record.profile.tool=nsys needs cluster.device=cuda; use torch"
    if profile.tool != "off" and (absent := [r for r in profile.ranks if r >= world]):
        yield f"record.profile.ranks holds {max(absent)}; the trainer has ranks 0 .. {world - 1}"


def _trainer(cfg: Config) -> Iterator[str]:
    if cfg.trainer.moe.load_balancing == "expert_bias":
        yield (
            "trainer.moe.load_balancing=expert_bias needs a sigmoid router; the supported models route by "
            "softmax, and the engines would not apply the bias; use aux_loss or none"
        )
    if cfg.checkpoint.asynchronous and not cfg.checkpoint.export_hf:
        yield (
            "checkpoint.asynchronous=true with checkpoint.export_hf=false: the run could end before its last "
            "checkpoint is written; the export waits for it: set checkpoint.export_hf=true"
        )
    if cfg.weights.quantization != "none":
        yield from _quantization(cfg)
    yield from _kernels(cfg)


def _quantization(cfg: Config) -> Iterator[str]:
    key = f"weights.quantization={cfg.weights.quantization}"
    if cfg.cluster.device != "cuda":
        yield f"{key} needs cluster.device=cuda; set it to none"
    if not isinstance(cfg.rollout.engine, VllmEngine):
        yield f"{key} with rollout.engine.type={cfg.rollout.engine.type}; use vllm, or quantization none"
    if cfg.model.dtype != "bfloat16":
        yield f"{key} needs model.dtype=bfloat16 for all that stays unquantised; it is {cfg.model.dtype}"


def _kernels(cfg: Config) -> Iterator[str]:
    """What needs CUDA, and what its kernels need."""
    optim, moe, parallel = cfg.trainer.optim, cfg.trainer.moe, cfg.trainer.parallel
    off = {
        f"trainer.optim.cpu_offload={optim.cpu_offload}": ("0", optim.cpu_offload > 0),
        "trainer.optim.precision_aware=true": ("false", optim.precision_aware),
        f"trainer.moe.dispatcher={moe.dispatcher}": ("alltoall", moe.dispatcher != "alltoall"),
        f"trainer.fp8={cfg.trainer.fp8}": ("off", cfg.trainer.fp8 != "off"),
    }
    if cfg.cluster.device == "cpu":
        for key, (remedy, used) in off.items():
            if used:
                yield f"{key} needs cluster.device=cuda; set it to {remedy}"
    if moe.dispatcher != "alltoall":
        if not moe.router_fp32:
            yield f"trainer.moe.dispatcher={moe.dispatcher} needs trainer.moe.router_fp32=true"
        if parallel.expert * parallel.expert_tensor == 1:
            yield (
                f"trainer.moe.dispatcher={moe.dispatcher} needs trainer.parallel.expert or expert_tensor > 1;"
                " set dispatcher to alltoall"
            )
    if cfg.trainer.fp8 != "off" and cfg.model.dtype != "bfloat16":
        yield f"trainer.fp8={cfg.trainer.fp8} needs model.dtype=bfloat16, which is {cfg.model.dtype}"


def _layout(cfg: Config, model_config: Mapping[str, Any] | None) -> Iterator[str]:
    p, world = cfg.trainer.parallel, cfg.cluster.world_size
    if model_config is not None:
        try:
            shape = ModelShape.from_hf(model_config)
        except (KeyError, ValueError) as error:
            reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error)
            yield f"model.path={cfg.model.path}: {reason}"
            return
        yield from check_layout(p, world, shape)
        if cfg.trainer.moe.routing_replay == "engine" and not shape.num_experts:
            yield "trainer.moe.routing_replay=engine: the model is dense, nothing is routed; use auto"
    elif world % (p.tensor * p.context * p.pipeline):
        context = f" * trainer.parallel.context={p.context}" if p.context > 1 else ""
        yield (
            f"trainer.parallel.tensor={p.tensor}{context} * trainer.parallel.pipeline={p.pipeline} does not "
            f"divide the {world} ranks of cluster.nodes * cluster.gpus_per_node"
        )


def _warnings(cfg: Config) -> Iterator[str]:
    a, r, e = cfg.algorithm, cfg.rollout, cfg.evaluate
    if r.top_p < 1 or r.top_k > 0:
        yield (
            f"rollout.top_p={r.top_p}, rollout.top_k={r.top_k}: the engine samples from a cut distribution "
            "that the "
            "trainer does not model, so importance weights and the mismatch metrics are biased; use "
            "top_p=1, top_k=-1"
        )
    if isinstance(a.loss, DrGrpoLoss) and a.adv_estimator != "dr_grpo":
        yield (
            "algorithm.loss.type=dr_grpo with algorithm.adv_estimator=grpo: Dr. GRPO uses "
            "adv_estimator=dr_grpo"
        )
    if e.every > a.total_steps:
        yield (
            f"evaluate.every={e.every} exceeds algorithm.total_steps={a.total_steps}: validation only at "
            "the end"
        )
