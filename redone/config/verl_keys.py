"""What a verl key is called here, and which features are refused by name."""

from __future__ import annotations

_A = "actor_rollout_ref.actor."
_M = "actor_rollout_ref.actor.megatron."
_R = "actor_rollout_ref.rollout."

# verl key -> (our key, what else changes)
RENAMED: dict[str, tuple[str, str]] = {
    "actor_rollout_ref.model.path": ("model.path", ""),
    "actor_rollout_ref.model.trust_remote_code": ("model.trust_remote_code", ""),
    "actor_rollout_ref.model.custom_chat_template": (
        "model.chat_template",
        "a file, not the template's text",
    ),
    "actor_rollout_ref.model.enable_gradient_checkpointing": ("trainer.recompute", "`full` or `none`"),
    "actor_rollout_ref.model.use_fused_kernels": ("trainer.head.backend", ""),
    f"{_A}optim.lr": ("trainer.optim.lr", ""),
    f"{_A}optim.min_lr": ("trainer.optim.min_lr", ""),
    f"{_A}optim.lr_warmup_steps": ("trainer.optim.lr_warmup_steps", "in rollout steps; 0 is off, not -1"),
    f"{_A}optim.lr_warmup_steps_ratio": (
        "trainer.optim.lr_warmup_steps",
        "a number of rollout steps, not a share",
    ),
    f"{_A}optim.lr_decay_style": ("trainer.optim.lr_decay_style", ""),
    f"{_A}optim.lr_scheduler_type": ("trainer.optim.lr_decay_style", ""),
    f"{_A}optim.warmup_style": ("trainer.optim.lr_decay_style", ""),
    f"{_A}optim.weight_decay": ("trainer.optim.weight_decay", ""),
    f"{_A}optim.clip_grad": ("trainer.optim.clip_grad", ""),
    f"{_A}optim.betas": ("trainer.optim.betas", ""),
    f"{_A}optim.total_training_steps": ("algorithm.total_steps", ""),
    f"{_A}grad_clip": ("trainer.optim.clip_grad", ""),
    f"{_M}tensor_model_parallel_size": ("trainer.parallel.tensor", ""),
    f"{_M}pipeline_model_parallel_size": ("trainer.parallel.pipeline", ""),
    f"{_M}virtual_pipeline_model_parallel_size": ("trainer.parallel.virtual_pipeline", ""),
    f"{_M}context_parallel_size": ("trainer.parallel.context", ""),
    f"{_M}expert_model_parallel_size": ("trainer.parallel.expert", ""),
    f"{_M}expert_tensor_parallel_size": ("trainer.parallel.expert_tensor", ""),
    f"{_M}seed": ("trainer.determinism_seed", ""),
    f"{_M}dtype": ("model.dtype", "one dtype for trainer and engine"),
    f"{_M}override_transformer_config.recompute_granularity": (
        "trainer.recompute",
        "`none`, `selective` or `full`",
    ),
    f"{_A}ppo_mini_batch_size": ("algorithm.ppo_mini_batch_size", "in prompts"),
    f"{_A}ppo_micro_batch_size": ("trainer.max_token_len_per_rank", "micro-batches are packed by tokens"),
    f"{_A}ppo_micro_batch_size_per_gpu": (
        "trainer.max_token_len_per_rank",
        "micro-batches are packed by tokens",
    ),
    f"{_A}ppo_max_token_len_per_gpu": ("trainer.max_token_len_per_rank", ""),
    f"{_A}use_dynamic_bsz": ("trainer.max_token_len_per_rank", "packing by tokens is always on"),
    f"{_A}ppo_epochs": ("algorithm.ppo_epochs", ""),
    f"{_A}clip_ratio": ("algorithm.loss.clip_ratio_low", "and algorithm.loss.clip_ratio_high"),
    f"{_A}clip_ratio_low": ("algorithm.loss.clip_ratio_low", ""),
    f"{_A}clip_ratio_high": ("algorithm.loss.clip_ratio_high", ""),
    f"{_A}clip_ratio_c": ("algorithm.loss.clip_ratio_c", "off when null"),
    f"{_A}loss_agg_mode": (
        "algorithm.loss.type",
        "token-mean: dapo; seq-mean-token-mean: grpo; seq-mean-token-sum-norm: dr_grpo",
    ),
    f"{_A}policy_loss.loss_mode": ("algorithm.loss.type", "vanilla: dapo or grpo; gspo: gspo; cispo: cispo"),
    f"{_A}entropy_coeff": ("algorithm.entropy_coeff", ""),
    f"{_A}use_kl_loss": ("algorithm.kl.coef", "0 is off"),
    f"{_A}kl_loss_coef": ("algorithm.kl.coef", ""),
    f"{_A}kl_loss_type": ("algorithm.kl.estimator", "kl: k1; mse: k2; low_var_kl: k3"),
    f"{_A}tis_imp_ratio_cap": ("algorithm.importance.cap", "with algorithm.importance.level=token"),
    f"{_R}name": ("rollout.engine.type", ""),
    f"{_R}n": ("rollout.n", ""),
    f"{_R}over_sample_rate": (
        "rollout.over_sampling",
        "a share of the prompts that are needed, asked for beyond them",
    ),
    "async_training.staleness_threshold": (
        "rollout.max_staleness",
        "weight versions, not a share",
    ),
    f"{_R}temperature": ("rollout.temperature", ""),
    f"{_R}top_p": ("rollout.top_p", ""),
    f"{_R}top_k": ("rollout.top_k", ""),
    f"{_R}prompt_length": ("data.max_prompt_length", ""),
    f"{_R}response_length": ("data.max_response_length", ""),
    f"{_R}dtype": ("model.dtype", "one dtype for trainer and engine"),
    f"{_R}gpu_memory_utilization": ("rollout.gpu_memory_utilization", ""),
    f"{_R}enforce_eager": ("rollout.engine.enforce_eager", ""),
    f"{_R}tensor_model_parallel_size": ("rollout.tensor_model_parallel_size", ""),
    f"{_R}data_parallel_size": ("rollout.replicas", ""),
    f"{_R}max_num_seqs": ("rollout.engine.max_num_seqs", ""),
    f"{_R}max_model_len": ("model.max_model_len", ""),
    f"{_R}update_weights_bucket_megabytes": ("weights.bucket_bytes", "in bytes"),
    f"{_R}val_kwargs.temperature": ("evaluate.sampling.temperature", "0 is greedy"),
    f"{_R}val_kwargs.do_sample": ("evaluate.sampling.temperature", "0 is greedy"),
    f"{_R}val_kwargs.top_p": ("evaluate.sampling.top_p", ""),
    f"{_R}val_kwargs.n": ("evaluate.sampling.n", ""),
    "data.train_files": ("data.train", ""),
    "data.val_files": ("data.val", ""),
    "data.train_batch_size": ("algorithm.train_batch_size", ""),
    "data.gen_batch_size": ("algorithm.train_batch_size", "refills are drawn as needed"),
    "data.seed": ("run.seed", ""),
    "data.val_max_samples": ("evaluate.max_items", ""),
    "data.filter_overlong_prompts": ("data.truncation", "`drop` drops and counts them"),
    "data.trust_remote_code": ("model.trust_remote_code", ""),
    "data.apply_chat_template_kwargs.enable_thinking": ("model.enable_thinking", ""),
    "data.reward_fn_key": ("rewards.<task>.family", "rewards are chosen by the data's task (data_source)"),
    "custom_reward_function.path": ("rewards.<task>.path", "with family=custom"),
    "custom_reward_function.name": ("rewards.<task>.name", "with family=custom"),
    "reward.custom_reward_function.path": ("rewards.<task>.path", "with family=custom"),
    "reward.custom_reward_function.name": ("rewards.<task>.name", "with family=custom"),
    "reward_model.reward_manager": ("rewards.<task>.family", ""),
    "reward_model.overlong_buffer.enable": ("algorithm.overlong_buffer.enable", ""),
    "reward_model.overlong_buffer.len": ("algorithm.overlong_buffer.len", ""),
    "reward_model.overlong_buffer.penalty_factor": ("algorithm.overlong_buffer.penalty_factor", ""),
    "algorithm.norm_adv_by_std_in_grpo": ("algorithm.adv_estimator", "true: grpo; false: dr_grpo"),
    "algorithm.rollout_correction.rollout_is": ("algorithm.importance.level", "off, token or sequence"),
    "algorithm.rollout_correction.rollout_is_threshold": ("algorithm.importance.cap", ""),
    "algorithm.use_kl_in_reward": ("algorithm.kl.coef", "the KL term is in the loss, never in the reward"),
    "algorithm.kl_ctrl.kl_coef": ("algorithm.kl.coef", "the KL term is in the loss, never in the reward"),
    "trainer.total_epochs": ("algorithm.total_steps", "in rollout steps, not epochs"),
    "trainer.total_training_steps": ("algorithm.total_steps", ""),
    "trainer.project_name": ("record.project", ""),
    "trainer.experiment_name": ("run.name", ""),
    "trainer.logger": ("record.loggers", ""),
    "trainer.log_val_generations": ("record.samples_per_step", ""),
    "trainer.nnodes": ("cluster.nodes", ""),
    "trainer.n_gpus_per_node": ("cluster.gpus_per_node", ""),
    "trainer.device": ("cluster.device", ""),
    "trainer.save_freq": ("checkpoint.every", "0 is only at the end, not -1"),
    "trainer.test_freq": ("evaluate.every", "0 is only at the end, not -1"),
    "trainer.val_before_train": ("evaluate.before_train", ""),
    "trainer.default_local_dir": ("run.dir", ""),
    "trainer.max_actor_ckpt_to_keep": ("checkpoint.keep", ""),
}

