"""Devices that trainer and engines share in turn (trainer.offload), and engines with GPUs of their own."""

from __future__ import annotations

import pytest

from redone.cluster.placement import engine_seats, trainer_seats
from redone.cluster.turns import Turns
from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import ConfigError, RedoneError

VALUES = {"model": {"path": "m"}, "data": {"train": ["t"]}, "rewards": {"default": {"family": "exact"}}}


class Devices:
    """Readings of two ranks; `used` in GB of the fuller one."""

    def __init__(self) -> None:
        self.used, self.peak = 1.0, 1.0

    def read(self) -> list[dict[str, float]]:
        peak, self.peak = self.peak, self.used
        return [{"states": 0.0, "used": u * 1e9, "peak": max(u, p) * 1e9}
                for u, p in ((self.used, peak), (self.used / 2, peak / 2))]  # fmt: skip


def test_the_order_of_a_step() -> None:
    turns = Turns(list)
    turns.engines_become("all")
    with pytest.raises(RedoneError, match="engines hold everything while the trainer holds weights"):
        turns.trainer_becomes("weights")
    assert turns.trainer == "none"
    turns.engines_become("none")
    turns.trainer_becomes("all")
    with pytest.raises(RedoneError, match="engines hold weights while the trainer holds everything"):
        turns.engines_become("weights")
    turns.trainer_becomes("weights")
    turns.engines_become("weights")
    with pytest.raises(RedoneError, match="one side has to sleep first"):
        turns.engines_become("all")  # the cache, before the trainer sleeps
    turns.trainer_becomes("none")
    turns.engines_become("all")


def test_every_phase_is_accounted_for() -> None:
    devices = Devices()
    turns = Turns(devices.read)
    with turns.phase("rollout"):
        devices.used = 60.0
        turns.look()
        devices.used = 1.5
    with turns.phase("update"):
        devices.used, devices.peak = 40.0, 70.0
        with turns.phase("weight_update"):
            devices.used, devices.peak = 30.0, 33.0
            with turns.phase("rollout"):  # the canary
                devices.used = 62.0
                turns.look()
                devices.used = 2.0
        devices.used = 1.6
    assert turns.take_metrics() == pytest.approx({
        "memory/rollout_before_gb": 30.0, "memory/rollout_peak_gb": 62.0, "memory/rollout_after_gb": 2.0,
        "memory/update_before_gb": 1.5, "memory/update_peak_gb": 70.0, "memory/update_after_gb": 1.6,
        "memory/weight_update_before_gb": 40.0, "memory/weight_update_peak_gb": 33.0,
        "memory/weight_update_after_gb": 2.0,
    })  # fmt: skip
    assert turns.take_metrics() == {}


def test_a_failed_phase_reads_nothing_more() -> None:
    reads: list[int] = []
    turns = Turns(lambda: reads.append(1) or [])  # type: ignore[func-returns-value]
    with pytest.raises(RuntimeError), turns.phase("update"):
        raise RuntimeError
    assert len(reads) == 1


def two_nodes(**rollout: object) -> Config:
    """Four GPUs a node for the trainer."""
    return config_from_dict(
        {**VALUES, "cluster": {"device": "cuda", "nodes": 2, "gpus_per_node": 4},
         "weights": {"channel": "collective"},
         "rollout": {"replicas": 4, "tensor_model_parallel_size": 2, **rollout}}
    )  # fmt: skip


def test_engines_with_gpus_of_their_own_share_none() -> None:
    own, shared = two_nodes(gpus_per_node=4), two_nodes()
    for cfg in (own, shared):
        check_config(cfg, None, "generate")
    assert [s.gpus for s in engine_seats(shared, {})] == [(0, 1), (2, 3)] * 2
    assert [s.gpus for s in engine_seats(own, {})] == [(4, 5), (6, 7)] * 2
    assert [s.bundle for s in engine_seats(own, {})] == [0, 0, 1, 1]
    assert engine_seats(own, {})[1].env["CUDA_VISIBLE_DEVICES"] == "6,7"
    taken = {(s.bundle, gpu) for s in trainer_seats(own) for gpu in s.gpus}
    assert not taken & {(s.bundle, gpu) for s in engine_seats(own, {}) for gpu in s.gpus}
    assert (own.node_gpus, shared.node_gpus) == (8, 4)
    assert (own.shared_gpus, shared.shared_gpus) == (False, True)


@pytest.mark.parametrize(
    ("rollout", "offload", "message"),
    [
        ({"gpus_per_node": 3}, False, "=2 does not divide rollout.gpus_per_node=3"),
        ({"gpus_per_node": 2}, False, "= 8 exceeds the 4 GPUs of cluster.nodes . rollout.gpus_per_node"),
        ({"gpus_per_node": 4}, True, "trainer.offload=true with rollout.gpus_per_node=4"),
    ],
)
def test_what_their_gpus_do_not_allow(rollout: dict[str, object], offload: bool, message: str) -> None:
    cfg = two_nodes(**rollout)
    trainer = cfg.trainer.model_copy(update={"offload": offload})
    with pytest.raises(ConfigError, match=message):
        check_config(cfg.model_copy(update={"trainer": trainer}), None, "generate")


def test_generating_ahead_needs_them() -> None:
    ahead = {"max_staleness": 1}
    algorithm = {"importance": {"level": "token"}, "train_batch_size": 4, "ppo_mini_batch_size": 4}
    for own in (0, 4):
        cfg = two_nodes(gpus_per_node=own, **ahead).model_dump()
        cfg = config_from_dict({**cfg, "algorithm": algorithm})
        try:
            check_config(cfg, None, "rl")
            found = ""
        except ConfigError as error:
            found = str(error)
        assert ("rollout.max_staleness=1: engines and trainer use the same GPUs in turn" in found) == (
            not own
        )


def test_on_a_cpu_there_are_none() -> None:
    cfg = config_from_dict({**VALUES, "rollout": {"gpus_per_node": 1}})
    with pytest.raises(ConfigError, match=r"rollout.gpus_per_node=1 needs cluster.device=cuda"):
        check_config(cfg, None, "generate")


def test_not_while_both_work_at_once() -> None:
    cfg = config_from_dict(
        {**VALUES, "trainer": {"offload": True}, "rollout": {"max_staleness": 1},
         "algorithm": {"importance": {"level": "token"}}}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"trainer.offload=true with rollout.max_staleness=1"):
        check_config(cfg, None, "generate")
