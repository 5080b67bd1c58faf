"""What a run writes down: metrics, samples, batches, profiles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from redone.config.section import Section


class ProfileConfig(Section):
    """A trace from a step's first update to its weight update."""

    tool: Literal["off", "torch", "nsys"] = Field(
        "off",
        description="torch: a Chrome trace beside the rank's log. nsys: Nsight Systems on CUDA, through Ray.",
    )
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((3,), description="Steps that are traced.")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), description="Trainer ranks that are traced.")


class RecordConfig(Section):
    loggers: tuple[Literal["console", "jsonl", "tensorboard", "wandb", "mlflow"], ...] = Field(
        ("console", "jsonl", "tensorboard"), description="Where metrics go."
    )
    samples_per_step: int = Field(4, ge=0, description="Rollouts written per step.")
    save_batches: int = Field(
        0,
        ge=0,
        description="Keep every n-th step's batch and the trainer's state before it, for `redone replay`; 0: "
        "none. Each costs the size of a checkpoint.",
    )
    project: str = Field("redone", description="Project name for W&B / experiment for MLflow.")
    profile: ProfileConfig = ProfileConfig()
