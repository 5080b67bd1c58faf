"""The machines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from redone.config.section import Section


class RayConfig(Section):
    temp_dir: str | None = Field(
        None, description="Short folder for Ray's sockets; default: a new one under /tmp."
    )
    object_store_mb: int = Field(128, ge=80, description="Ray object store.")
    start_timeout_s: float = Field(300.0, gt=0, description="Longest start of an actor.")


class ClusterConfig(Section):
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where trainers and engines run.")
    nodes: int = Field(1, ge=1, description="Nodes.")
    gpus_per_node: int = Field(1, ge=1, description="Trainer ranks per node (on CPU: processes).")
    health_timeout_s: float = Field(
        45.0,
        ge=1,
        description="A process without a sign of life for so long is ended: a trainer rank ends the run, an "
        "engine is started again.",
    )
    stall_timeout_s: float = Field(
        300.0,
        ge=1,
        description="A vLLM engine whose loop ends no step for so long, though its processes run, is started "
        "again.",
    )
    gpu: str | None = Field(
        None,
        description="The GPU as `redone plan` names it: the first steps are compared with the plan's band.",
    )
    ray: RayConfig = RayConfig()

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node
