"""`redone plan CONFIG --nodes N --gpu h100`: what a configuration would need and take, without running it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from redone.config.load import load_config
from redone.errors import ConfigError
from redone.planner.hardware import GPUS
from redone.planner.lengths import SIGMA
from redone.planner.report import Options, Plan, gate, make_plan
from redone.planner.text import render
from redone.planner.watch import read_multiplier

EXIT_BLOCKED = 1
DESCRIPTION = """Says whether a configuration fits, what binds, how long a step will take, and which layouts
are near or faster. Starts nothing, needs no GPU. Predicted, not measured; what was assumed is printed."""
EPILOG = """Memory: red does not fit, amber would not if activations were 20 % larger, green fits.
Exit code: 0 go, 1 memory does not fit (redone submit stops there), 2 wrong input.

  redone plan configs/scaling/nemo_v06.yaml --nodes 4 --gpu h100 model.path=/models/Qwen3-30B-A3B"""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `redone plan`; their names are Options' fields."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("config", help="YAML file; of model.path only config.json is read")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="override a key of the configuration")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that the run gets")
    parser.add_argument("--gpu", required=True, help=f"their GPUs: {', '.join(GPUS)}")
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="mean prompt, in tokens")
    parser.add_argument("--response-tokens", type=float, metavar="N", help="mean response, in tokens")
    parser.add_argument(
        "--sigma", type=float, default=SIGMA, metavar="S",
        help="spread of response lengths: standard deviation of their logarithm (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", dest="lengths_file", metavar="FILE", help="observed response lengths, one a line"
    )
    parser.add_argument(
        "--host-memory", type=float, metavar="BYTES", help="RAM of a node, e.g. 2e12 (default: by GPU)"
    )
    parser.add_argument(
        "--trainer-sleeps",
        action="store_true",
        help="trainer states leave the GPU in rollouts, as with trainer.offload",
    )
    parser.add_argument("--cpu-optimizer", action="store_true", help="optimizer states live on the host")
    parser.add_argument(
        "--rollout-nodes", type=int, default=0, metavar="N",
        help="of them, nodes for engines alone (asynchronous; not built for GPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--fit", type=Path, metavar="RUN_FOLDER", help="a run's measured steps re-fit the prediction"
    )


def options_of(args: argparse.Namespace) -> Options:
    return Options(**{f.name: getattr(args, f.name) for f in fields(Options)})


def read_sizes(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder (weights are not needed). Raises ConfigError."""
    file = Path(path) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: cannot read {file} ({error}); planning needs it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} does not hold a JSON object; planning needs the model's sizes")
    return found


def build_plan(config: str | Path, overrides: Sequence[str], options: Options) -> Plan:
    """Load and plan. Raises ConfigError: one message that says what to change."""
    cfg = load_config(config, overrides)
    return make_plan(cfg, read_sizes(cfg.model.path), options)


def plan_command(
    config: str | Path, overrides: Sequence[str], options: Options, fit: Path | None = None
) -> int:
    """Print the plan. Exit code 1 when the gate blocks, else 0."""
    plan = build_plan(config, overrides, options)
    again = None if fit is None else refitted(plan, fit)
    sys.stdout.write(render(plan) + "\n")
    if again is not None:
        sys.stdout.write(again + "\n")
    return EXIT_BLOCKED if gate(plan) else 0


def refitted(plan: Plan, folder: Path) -> str:
    """The step with the multiplier of a measured run. Raises ConfigError when the folder has none."""
    multiplier, band = read_multiplier(folder)
    if plan.refused:
        return f"\nnot re-fitted by {folder}: this step is not predicted"
    step = plan.chosen.seconds.step * multiplier
    return (
        f"\nre-fitted by {folder}: x {multiplier:.2f} = {step:.1f} s a step, "
        f"P10-P90 {step / band:.1f} .. {step * band:.1f}"
    )
