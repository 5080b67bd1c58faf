"""Supervised fine-tuning, and the graph of stages: which nodes there are, what each reads and decides."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from redone.config.judge import JudgeConfig
from redone.config.section import Section

BASE_MODEL = "base"  # stands for model.path where a node names the model that it starts from


class SftConfig(Section):
    train: tuple[str, ...] = Field(
        (),
        description="Files of conversations: `messages` that end with the assistant, or prompt + response.",
    )
    val: tuple[str, ...] = Field((), description="Conversations whose loss is measured, never trained on.")
    response_key: str = Field("response", description="Column with the answer of rows that have a prompt.")
    epochs: int = Field(2, ge=1, description="Passes over the training conversations.")
    batch_size: int = Field(64, ge=1, description="`batch_unit`s per optimizer step.")
    batch_unit: Literal["examples", "packed"] = Field(
        "packed", description="packed: sequences of up to max_length tokens of several examples."
    )
    max_length: int = Field(16384, ge=2, description="Tokens of one packed sequence; the longest example.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="A longer example: stop, or drop and count it."
    )
    short_batch: Literal["merge", "drop", "keep"] = Field(
        "merge",
        description="The rest of an epoch that fills less than half a batch: join it to the batch before it.",
    )


class MixSource(Section):
    files: tuple[str, ...] = Field(description="Parquet or jsonl files, or names of nodes that make rows.")
    weight: float = Field(1.0, gt=0, description="Factor on the sampling weight of this source's tasks.")
    cap: int | None = Field(None, ge=1, description="Most rows of one task of this source.")
    task: str | None = Field(None, description="Task of rows that name none.")
    domain: Literal["sns", "general"] | None = Field(None, description="Domain of rows that name none.")


class DrawConfig(Section):
    """How rows are drawn from tasks of very different size."""

    total: int | None = Field(None, ge=1, description="Rows to draw; default: all that caps allow.")
    shares: dict[str, float] = Field({}, description="Domain -> share of the rows; default: as they come.")
    temperature: float = Field(
        1.0, ge=1, description="A task's weight is rows^(1/temperature): 1 proportional, large: equal shares."
    )
    cap: int | None = Field(None, ge=1, description="Most rows of one task.")
    floor: int = Field(0, ge=0, description="Least rows of one task, where it has that many.")
    max_repeat: int = Field(1, ge=1, description="How often one row may be drawn to fill a share.")
    rationale_share: float | None = Field(
        None, ge=0, le=1, description="Share of rows that carry a rationale; default: as they come."
    )
    rationale_key: str = Field(
        "rationale", description="Column or extra_info key that holds (or flags) the rationale."
    )


class NodeBase(Section):
    overrides: dict[str, object] = Field(
        {}, description="Other values of this configuration's sections for this node (a.b: value, or nested)."
    )


class MixNode(NodeBase, DrawConfig):
    """Draws the rows of a stage from many sources."""

    kind: Literal["mix"] = "mix"
    sources: tuple[MixSource, ...] = Field(min_length=1, description="Where rows come from.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be used: stop, or count it."
    )


class GateConfig(Section):
    enable: bool = Field(False, description="Hand on the input model when validation fell.")
    tolerance: float = Field(0.0, ge=0, description="Fall of the mean validation score that is accepted.")


class RlNode(NodeBase):
    """An RL run, as the sections algorithm, rollout, trainer and evaluate say."""

    kind: Literal["rl"] = "rl"
    model: str = Field(BASE_MODEL, description="`base`, or the node whose model is trained on.")
    data: tuple[str, ...] = Field(min_length=1, description="Training rows: files or nodes.")
    gate: GateConfig = GateConfig()


class SftNode(NodeBase):
    """Supervised fine-tuning, as the sections sft and trainer say."""

    kind: Literal["sft"] = "sft"
    model: str = Field(BASE_MODEL, description="`base`, or the node whose model is trained on.")
    data: tuple[str, ...] = Field(min_length=1, description="Conversations: files or nodes.")
    on_empty: Literal["skip", "error"] = Field(
        "skip", description="No conversations: hand on the input model and say so, or stop."
    )


class EvaluateNode(NodeBase):
    """Scored answers of one model on prompts, with evaluate.sampling."""

    kind: Literal["evaluate"] = "evaluate"
    model: str = Field(BASE_MODEL, description="`base`, or the node whose model answers.")
    data: tuple[str, ...] = Field(min_length=1, description="Prompts: files or nodes.")
    max_per_task: int | None = Field(None, ge=1, description="Prompts per task, drawn by seed.")


class DiagnoseNode(NodeBase):
    """Which tasks fail, and why: diagnosis.json, a page, and the bucket of failing tasks."""

    kind: Literal["diagnose"] = "diagnose"
    evaluation: str = Field(description="Evaluate node of the model (several samples per prompt).")
    base: str | None = Field(None, description="Evaluate node of the base model on the same prompts.")
    fail_below: float = Field(0.5, ge=0, le=1, description="A task fails when its pass rate is below this.")
    score: Literal["pass_rate", "mean_score"] = Field(
        "mean_score", description="What is compared with fail_below (mean_score: graded rewards count)."
    )
    regression: float = Field(
        0.0, ge=0, description="A task also fails when it is worse than base by more than this (p < 0.05)."
    )
    constant_fails: bool = Field(
        True, description="A task that is no better than a constant answer fails, whatever its score."
    )
    max_tasks: int | None = Field(None, ge=1, description="Most tasks in the bucket, weakest first.")
    slices: tuple[str, ...] = Field((), description="extra_info keys that cut tasks into slices.")
    weights: dict[str, float] = Field({}, description="Task -> importance in the ranking; default 1.")
    constant_items: int = Field(200, ge=1, description="Prompts per task on which constants are scored.")
    on_empty: Literal["continue", "error"] = Field(
        "continue", description="No failing task: go on (the targeted stage is skipped), or stop."
    )


class DecontaminateConfig(Section):
    files: tuple[str, ...] = Field(
        (), description="Evaluation files beside data.val, data.test and the prompts of evaluate nodes."
    )
    ngram: int = Field(8, ge=2, description="Words (Chinese: characters) that must agree in a row.")
    share: float = Field(
        0.5, gt=0, le=1, description="Share of an evaluation item's n-grams in one row that refuses it."
    )
    on_overlap: Literal["drop", "error"] = Field("drop", description="Refuse the row, or stop.")


class SftSetNode(NodeBase):
    """Conversations of the failing tasks, stratified by capability."""

    kind: Literal["sft_set"] = "sft_set"
    bucket: str = Field(description="Diagnose node, or `all` for every task.")
    data: tuple[str, ...] = Field(
        min_length=1, description="Training rows with their answers: files or nodes."
    )
    size: int | None = Field(None, ge=1, description="Conversations; default: all.")
    capabilities: dict[str, str] = Field(
        {}, description="Task -> capability; else extra_info.capability of the row, else the task."
    )
    weights: dict[str, float] = Field(
        {}, description="Task -> factor for rare tasks that matter; default 1. Written to the manifest."
    )
    balance_key: str | None = Field(
        None, description="`reference` or an extra_info key whose values a task's rows hold equally often."
    )
    near_duplicate: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Jaccard similarity of word 3-grams from which a row is a copy; null: off.",
    )
    decontaminate: DecontaminateConfig = DecontaminateConfig()


class VerifierJudge(Section):
    type: Literal["verifier"] = "verifier"


class LlmJudge(JudgeConfig):
    type: Literal["llm"] = "llm"
    max_unread_share: float = Field(
        0.2, ge=0, le=1, description="Share of answers without a verdict that stops the node."
    )


Judge = Annotated[VerifierJudge | LlmJudge, Field(discriminator="type")]


class SoftLabelNode(NodeBase):
    """Best of several answers of a model to each prompt (rejection sampling)."""

    kind: Literal["soft_labels"] = "soft_labels"
    model: str = Field(description="Node whose model answers (the paper: the stage-1 model).")
    data: tuple[str, ...] = Field(min_length=1, description="Prompts: files or nodes.")
    bucket: str | None = Field(
        None,
        description="Diagnose node: only prompts of tasks that do not fail (all prompts, if every one does).",
    )
    max_items: int | None = Field(None, ge=1, description="Prompts, drawn by seed; default: all.")
    candidates: int = Field(8, ge=1, description="Answers per prompt (the paper: 8).")
    temperature: float = Field(1.0, gt=0, description="Their sampling temperature.")
    judge: Judge = VerifierJudge()
    threshold: float = Field(
        0.5, ge=0, le=1, description="A prompt whose best answer scores less is left out."
    )
    thresholds: dict[str, float] = Field({}, description="Task -> threshold of its own.")
    tie: Literal["shortest", "longest", "first", "likeliest"] = Field(
        "likeliest", description="Which of equally good answers (likeliest: highest mean log-probability)."
    )
    require_stop: bool = Field(True, description="An answer cut by the length limit is no label.")


class HardSetNode(NodeBase):
    """Prompts that the model sometimes solves, by pass rates measured before."""

    kind: Literal["hard_set"] = "hard_set"
    evaluation: str = Field(description="Evaluate node over training prompts (several samples per prompt).")
    low: float = Field(0.0, ge=0, le=1, description="Mean score must be above this.")
    high: float = Field(1.0, ge=0, le=1, description="Mean score must be below this.")
    draw: DrawConfig = DrawConfig()
    min_rows: int = Field(
        1, ge=1, description="Fewer hard prompts: filled from the rest, nearest to one half."
    )


Node = Annotated[
    MixNode | RlNode | SftNode | EvaluateNode | DiagnoseNode | SftSetNode | SoftLabelNode | HardSetNode,
    Field(discriminator="kind"),
]


class PipelineConfig(Section):
    nodes: dict[str, Node] = Field({}, description="Name -> node. A run with nodes is a pipeline.")
    targets: tuple[str, ...] = Field(
        (),
        description="What `redone run` makes, with `table` and all that they need; default: every node.",
    )
    table: dict[str, str] = Field({}, description="Column of the final table -> evaluate node.")
    ablation: dict[str, str] = Field({}, description="Row of `redone ablate`'s table -> evaluate node.")

    @model_validator(mode="after")
    def _names(self) -> PipelineConfig:
        for name in self.nodes:
            if name == BASE_MODEL or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"nodes.{name}: a node's name is letters, digits, - and _, and not `base`")
        for key, found in (("table", self.table), ("ablation", self.ablation)):
            for label, name in found.items():
                if name not in self.nodes or self.nodes[name].kind != "evaluate":
                    raise ValueError(f"{key}.{label}={name!r} is no evaluate node of pipeline.nodes")
        for name in self.targets:
            if name not in self.nodes:
                raise ValueError(f"targets: {name!r} is no node; there are {', '.join(self.nodes)}")
        return self
