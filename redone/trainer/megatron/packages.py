"""Optional packages that a configuration asks for. Without such a key none of them is needed."""

from __future__ import annotations

from importlib.util import find_spec

from redone.config.schema import TrainerConfig


def missing(trainer: TrainerConfig) -> list[str]:
    """One sentence per key whose package is not installed."""
    optim, dispatcher = trainer.optim, trainer.moe.dispatcher
    needs = (
        (trainer.fp8 != "off", f"trainer.fp8={trainer.fp8}", "transformer_engine", "off"),
        (optim.precision_aware, "trainer.optim.precision_aware=true", "transformer_engine", "false"),
        (dispatcher != "alltoall", f"trainer.moe.dispatcher={dispatcher}", "deep_ep", "alltoall"),
    )
    return [
        f"{key} needs the package {package}, which is not installed here; install it or set {value}"
        for asked, key, package, value in needs
        if asked and find_spec(package) is None
    ]
