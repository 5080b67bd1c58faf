"""The configuration tree: frozen pydantic models, unknown keys refused; verl's leaf names where it has one.

docs/config.md is generated from the descriptions here; relations between sections are checked in check.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from redone.config.cluster import ClusterConfig, RayConfig
from redone.config.engines import EngineBase, EngineConfig, SglangEngine, VllmEngine
from redone.config.judge import JudgeConfig
from redone.config.losses import (
    CispoLoss,
    ClipRange,
    DapoLoss,
    DrGrpoLoss,
    GrpoLoss,
    GspoLoss,
    ImportanceConfig,
    KlConfig,
    LossConfig,
    SftLoss,
)
from redone.config.optim import OptimConfig
from redone.config.parallel import MoeConfig, ParallelConfig
from redone.config.pipeline import PipelineConfig, SftConfig
from redone.config.record import ProfileConfig, RecordConfig
from redone.config.rewards import (
    AnswerReward,
    Check,
    CustomReward,
    ExactReward,
    JudgeReward,
    MetricReward,
    PatternReward,
    RewardBase,
    RewardConfig,
    RewardPoolConfig,
    SandboxReward,
)
from redone.config.section import Section
from redone.config.watch import CollapseConfig

__all__ = [
    "AnswerReward",
    "Check",
    "CispoLoss",
    "ClipRange",
    "ClusterConfig",
    "CollapseConfig",
    "CustomReward",
    "DapoLoss",
    "DrGrpoLoss",
    "EngineBase",
    "EngineConfig",
    "ExactReward",
    "GrpoLoss",
    "GspoLoss",
    "ImportanceConfig",
    "JudgeConfig",
    "JudgeReward",
    "KlConfig",
    "LossConfig",
    "MetricReward",
    "MoeConfig",
    "OptimConfig",
    "ParallelConfig",
    "PatternReward",
    "PipelineConfig",
    "ProfileConfig",
    "RayConfig",
    "RecordConfig",
    "RewardBase",
    "RewardConfig",
    "RewardPoolConfig",
    "SandboxReward",
    "Section",
    "SftConfig",
    "SftLoss",
    "SglangEngine",
    "VllmEngine",
]

SCHEMA_VERSION = 1


class RunConfig(Section):
    job: Literal["auto", "rl", "sft", "pipeline"] = Field(
        "auto", description="auto: pipeline when pipeline.nodes is set, sft when sft.train is, else rl."
    )
    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run folder under `run.dir`."
    )
    dir: str = Field("runs", description="Folder that holds run folders.")
    seed: int = Field(0, ge=0, description="Seed of data order, sampling and initialisation.")
    schema_version: int = Field(
        SCHEMA_VERSION, description="Version of this schema; an older run folder is refused."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Level of the log files."
    )


class ModelSection(Section):
    path: str = Field(description="Local Hugging Face folder (Qwen3, Qwen3-MoE or Llama family).")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Parameter dtype of trainer and engine."
    )
    trust_remote_code: bool = Field(False, description="Let transformers run code from the model folder.")
    chat_template: str | None = Field(None, description="Jinja file that replaces the model's chat template.")
    system_prompt: str | None = Field(None, description="Put before prompts that have no system message.")
    enable_thinking: bool | None = Field(None, description="Passed to the chat template when set.")
    max_model_len: int | None = Field(
        None, ge=2, description="Engine context length; default: longest prompt + response."
    )


class DataConfig(Section):
    train: tuple[str, ...] = Field((), description="Training files of RL: verl parquet or slime jsonl.")
    val: tuple[str, ...] = Field((), description="Validation files: every choice is made on these.")
    test: tuple[str, ...] = Field(
        (), description="Held-out files, read once, at the end (and before training)."
    )
    prompt_key: str = Field("prompt", description="Column that holds the messages (or a plain string).")
    label_key: str = Field("label", description="Ground-truth column of slime jsonl rows.")
    max_prompt_length: int = Field(1024, ge=1, description="Longest prompt in tokens.")
    max_response_length: int = Field(
        1024, ge=1, description="Longest response in tokens, stop token included."
    )
    task_max_response_length: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="Task -> longest response, where it is shorter: a label needs no room to ramble.",
    )
    truncation: Literal["error", "drop"] = Field(
        "error", description="A longer prompt: stop, or drop it and count it."
    )
    shuffle: bool = Field(True, description="Shuffle every epoch by seed.")
    balance_key: str | None = Field(
        None,
        description="`reference` or a key of extra_info: batches draw its values in turn (label balance).",
    )


class FilterGroups(Section):
    enable: bool = Field(True, description="Dynamic sampling: replace groups that teach nothing.")
    eps: float = Field(
        1e-6, ge=0, description="A group is informative iff its raw rewards spread by more than this."
    )
    max_num_gen_batches: int = Field(10, ge=1, description="Generation rounds per step before giving up.")
    on_exhausted: Literal["error", "short"] = Field(
        "short", description="After the cap: stop, or train on what there is."
    )


class OverlongBuffer(Section):
    enable: bool = Field(False, description="Soft overlong punishment.")
    len: int = Field(
        0, ge=0, description="Tokens before max_response_length in which the penalty grows from 0 to 1."
    )
    penalty_factor: float = Field(1.0, ge=0, description="Penalty at max_response_length.")

    @model_validator(mode="after")
    def _has_length(self) -> OverlongBuffer:
        if self.enable and self.len == 0:
            raise ValueError("enable=true with len=0 never punishes; set len, or enable=false")
        return self


class AlgorithmConfig(Section):
    adv_estimator: Literal["grpo", "dr_grpo"] = Field(
        "grpo", description="grpo: (r - mean) / std; dr_grpo: r - mean."
    )
    loss: LossConfig = DapoLoss()
    filter_groups: FilterGroups = FilterGroups()
    overlong_buffer: OverlongBuffer = OverlongBuffer()
    importance: ImportanceConfig = ImportanceConfig()
    kl: KlConfig = KlConfig()
    entropy_coeff: float = Field(0.0, ge=0, description="Entropy bonus.")
    train_batch_size: int = Field(1024, ge=1, description="Prompts per rollout step.")
    ppo_mini_batch_size: int = Field(1024, ge=1, description="Prompts per optimizer update.")
    ppo_epochs: int = Field(1, ge=1, description="Passes over a rollout batch.")
    total_steps: int = Field(100, ge=1, description="Rollout steps.")


class RolloutConfig(Section):
    engine: EngineConfig = VllmEngine()
    n: int = Field(16, ge=1, description="Responses per prompt (G).")
    temperature: float = Field(1.0, gt=0, description="The trainer divides its logits by the same value.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    top_k: int = Field(-1, ge=-1, description="-1: off.")
    forced_lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="Fixed workloads (benchmarks): a group's responses have these lengths in tokens, "
        "in turn; nothing stops them earlier.",
    )
    replicas: int = Field(1, ge=1, description="Engines.")
    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks of one engine.")
    gpus_per_node: int = Field(
        0,
        ge=0,
        description="GPUs of a node for engines alone, after its cluster.gpus_per_node, which train. 0:"
        " engines and trainer share GPUs in turn.",
    )
    gpu_memory_utilization: float = Field(0.7, gt=0, le=1, description="Share of GPU memory for one engine.")
    max_staleness: int = Field(
        0,
        ge=0,
        description="Steps that generation may be ahead of the trainer; tokens are at most so many weight "
        "versions older than in a synchronous run. 0: synchronous.",
    )
    over_sampling: float = Field(
        0.0,
        ge=0,
        le=4,
        description="Prompts asked for beyond those needed, as a share of them; once enough groups are in, "
        "the others are aborted and asked for again in the next step. 0: off.",
    )
    max_engine_restarts: int = Field(
        3, ge=0, description="Engines that died and were started again, per run, before the run ends."
    )
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="Share of rollouts whose reward may fail per step."
    )


class HeadConfig(Section):
    backend: Literal["auto", "reference", "chunked", "fused"] = Field(
        "auto",
        description="How log-probabilities are computed: whole logits (reference), chunks of rows, or the"
        " fused Triton kernel (CUDA only). auto: fused on CUDA, chunked on CPU.",
    )
    chunk_tokens: int = Field(1024, ge=1, description="Rows per chunk of the head.")
    fuse_loss: bool = Field(
        True,
        description="Backends auto and chunked: make the gradient together with the loss, 3 matrix products"
        " instead of 4, where the loss is token-level (dapo, dr_grpo).",
    )


class TrainerConfig(Section):
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()
    optim: OptimConfig = OptimConfig()
    max_token_len_per_rank: int = Field(16384, ge=1, description="Token budget of one micro-batch.")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activation recomputation: nothing, the attention core, or whole layers."
    )
    prefix_sharing: bool = Field(True, description="Compute each prompt once for its whole group.")
    self_check: bool = Field(
        True,
        description="With prefix_sharing: run one micro-batch both ways before the first update; a difference"
        " stops the run.",
    )
    head: HeadConfig = HeadConfig()
    fp8: Literal["off", "delayed", "tensorwise", "blockwise"] = Field(
        "off",
        description="Matrix products of the layers in fp8, by TransformerEngine's scaling recipe (CUDA only;"
        " weights stay in model.dtype). Rows are padded to 16 tokens per rank.",
    )
    offload: bool = Field(
        False,
        description="Trainer and engines use their devices in turn: weights, gradients and optimizer states"
        " wait in host memory while engines generate; memory/* metrics say what every phase took. On CPU the"
        " same steps gain no memory.",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads per rank.")
    timeout_s: float = Field(
        600.0, gt=0, description="Collective timeout; a peer that hangs longer is an error."
    )
    determinism_seed: int = Field(1234, ge=0, description="Seed of the model-parallel RNG tracker.")


class CanaryConfig(Section):
    every: int = Field(1, ge=0, description="Check every n-th update; 0: off.")
    tolerance: float = Field(
        1e-4, gt=0, description="Largest |trainer - engine| log-probability on the fixed prompts."
    )
    prompts: int = Field(4, ge=1, description="Fixed prompts.")
    length: int = Field(32, ge=2, description="Tokens per fixed prompt.")


class WeightsConfig(Section):
    channel: Literal["shm", "file", "collective", "ipc"] = Field(
        "shm",
        description="How weights reach the engines. shm: shared memory, one node. file: a file in"
        " `weights.dir`, which every node must see. collective: broadcast by trainer rank 0 to every engine"
        " rank, on any number of nodes; NCCL with rollout.gpus_per_node > 0, else gloo."
        " ipc: over NCCL to every trainer rank, by CUDA IPC to the engine rank on the same GPU.",
    )
    bucket_bytes: int = Field(64 * 2**20, ge=1024, description="Bytes per bucket.")
    delta: bool = Field(
        False,
        description="Send only layers that changed, told by digest: for frozen or partly trained models.",
    )
    quantization: Literal["none", "fp8_block"] = Field(
        "none",
        description="fp8_block: engines (vLLM, CUDA) hold and receive projections as e4m3 with a factor per"
        " 128 x 128 block; the trainer keeps model.dtype. The canary's tolerance must allow for it.",
    )
    dir: str | None = Field(
        None,
        description="Folder of the channel; with shm default /dev/shm, REDONE_SHM_DIR overrides; with file"
        " required.",
    )
    canary: CanaryConfig = CanaryConfig()

    @model_validator(mode="after")
    def _has_folder(self) -> WeightsConfig:
        if self.channel == "file" and not self.dir:
            raise ValueError("channel=file needs dir: a folder that every node sees and can write")
        if self.channel in ("collective", "ipc") and self.delta:
            raise ValueError(
                f"delta=true with channel={self.channel}: buckets are sent whole; set delta=false"
            )
        return self


class EvalSampling(Section):
    temperature: float = Field(0.0, ge=0, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    n: int = Field(1, ge=1, description="Samples per item.")
    max_tokens: int | None = Field(None, ge=1, description="Default: data.max_response_length.")


class EarlyStop(Section):
    enable: bool = Field(False, description="Stop when validation no longer improves.")
    patience: int = Field(3, ge=1, description="Evaluations without improvement.")


class EvaluateConfig(Section):
    every: int = Field(0, ge=0, description="Validate every n steps; 0: only at the end.")
    before_train: bool = Field(True, description="Validate (and test) before step 1.")
    sampling: EvalSampling = EvalSampling()
    max_items: int | None = Field(None, ge=1, description="Validate on the first n items only.")
    keep_best: bool = Field(
        True, description="Keep and finally use the checkpoint with the best validation score."
    )
    early_stop: EarlyStop = EarlyStop()
    collapse: CollapseConfig = CollapseConfig()
    baselines: tuple[Literal["constant", "label_logprob"], ...] = Field(
        (), description="Baselines of the untrained model on the test files (classification tasks)."
    )


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="Save every n steps; 0: only at the end.")
    at_end: bool = Field(True, description="Save at the end of the run as well.")
    keep: int = Field(2, ge=1, description="Checkpoints kept (the best one apart).")
    asynchronous: bool = Field(
        False, description="Copy the states, write them in a thread; the next save or the end waits for it."
    )
    export_hf: bool = Field(True, description="Write a Hugging Face folder at the end.")


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelSection
    data: DataConfig = DataConfig()
    rewards: dict[str, RewardConfig] = Field({}, description="Task name (or `default`) -> reward.")
    reward_pool: RewardPoolConfig = RewardPoolConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    record: RecordConfig = RecordConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sft: SftConfig = SftConfig()
    pipeline: PipelineConfig = PipelineConfig()

    @property
    def node_gpus(self) -> int:
        """GPUs that a node must have."""
        return self.cluster.gpus_per_node + self.rollout.gpus_per_node

    @property
    def node_gpus_keys(self) -> str:
        """What `node_gpus` adds up, for messages."""
        own = f" + rollout.gpus_per_node={self.rollout.gpus_per_node}" if self.rollout.gpus_per_node else ""
        return f"cluster.gpus_per_node={self.cluster.gpus_per_node}{own}"

    @property
    def shared_gpus(self) -> bool:
        """Engines and trainer use the same GPUs in turn."""
        return self.cluster.device == "cuda" and not self.rollout.gpus_per_node

    @property
    def kind(self) -> Literal["rl", "sft", "pipeline"]:
        """run.job, resolved."""
        if self.run.job != "auto":
            return self.run.job
        return "pipeline" if self.pipeline.nodes else "sft" if self.sft.train else "rl"