# verl key or prefix -> why it has no counterpart
NO_COUNTERPART: dict[str, str] = {
    "trainer.resume_mode": "a stopped run is resumed with `redone run CONFIG --resume`; remove the key",
    "trainer.resume_from_path": "a stopped run is resumed with `redone run CONFIG --resume`; remove the key",
    "trainer.val_only": "a model is evaluated with `redone eval`; remove the key",
    "algorithm.filter_groups.metric": "groups are filtered on their raw reward; remove the key",
    "algorithm.gamma": "there is no value model, so no discount; remove the key",
    "algorithm.lam": "there is no value model, so no GAE; remove the key",
    "algorithm.kl_ctrl": "the KL term is fixed and in the loss: algorithm.kl.coef; remove the key",
    "data.return_raw_chat": "prompts are always kept as messages; remove the key",
    "actor_rollout_ref.hybrid_engine": "trainers and engines always share their hosts; remove the key",
    "actor_rollout_ref.actor.strategy": "the trainer is Megatron-core; remove the key",
    "actor_rollout_ref.actor.fsdp_config": "the trainer is Megatron-core, not FSDP; use trainer.parallel.*",
    "actor_rollout_ref.ref": "the reference policy follows the actor's settings; remove the key",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": "use trainer.parallel.context; remove the key",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": (
        "set trainer.max_token_len_per_rank instead"
    ),
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": "set trainer.max_token_len_per_rank instead",
    "actor_rollout_ref.rollout.load_format": "weights always come from the trainer; remove the key",
    "actor_rollout_ref.rollout.free_cache_engine": "engines always sleep between phases; remove the key",
}

