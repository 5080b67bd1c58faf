"""`redone replay RUN --step N`: a saved batch, run again on this machine; the differences, in a table."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from redone.config.load import load_config
from redone.errors import RunFolderError
from redone.pipeline.folder import RunFolder
from redone.pipeline.replay import Difference, replay_step


def replay_command(run: Path, step: int, overrides: list[str]) -> int:
    """Raises RunFolderError naming the steps that can be replayed when `step` cannot."""
    folder = RunFolder.open(run)
    cfg = load_config(folder.path / "config.yaml", overrides)
    saved = folder.saved_batches()
    if step not in saved:
        there = ", ".join(map(str, saved)) or "none"
        raise RunFolderError(
            f"{run} has no saved batch of step {step} (there: {there}); record.save_batches=n keeps every "
            "n-th step's"
        )
    from redone.cluster.cluster import RayCluster  # ray takes a second to import: not before the checks

    with tempfile.TemporaryDirectory(prefix="redone-replay-") as logs:
        cluster = RayCluster(cfg, Path(logs), Console().print, phase=lambda: "replay", with_engines=False)
        finished = False
        try:
            differences = replay_step(folder, step, cfg, cluster.trainers())
            finished = True
        finally:
            cluster.close(graceful=finished)
    Console().print(_table(step, differences))
    return 0


def _table(step: int, differences: list[Difference]) -> Table:
    table = Table(title=f"step {step}, run again", title_justify="left")
    table.add_column("quantity")
    for name in ("recorded", "replayed", "relative difference"):
        table.add_column(name, justify="right")
    for d in differences:
        recorded = "" if d.recorded is None else f"{d.recorded:.6g}"
        relative = "" if d.relative is None else f"{d.relative:.1e}"
        table.add_row(d.name, recorded, f"{d.replayed:.6g}", relative)
    return table
