"""What each kind of node does. Training nodes are ordinary run folders inside the node's folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from redone.config.check import check_config, read_model_config
from redone.config.nodes import EVERY_TASK, ROW_KINDS, stage_config
from redone.config.pipeline import (
    DiagnoseNode,
    EvaluateNode,
    HardSetNode,
    LlmJudge,
    MixNode,
    RlNode,
    SftNode,
    SftSetNode,
    SoftLabelNode,
)
from redone.config.schema import Config
from redone.data.chat import load_chat
from redone.data.mix import mix
from redone.data.prompts import load_prompts, parse_row
from redone.errors import RedoneError
from redone.evaluate.runner import Scorer, sampling_of
from redone.pipeline.answers import Answers, answer_prompts, draw_prompts, read_answers
from redone.pipeline.diagnose import diagnose, failing, score_constants
from redone.pipeline.diagnosis_page import write_diagnosis
from redone.pipeline.fingerprint import evaluation_files
from redone.pipeline.folder import RunFolder, write_json
from redone.pipeline.graph import Function, Graph, Made, Task
from redone.pipeline.hard_set import write_hard_set
from redone.pipeline.rows import write_rows
from redone.pipeline.sft_set import build_sft_set
from redone.pipeline.soft_labels import judge_scores, outside, verifier_scores, write_labels
from redone.pipeline.space import check_space
from redone.record.graph import GraphDisplay, NodeDisplay
from redone.reward.pool import build_rewards
from redone.types import Completion, Prompt, Sampling, Score
from redone_launcher.session import Session
from redone_launcher.training import load_inputs, load_sft_inputs, train_rl, train_sft

log = logging.getLogger(__name__)

RUN = "run"  # the run folder inside a training node's folder


class Unscored:
    """Stands where rewards are needed but a judge scores later."""

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [Score(raw=0.0, value=0.0, correct=False) for _ in completions]


class Stages:
    """The functions of every kind of node, over one session of processes."""

    def __init__(self, graph: Graph, session: Session, display: GraphDisplay) -> None:
        self.graph, self.session, self.display = graph, session, display

    def functions(self) -> Mapping[str, Function]:
        return {
            "mix": self.mix,
            "rl": self.rl,
            "sft": self.sft,
            "evaluate": self.evaluate,
            "diagnose": self.diagnose,
            "sft_set": self.sft_set,
            "soft_labels": self.soft_labels,
            "hard_set": self.hard_set,
        }

    def mix(self, task: Task) -> Made:
        node, cfg = task.node, task.cfg
        assert isinstance(node, MixNode)
        files = iter(task.rows)
        sources = [s.model_copy(update={"files": tuple(next(files) for _ in s.files)}) for s in node.sources]

        def check(row: Mapping[str, Any], place: str) -> None:
            parse_row(row, place, cfg)

        rows = task.folder / "rows.jsonl"
        drawn = mix(sources, node, cfg.run.seed, rows, check, skip_bad=node.on_bad_row == "skip")
        manifest = drawn.manifest(sources, node, cfg.run.seed)
        write_json(task.folder / "manifest.json", manifest)
        facts = {"rows": manifest["rows"], "tasks": len(manifest["tasks"]), "skipped": drawn.skipped}
        return Made(outputs={"rows": rows}, facts=facts)

    def rl(self, task: Task) -> Made:
        node = task.node
        assert isinstance(node, RlNode)
        cfg = self._run_config(task, data={"train": list(task.rows)})
        folder, resumed = open_run(task.folder / RUN, cfg)
        inputs = load_inputs(cfg)
        summary = train_rl(cfg, folder, inputs, resumed, self.session, self._run_display(task.name))
        facts: dict[str, Any] = {"steps": summary.steps}
        history = dict(folder.load_state(folder.steps()[-1]).val_history)
        model = folder.path / "export"
        if history:
            best = summary.best_step if cfg.evaluate.keep_best and summary.best_step else summary.steps
            facts |= {"val": round(history.get(best, history[max(history)]), 4)}
            facts |= {"val_before": round(history[0], 4)} if 0 in history else {}
        if node.gate.enable:
            fell = facts["val_before"] - facts["val"]
            facts["accepted"] = fell <= node.gate.tolerance
            if not facts["accepted"]:
                assert task.model is not None
                model = task.model
                self._say(task, f"validation fell by {fell:.4f}: the model before this node is handed on")
        return Made(outputs={"model": model}, facts=facts)

    def sft(self, task: Task) -> Made:
        node = task.node
        assert isinstance(node, SftNode) and task.model is not None
        empty = self._empty_sets(task)
        if empty:
            message = f"{', '.join(empty)} holds no conversation: nothing to train on"
            if node.on_empty == "error":
                raise RedoneError(f"node {task.name}: {message}; set on_empty=skip to go on without it")
            self._say(task, f"{message}; skipped, the model before this node is handed on")
            return Made(outputs={"model": task.model}, facts={"skipped": message})
        cfg = self._run_config(task, sft={"train": list(task.rows)})
        folder, resumed = open_run(task.folder / RUN, cfg)
        inputs = load_sft_inputs(cfg)
        summary = train_sft(cfg, folder, inputs, resumed, self.session, self._run_display(task.name))
        facts = {"steps": summary.steps, "conversations": len(inputs.train)}
        return Made(outputs={"model": folder.path / "export"}, facts=facts)

    def evaluate(self, task: Task) -> Made:
        node, cfg = task.node, task.cfg
        assert isinstance(node, EvaluateNode)
        prompts = self._prompts(task.rows, cfg, node.max_per_task)
        wanted = cfg.evaluate.sampling
        sampling = sampling_of(wanted, cfg.data.max_response_length, ())
        path = task.folder / "answers.jsonl"
        with scorer(cfg) as rewards:
            answers = self._answers(task, prompts, rewards, sampling, wanted.n, path)
        mean = sum(a.mean_score for a in answers) / len(answers)
        facts = {"prompts": len(answers), "answers": wanted.n, "mean_score": round(mean, 4)}
        return Made(outputs={"answers": path}, facts=facts)

    def diagnose(self, task: Task) -> Made:
        node = task.node
        assert isinstance(node, DiagnoseNode)
        answers = read_answers(task.named[node.evaluation])
        base = read_answers(task.named[node.base]) if node.base else None
        cfg = stage_config(task.base_cfg, node.evaluation)
        asked = {a.prompt_id for a in answers}
        prompts = [
            p for p in self._prompts(self.graph.row_files(node.evaluation), cfg, None) if p.id in asked
        ]
        with scorer(task.cfg) as rewards:
            constants = score_constants(prompts, answers, rewards, node.constant_items)
        reports = diagnose(answers, base, constants, node)
        bucket = failing(reports, node.max_tasks)
        write_diagnosis(task.folder, reports, node)
        write_json(task.folder / "bucket.json", {"tasks": [r.task for r in bucket]})
        if not bucket:
            if node.on_empty == "error":
                raise RedoneError(
                    f"node {task.name}: no task fails (fail_below={node.fail_below}): there is nothing to "
                    "target. Remedy: raise fail_below, or set on_empty=continue to skip the stage"
                )
            self._say(task, "no task fails: the targeted stage has nothing to do")
        facts = {"tasks": len(reports), "failing": ", ".join(r.task for r in bucket) or "none"}
        return Made(outputs={"bucket": task.folder / "bucket.json"}, facts=facts)

    def sft_set(self, task: Task) -> Made:
        node = task.node
        assert isinstance(node, SftSetNode)
        tasks = None
        if node.bucket != EVERY_TASK:
            tasks = _tasks_of(task.named[node.bucket])
        evaluation = evaluation_files(node, task.base_cfg)
        built = build_sft_set(node, tasks, task.rows, evaluation, task.cfg, task.cfg.run.seed)
        rows = task.folder / "rows.jsonl"
        write_rows(rows, built.rows)
        write_json(task.folder / "manifest.json", built.manifest)
        facts = {"rows": len(built.rows), "tasks": len(built.manifest["tasks"]), **built.manifest["left_out"]}
        return Made(outputs={"rows": rows}, facts=facts)

    def soft_labels(self, task: Task) -> Made:
        node, cfg = task.node, task.cfg
        assert isinstance(node, SoftLabelNode)
        prompts = self._prompts(task.rows, cfg, None)
        if node.bucket is not None:
            prompts = outside(prompts, _tasks_of(task.named[node.bucket]))
        if node.max_items is not None:
            prompts = draw_prompts_overall(prompts, node.max_items, cfg.run.seed)
        sampling = Sampling(temperature=node.temperature, max_tokens=cfg.data.max_response_length)
        path = task.folder / "candidates.jsonl"
        if isinstance(node.judge, LlmJudge):
            answers = self._answers(task, prompts, Unscored(), sampling, node.candidates, path)
            scores, counts = judge_scores(
                prompts, answers, node.judge, task.folder / "verdicts.jsonl", self._progress(task, "judging")
            )
        else:
            with scorer(cfg) as rewards:
                answers = self._answers(task, prompts, rewards, sampling, node.candidates, path)
            scores, counts = verifier_scores(answers), {}
        rows = task.folder / "rows.jsonl"
        manifest = write_labels(prompts, answers, scores, node, rows) | {
            "judge": node.judge.type,
            "counts": counts,
        }
        write_json(task.folder / "manifest.json", manifest)
        return Made(outputs={"rows": rows}, facts={k: manifest[k] for k in ("prompts", "labels")})

    def hard_set(self, task: Task) -> Made:
        node = task.node
        assert isinstance(node, HardSetNode)
        answers = read_answers(task.named[node.evaluation])
        files = self.graph.row_files(node.evaluation)
        manifest = write_hard_set(answers, files, node, task.cfg, task.cfg.run.seed, task.folder)
        write_json(task.folder / "manifest.json", manifest)
        facts = {k: manifest[k] for k in ("rows", "hard", "always", "never", "added")}
        return Made(outputs={"rows": task.folder / "rows.jsonl"}, facts=facts)

    def _answers(
        self, task: Task, prompts: Sequence[Prompt], rewards: Scorer, sampling: Sampling, n: int, path: Path
    ) -> list[Answers]:
        """Answers of the node's model; the engines are not started when all of them are in the file."""
        cfg = task.cfg
        if [a.prompt_id for a in read_answers(path, repair=True)] == [p.id for p in prompts]:
            return read_answers(path)
        check_config(cfg, read_model_config(cfg.model.path), "generate")
        sampling = replace(sampling, stop_token_ids=load_chat(cfg.model).stop_token_ids)
        self.display.line(task.name, "loading the model")
        engines = self.session.answering(cfg, lambda text: self._say(task, text))
        with engines.awake():
            return answer_prompts(
                prompts, engines, rewards, sampling, n=n, seed=cfg.run.seed, path=path,
                progress=self._progress(task, "answers"), max_failed_share=cfg.rollout.max_failed_share,
            )  # fmt: skip

    def _prompts(self, files: Sequence[str], cfg: Config, max_per_task: int | None) -> list[Prompt]:
        return draw_prompts(load_prompts(files, cfg, load_chat(cfg.model)), max_per_task, cfg.run.seed)

    def _empty_sets(self, task: Task) -> list[str]:
        """Failure sets without a row; without any, all rows together when there is none."""
        nodes = self.graph.cfg.pipeline.nodes
        names = [n for n in getattr(task.node, "data", ()) if n in nodes and nodes[n].kind in ROW_KINDS]
        empty = [n for n in names if task.named[n].stat().st_size == 0]
        failed = [n for n in empty if nodes[n].kind == "sft_set"]
        return failed or (empty if len(empty) == len(task.rows) else [])

    def _run_config(self, task: Task, **rows: Mapping[str, Any]) -> Config:
        sections = {"model": {"path": str(task.model)}, "run": {"dir": str(task.folder), "name": RUN}}
        cfg = stage_config(task.base_cfg, task.name, **sections, **rows)
        check_space(cfg)
        return cfg

    def _run_display(self, name: str) -> Callable[[int, int], NodeDisplay]:
        return lambda total, first: NodeDisplay(self.display, name, total, first)

    def _progress(self, task: Task, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.display.line(task.name, f"{what} {done}/{total}")

    def _say(self, task: Task, text: str) -> None:
        log.info("%s: %s", task.name, text)
        self.display.line(task.name, text, keep=True)


@contextmanager
def scorer(cfg: Config) -> Iterator[Scorer]:
    """The rewards of a configuration, closed at the end."""
    rewards = build_rewards(cfg.rewards, cfg.reward_pool)
    try:
        yield rewards
    finally:
        rewards.close()


def _tasks_of(bucket: Path) -> list[str]:
    """The failing tasks that a diagnose node wrote."""
    found: list[str] = json.loads(bucket.read_text(encoding="utf-8"))["tasks"]
    return found


def open_run(path: Path, cfg: Config) -> tuple[RunFolder, bool]:
    """(run folder, resume?): a run with a checkpoint goes on; one that never reached one starts anew."""
    if path.is_dir():
        folder = RunFolder.open(path) if (path / "config.yaml").is_file() else None
        if folder is not None and folder.steps():
            return folder, True
        shutil.rmtree(path)
    return RunFolder.create(cfg), False


def draw_prompts_overall(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts by seed, in the files' order."""
    from redone.pipeline.rows import rank

    kept = {p.id for p in sorted(prompts, key=lambda p: rank(seed, "soft_labels", p.id))[:count]}
    return [p for p in prompts if p.id in kept]