_LORA = "LoRA is not supported (the whole model is trained); remove the key"
_CRITIC = "value models (a PPO critic) are not supported; use algorithm.adv_estimator=grpo and remove the key"
_IMAGES = "multimodal inputs are not supported; remove the key"
_AGENT = (
    "agentic multi-turn rollouts are not supported (fixed-history multi-turn prompts are); remove the key"
)
_REWARD_MODEL = "reward models are not supported; choose another rewards.<task>.family and remove the key"

# a component of a key -> why it is refused
REFUSED: dict[str, str] = {
    "lora": _LORA, "lora_rank": _LORA, "lora_alpha": _LORA, "lora_adapter_path": _LORA, "peft": _LORA,
    "critic": _CRITIC, "value_model": _CRITIC, "critic_warmup": _CRITIC,
    "image_key": _IMAGES, "video_key": _IMAGES, "images": _IMAGES, "freeze_vision_tower": _IMAGES,
    "return_multi_modal_inputs": _IMAGES, "image_patch_size": _IMAGES,
    "multi_turn": _AGENT, "agent": _AGENT, "tool_config_path": _AGENT, "tools": _AGENT,
    "reward_model": _REWARD_MODEL,
}  # fmt: skip


def explain(path: str) -> str | None:
    """The remedy for a key that is not ours but is known: a verl name, or a feature refused by name; else
    None."""
    if path in RENAMED:
        ours, note = RENAMED[path]
        return f"this is verl's name; here it is {ours}" + (f" ({note})" if note else "")
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if reason := NO_COUNTERPART.get(".".join(parts[:end])):
            return reason
    for part in parts:
        if reason := REFUSED.get(part):
            return reason
    return None
