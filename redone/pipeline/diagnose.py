"""Which tasks a model fails, and why: from its scored answers, the base model's, and constant answers."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from redone.algo.stats import Z95, answer_entropy, paired_bootstrap
from redone.api import Scorer
from redone.config.pipeline import DiagnoseNode
from redone.evaluate.runner import normalise
from redone.pipeline.answers import NO_IDS, NO_LOGPROBS, Answers
from redone.types import Completion, Prompt

MAX_CONSTANTS = 5  # constant answers tried per task
ALWAYS_TRIED = ("[]", "")  # empty answers: notorious for scoring well (SNS-Bench CHLW: 67.6)
DOMINANT = 0.5  # share of one answer from which a gain may be that answer's alone
GAP = 0.15  # pass@k - mean@k from which sampling finds answers that the mean does not show
SOLVED = 0.9
MIN_SLICE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceReport:
    name: str  # "key=value"
    n: int
    pass_rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """One task. Rates are over prompts; `low`, `high`: 95 % interval over prompts."""

    task: str
    domain: str
    n: int
    k: int  # answers per prompt
    pass_rate: float  # mean@k
    low: float
    high: float
    pass_at_k: float  # prompts with at least one correct answer
    mean_score: float
    best_score: float  # mean over prompts of the best of k
    reward_scale: tuple[float, float, float, float]  # min, max, mean, standard deviation over answers
    group_std: float  # mean over prompts of the standard deviation within
    informative: float  # share of prompts whose answers differ in reward: what RL can learn from
    mean_tokens: float
    cut: float  # share of answers that hit the length limit
    common_answer: str
    common_share: float
    entropy: float  # of the answers, nats
    failed_rewards: int
    constant_answer: str
    constant_score: float  # mean score of that answer on these prompts
    base_score: float | None = None
    difference: tuple[float, float, float] | None = None  # against base: mean, low, high
    p_value: float | None = None
    verdict: str = ""
    flags: tuple[str, ...] = ()
    failing: bool = False
    rank: float = 0.0  # weight * how far below the threshold; the weakest task has the largest
    slices: tuple[SliceReport, ...] = field(default=())


def diagnose(
    answers: Sequence[Answers],
    base: Sequence[Answers] | None,
    constants: Mapping[str, tuple[str, float]],
    node: DiagnoseNode,
) -> list[TaskReport]:
    """One report per task, weakest first. `constants`: task -> (best constant answer, its mean score)."""
    by_task = _by_task(answers)
    before = _by_task(base or ())
    reports = [
        _report(task, found, before.get(task), constants.get(task), node) for task, found in by_task.items()
    ]
    return sorted(reports, key=lambda r: (-r.rank, r.task))


def failing(reports: Sequence[TaskReport], max_tasks: int | None) -> list[TaskReport]:
    """The bucket: failing tasks, weakest first."""
    return [r for r in reports if r.failing][:max_tasks]


def _by_task(answers: Sequence[Answers]) -> dict[str, list[Answers]]:
    found: dict[str, list[Answers]] = defaultdict(list)
    for a in answers:
        if a.usable():
            found[a.task].append(a)
    return dict(found)


def _report(
    task: str,
    answers: Sequence[Answers],
    before: Sequence[Answers] | None,
    constant: tuple[str, float] | None,
    node: DiagnoseNode,
) -> TaskReport:
    samples = [s for a in answers for s in a.usable()]
    raw = np.asarray([s.raw for s in samples])
    groups = [np.asarray([s.raw for s in a.usable()]) for a in answers]
    pass_rates = [a.pass_rate for a in answers]
    low, high = mean_interval(pass_rates)
    texts = Counter(normalise(s.text) for s in samples)
    common, count = texts.most_common(1)[0]
    plain = TaskReport(
        task=task,
        domain=answers[0].domain,
        n=len(answers),
        k=max(len(a.samples) for a in answers),
        pass_rate=float(np.mean(pass_rates)),
        low=low,
        high=high,
        pass_at_k=float(np.mean([any(s.correct for s in a.usable()) for a in answers])),
        mean_score=float(np.mean([a.mean_score for a in answers])),
        best_score=float(np.mean([g.max() for g in groups])),
        reward_scale=(float(raw.min()), float(raw.max()), float(raw.mean()), float(raw.std())),
        group_std=float(np.mean([g.std() for g in groups])),
        informative=float(np.mean([g.max() - g.min() > 1e-6 for g in groups])),
        mean_tokens=float(np.mean([s.tokens for s in samples])),
        cut=float(np.mean([s.finish == "length" for s in samples])),
        common_answer=common,
        common_share=count / len(samples),
        entropy=answer_entropy(texts.elements()),
        failed_rewards=sum(len(a.samples) - len(a.usable()) for a in answers),
        constant_answer=constant[0] if constant else "",
        constant_score=constant[1] if constant else 0.0,
        slices=_slices(answers, node.slices),
    )
    return _judged(plain, answers, before, node)


def _judged(
    r: TaskReport, answers: Sequence[Answers], before: Sequence[Answers] | None, node: DiagnoseNode
) -> TaskReport:
    """The report with comparison, verdict, flags and rank."""
    from dataclasses import replace

    flags: list[str] = []
    pairs = _pairs(before, answers)
    if pairs:
        interval = paired_bootstrap([b for b, _ in pairs], [a for _, a in pairs])
        r = replace(
            r,
            base_score=float(np.mean([b for b, _ in pairs])),
            difference=(interval.mean, interval.low, interval.high),
            p_value=interval.p_value,
        )
        if interval.mean < -node.regression and interval.p_value < 0.05:
            flags.append("regression")
        explained = r.constant_score >= r.mean_score or (
            r.common_share > DOMINANT and normalise(r.constant_answer) == r.common_answer
        )
        if interval.mean > 0 and explained:
            flags.append("gain explained by a constant answer")
    if r.constant_score >= r.mean_score > 0:
        flags.append("no better than a constant answer")
    if r.common_share > 0.8 and r.constant_score < SOLVED and r.n > 1:
        flags.append("collapsed to one answer")
    if r.cut > 0.2:
        flags.append("answers cut by the length limit")
    if r.failed_rewards:
        flags.append("rewards failed")
    measured = r.pass_rate if node.score == "pass_rate" else r.mean_score
    weight = node.weights.get(r.task, 1.0)
    lost = "regression" in flags or (node.constant_fails and any("constant" in f for f in flags))
    fails = measured < node.fail_below or lost
    rank = weight * max(node.fail_below - measured, 0.05 if lost else measured - 1.0)
    return replace(r, flags=tuple(flags), verdict=verdict(r), failing=fails, rank=rank)


def verdict(r: TaskReport) -> str:
    """Which cure fits: what sampling finds RL can reinforce, what it never finds must be shown."""
    if r.pass_rate >= SOLVED:
        return "solved"
    if r.pass_at_k - r.pass_rate >= GAP or (r.k > 1 and r.informative >= 0.5):
        return "learnable by RL"
    if r.pass_at_k <= max(0.1, r.pass_rate + 1e-9) and r.informative < 0.2:
        return "missing knowledge"
    return "mixed"


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of per-prompt rates in [0, 1]: Wilson's form with the rates' own variance.

    For 0/1 values it is Wilson's interval; graded rates vary less and get a narrower one.
    """
    n = len(values)
    p = float(np.mean(values))
    bernoulli = p * (1 - p)
    # The effective number of 0/1 trials: as if every prompt counted variance_ratio times.
    ratio = min(max(float(np.var(values)) / bernoulli, 0.05), 1.0) if bernoulli > 0 else 1.0
    m = n / ratio
    scale = 1 + Z95**2 / m
    centre = (p + Z95**2 / (2 * m)) / scale
    half = Z95 * math.sqrt(bernoulli / m + Z95**2 / (4 * m * m)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def _pairs(before: Sequence[Answers] | None, after: Sequence[Answers]) -> list[tuple[float, float]]:
    old = {a.prompt_id: a.mean_score for a in before or () if a.usable()}
    return [(old[a.prompt_id], a.mean_score) for a in after if a.prompt_id in old]


def _slices(answers: Sequence[Answers], keys: Sequence[str]) -> tuple[SliceReport, ...]:
    cut: dict[str, list[float]] = defaultdict(list)
    labels = Counter(a.reference for a in answers)
    if 2 <= len(labels) <= 20 and len(answers) >= 2 * len(labels):
        for a in answers:
            cut[f"reference={a.reference}"].append(a.pass_rate)
    for key in keys:
        for a in answers:
            if key in a.slices:
                cut[f"{key}={a.slices[key]}"].append(a.pass_rate)
    found = []
    for name, rates in sorted(cut.items()):
        if len(rates) >= MIN_SLICE:
            low, high = mean_interval(rates)
            found.append(
                SliceReport(name=name, n=len(rates), pass_rate=float(np.mean(rates)), low=low, high=high)
            )
    return tuple(found)


def constant_candidates(prompts: Sequence[Prompt], answers: Sequence[Answers]) -> list[str]:
    """Constant answers worth trying on one task: the commonest references, the model's commonest answer, and
    empty ones."""
    from redone.evaluate.runner import reference_text

    references = Counter(reference_text(p.reference) for p in prompts)
    texts = Counter(s.text.strip() for a in answers for s in a.samples)
    commonest = [t for t, _ in texts.most_common(1)]
    tried = [*(t for t, _ in references.most_common(MAX_CONSTANTS - 3)), *commonest, *ALWAYS_TRIED]
    return list(dict.fromkeys(tried))[:MAX_CONSTANTS]


def score_constants(
    prompts: Sequence[Prompt], answers: Sequence[Answers], rewards: Scorer, items: int
) -> dict[str, tuple[str, float]]:
    """task -> (constant answer with the highest mean reward, that mean), on at most `items` prompts each.

    Chosen on the prompts that it is scored on: no constant among those tried does better there.
    """
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_task[prompt.task].append(prompt)
    given: dict[str, list[Answers]] = defaultdict(list)
    for a in answers:
        given[a.task].append(a)
    return asyncio.run(_best_constants({t: p[:items] for t, p in by_task.items()}, given, rewards))


async def _best_constants(
    by_task: Mapping[str, Sequence[Prompt]], answers: Mapping[str, Sequence[Answers]], rewards: Scorer
) -> dict[str, tuple[str, float]]:
    best: dict[str, tuple[str, float]] = {}
    for task, prompts in by_task.items():
        for text in constant_candidates(prompts, answers.get(task, ())):
            completion = Completion(
                token_ids=NO_IDS, text=text, logprobs=NO_LOGPROBS, finish="stop", versions=()
            )
            scores = await asyncio.gather(*(rewards.score_group(p, [completion]) for p in prompts))
            usable = [s.raw for (s,) in scores if s.status == "ok"]
            mean = sum(usable) / len(usable) if usable else 0.0
            if task not in best or mean > best[task][1]:
                best[task] = (text, mean)
    return best
