"""trainer.offload: a trainer that gives its memory away between all calls trains as one that never does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import worker


def sleeping(kind: str, layout: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Three updates with and without sleep, a checkpoint and a publication made asleep: what differs."""
    batches = worker.load_reference(kind)["batches"]
    plain = _run(kind, layout, batches, options)
    found = _run(kind, layout, batches, options, offload=True)
    result: dict[str, Any] = {
        "metrics": [plain["metrics"], found["metrics"]],
        "held": found["held"],
        "states": found["states"],
        "parts": found["parts"],
        "published": found["published"],
    }
    if plain["weights"]:
        result["differing"] = [
            n for n, w in plain["weights"].items() if not torch.equal(w, found["weights"][n])
        ]
        result["logprobs"] = worker.max_diff(plain["logprobs"], found["logprobs"])
    return result


def _run(
    kind: str, layout: tuple[int, ...], batches: list[Any], options: dict[str, Any], offload: bool = False
) -> dict[str, Any]:
    """Through the public methods; asleep before and after each of them."""
    from redone.weights.channel import ShmReader
    from redone.weights.digest import bucket_digests

    trainer = worker.make_trainer(worker.model_folder(kind), layout, offload=offload, **options)
    held, states, metrics = [], [], []
    path = str(worker.FOLDER / f"asleep-{kind}-{offload}-{len(options)}-{layout[2]}")
    trainer.hold("none")
    for step, batch in enumerate(batches):
        shard = worker.shard_of(trainer, batch)[1]
        states.append(trainer.memory()["states"])
        trainer.hold("all")
        states.append(trainer.memory()["states"])
        report = trainer.update(shard, trainer.cfg.algorithm)
        metrics.append((report.loss, report.grad_norm))
        states.append(trainer.memory()["states"])
        trainer.hold("weights")
        states.append(trainer.memory()["states"])
        trainer.hold("none")
        if step == 1:  # asleep: what these need comes and goes
            trainer.save(path)
            held.append(trainer.residence.held)
            trainer.update(shard, trainer.cfg.algorithm)
            trainer.load(path)
            held.append(trainer.residence.held)
    logprobs = worker.gather_logprobs(trainer, batches[0])
    published = [b.digests for b in trainer.publish(str(worker.FOLDER / f"channel-{offload}"), 1)]
    wanted = []
    if dist.get_rank() == 0:
        reader = ShmReader(str(worker.FOLDER / f"channel-{offload}"), trainer.plan.total_bytes)
        wanted = [bucket_digests(trainer.plan, i, reader) for i in range(len(published))]
    held.append(trainer.residence.held)
    with trainer.residence.with_("all"):
        storages = trainer.residence._storages
        parts = {s: sum(x.nbytes() for x in storages(s)) for s in ("weights", "gradients", "optimizer")}
    with trainer.residence.with_("weights"):
        weights = worker.weights(trainer)
    trainer.close()
    return {
        "held": held, "states": states, "metrics": metrics, "logprobs": logprobs, "weights": weights,
        "parts": parts, "published": published == wanted and (dist.get_rank() > 0 or len(published) > 0),
    }  # fmt: skip
