"""A plan as text."""

from __future__ import annotations

from redone.planner.report import GB, Plan, gate, warnings


def render(plan: Plan) -> str:
    """The plan as text."""
    lay, seconds = plan.chosen.job.layout, plan.chosen.seconds
    lines = [
        f"plan of {plan.name}: {lay.nodes} nodes, {lay.gpus} x {lay.gpu.name.upper()}"
        " (predicted, not measured)",
        f"layout: {lay.name()}",
        "",
        "memory per rank [GB]",
        f"  {'phase':18s} {'rank':18s} {'need':>7s} {'limit':>7s}         binds",
    ]
    for p in plan.chosen.memory:
        lines.append(
            f"  {p.phase:18s} {p.rank:18s} {p.total / GB:7.1f} {p.limit / GB:7.1f}  {p.colour:6s} {p.binds}"
        )
    lines += ["", *_seconds_lines(plan)]
    fastest = f"fastest layouts that fit (differences below x {plan.band:g} lie inside the band)"
    for title, chosen in (("nearest layouts that fit", plan.near), (fastest, plan.best)):
        if chosen:
            lines += ["", title]
            lines += [f"  {x.seconds.step:7.1f} s  {x.job.layout.name()}" for x in chosen]
    if not seconds.step or plan.assumed:
        lines += ["", "assumed", *(f"  {text}" for text in plan.assumed)]
    for title, texts in (("blocks", gate(plan)), ("warnings", warnings(plan))):
        if texts:
            lines += ["", title, *(f"  {text}" for text in texts)]
    return "\n".join(lines)


def _seconds_lines(plan: Plan) -> list[str]:
    lay, s = plan.chosen.job.layout, plan.chosen.seconds
    if plan.refused:
        rows = [f"  {what}: {step:.0f} s a step" for what, step in plan.sensitivity]
        return ["seconds per step: not predicted", *(f"  {r}" for r in plan.refused), "  sensitivity:", *rows]
    low, high = s.step / plan.band, s.step * plan.band
    rate = plan.tokens / s.step / lay.gpus
    lines = [f"seconds per step: {s.step:.1f}   P10-P90 {low:.1f} .. {high:.1f}"]
    for name, value in (
        ("rollout", s.rollout),
        ("  of it tail", s.tail),
        ("log-probabilities", s.logprobs),
        ("update", s.update),
        ("weight update", s.sync),
        ("fixed", s.fixed),
    ):
        lines.append(f"  {name:18s} {value:7.1f}   {value / plan.band:.1f} .. {value * plan.band:.1f}")
    return [
        *lines,
        f"tokens/s/GPU: {rate:.0f}   P10-P90 {rate / plan.band:.0f} .. {rate * plan.band:.0f}",
        f"samples/s: {plan.chosen.job.work.sequences / s.step:.1f}",
        f"MFU: {plan.update_mfu:.1%} of the updates, {plan.step_mfu:.1%} of the step",
    ]
