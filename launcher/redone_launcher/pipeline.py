"""`redone run` of a configuration with nodes, and `redone ablate`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from redone.config.check import check_config, read_model_config
from redone.config.load import load_config
from redone.config.nodes import stage_config
from redone.config.schema import Config
from redone.errors import ConfigError, RedoneError
from redone.pipeline.answers import Answers, read_answers
from redone.pipeline.folder import write_json
from redone.pipeline.graph import Graph
from redone.pipeline.results import ablation_table, collect_results, results_table, write_results
from redone.record.graph import GraphDisplay
from redone_launcher.session import Session
from redone_launcher.stages import Stages
from redone_launcher.training import log_to, machine, versions

log = logging.getLogger(__name__)


def run_pipeline(cfg: Config, choice: Mapping[str, str], root: Path | None = None) -> None:
    """Make the chosen nodes that are not finished, then print the table of pipeline.table.

    `choice`: from, until, only -> node. `root`: an existing pipeline folder (--resume). Raises RedoneError.
    """
    cfg = with_one_length(cfg)
    check_config(cfg, read_model_config(cfg.model.path))
    graph = Graph.create(cfg, root)
    names, again = graph.wanted(choice.get("--from"), choice.get("--until"), choice.get("--only"))
    make(graph, names, again)
    show_table(graph)


def ablate(config: Path, overrides: Sequence[str]) -> None:
    """Every row of pipeline.ablation, sharing finished nodes; prints the table. Raises RedoneError."""
    cfg = with_one_length(load_config(config, overrides))
    rows = cfg.pipeline.ablation
    if not rows:
        raise ConfigError(f"{config}: pipeline.ablation is empty; name rows -> evaluate nodes")
    check_config(cfg, read_model_config(cfg.model.path))
    targets = tuple(dict.fromkeys(rows.values()))
    cfg = cfg.model_copy(
        update={"pipeline": cfg.pipeline.model_copy(update={"targets": targets, "table": {}})}
    )
    graph = Graph.create(cfg)
    names, _ = graph.wanted()
    make(graph, names, set())
    results = collect_results({row: answers_of(graph, node) for row, node in rows.items()})
    write_results(graph.root, results, f"{cfg.run.name}: ablation", "ablation")
    Console().print(ablation_table(results))


def make(graph: Graph, names: Sequence[str], again: set[str]) -> None:
    """Run the nodes in one session of processes, with the live display."""
    cfg = graph.cfg
    session = Session(graph.root / "logs", keep_engines=any(_generates(cfg, n) for n in names))
    shown = GraphDisplay({name: cfg.pipeline.nodes[name].kind for name in names})
    finished = False
    with graph.locked():
        handler = log_to(graph.root / "logs" / "pipeline.log", cfg.run.log_level)
        write_json(graph.root / "machine.json", {"versions": versions(), "machine": machine(cfg)})
        try:
            with shown:
                graph.run(names, again, Stages(graph, session, shown).functions(), shown)
            finished = True
        except RedoneError as error:
            raise type(error)(
                f"{error}\nFinished nodes are kept; go on with: redone run --resume {graph.root}"
            ) from None
        finally:
            session.close(graceful=finished)
            logging.getLogger().removeHandler(handler)
            handler.close()


def show_table(graph: Graph) -> None:
    """The table of pipeline.table, as far as its nodes are finished."""
    table = graph.cfg.pipeline.table
    found = {column: node for column, node in table.items() if graph.look(node) is not None}
    if not found:
        return
    results = collect_results({column: answers_of(graph, node) for column, node in found.items()})
    results = replace(results, notes=same_models(graph, found))
    title = f"{graph.cfg.run.name}: held-out results"
    page = write_results(graph.root, results, title)
    console = Console()
    console.print(results_table(results, title))
    console.print(f"{page}", highlight=False, soft_wrap=True)


def same_models(graph: Graph, columns: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence for every column whose model is an earlier column's, e.g. refused by a stage's gate."""
    first: dict[str, str] = {}
    notes = []
    for column, node in columns.items():
        model = graph.finished[node].inputs["model[0]"]
        if model in first:
            notes.append(
                f"{column} is the model of {first[model]}: a stage between them handed it on unchanged"
            )
        first.setdefault(model, column)
    return tuple(notes)


def answers_of(graph: Graph, node: str) -> list[Answers]:
    return read_answers(graph.path(graph.output(node, "answers")))


def with_one_length(cfg: Config) -> Config:
    """model.max_model_len set to what the longest node needs, so that the same engines serve every node."""
    if cfg.model.max_model_len is not None:
        return cfg
    lengths = []
    for name in cfg.pipeline.nodes:
        data = stage_config(cfg, name).data
        lengths.append(data.max_prompt_length + data.max_response_length)
    longest = max([*lengths, cfg.data.max_prompt_length + cfg.data.max_response_length])
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"max_model_len": longest})})


def _generates(cfg: Config, name: str) -> bool:
    return cfg.pipeline.nodes[name].kind in ("rl", "evaluate", "soft_labels")
