"""What goes wrong behind the digests is found by the canary, which names the layer: real ranks and engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from redone.cluster.canary import as_batch
from redone.cluster.cluster import RayCluster
from redone.errors import SyncError
from redone.types import Batch, TrainGroup, Trajectory
from redone.weights.layers import FLOOR, gate_point, point_names, relative_differences
from tests.engines import plants
from tests.engines.harness import HeldWeights
from tests.engines.plants import plant, push_random

NORMAL_EPSILON = 1e-6

pytestmark = pytest.mark.slow  # eight cases behind one start of two trainer ranks and an engine


def check(cluster: RayCluster) -> dict[str, float]:
    return cluster.trainers().check_canary(cluster.engines(), version=0)


def refused(cluster: RayCluster) -> str:
    with pytest.raises(SyncError) as caught:
        check(cluster)
    return str(caught.value)


def test_streams_of_both_sides_equal_hugging_face(cluster: RayCluster, tmp_path: Path) -> None:
    """All points, tensor-parallel with sequence parallelism on the trainer's side; whatever weights the tests
    before this one left."""
    cluster.trainers().export(str(tmp_path / "now"))
    sequence = cluster.trainers().canary.sequences[0]
    ours = cluster.trainers().streams(as_batch([sequence]))
    theirs = cluster.engines().streams(0, sequence, cached=False)
    gates = [gate_point(layer) for layer in range(4)]
    assert list(theirs) == point_names(4) and set(ours) == {*theirs, *gates}
    assert {ours[p].shape for p in theirs} == {(len(sequence), 64)}
    differences = relative_differences(ours, theirs)
    assert max(differences.values()) < FLOOR["float32"], differences
    held = HeldWeights(tmp_path / "now")
    with torch.no_grad():
        model = held.model(
            torch.tensor([list(sequence)]), output_hidden_states=True, output_router_logits=True
        )
    states = model.hidden_states
    expected = {"model.embed_tokens": states[0], "model.layers.1.mlp": states[2], "model.norm": states[4]}
    for point, state in expected.items():
        assert np.abs(state[0].numpy() - ours[point]).max() <= 1e-5, point
    for gate, logits in zip(gates, model.router_logits, strict=True):
        best = logits.topk(3).values  # two experts per token
        assert np.abs((best[:, 1:2] - best[:, 2:]).numpy() - ours[gate]).max() <= 1e-5, gate


def test_a_healthy_pair_passes(cluster: RayCluster) -> None:
    assert check(cluster)["sync/canary_max_abs_diff"] <= 1e-5


def test_a_wrong_norm_epsilon_in_layer_2_is_named_before_step_1(cluster: RayCluster) -> None:
    """The parity gate is this check, at version 0."""
    (engine,) = cluster.engines().peers
    assert plant(engine, plants.norm_epsilon, 2, 1e-3) == pytest.approx(NORMAL_EPSILON)
    message = refused(cluster)
    plant(engine, plants.norm_epsilon, 2, NORMAL_EPSILON)
    assert "the first diverging layer is model.layers.2, attention (input_layernorm, self_attn)" in message
    assert "engine 0 disagrees with the trainer" in message and "weights.canary.tolerance" in message
    check(cluster)


def test_a_wrong_norm_in_the_trainers_mlp_is_named(cluster: RayCluster) -> None:
    peers = cluster.trainers().peers
    for peer in peers:
        plant(peer, plants.trainer_mlp_epsilon, 1, 1e-3)
    message = refused(cluster)
    for peer in peers:
        plant(peer, plants.trainer_mlp_epsilon, 1, NORMAL_EPSILON)
    assert "model.layers.1, MLP (post_attention_layernorm, mlp)" in message


def test_an_expert_corrupted_after_loading_is_named(cluster: RayCluster) -> None:
    (engine,) = cluster.engines().peers
    plant(engine, plants.flip_expert, 3)
    message = refused(cluster)
    plant(engine, plants.flip_expert, 3)
    assert "model.layers.3, MLP" in message
    check(cluster)


def test_a_tie_between_experts_is_told_from_a_fault(cluster: RayCluster) -> None:
    """Two experts of layer 1 that are chosen by the sixth digit, the other way round on the engine: every set
    of sequences meets such tokens, so the check gives up in the end, and says why."""
    for peer in cluster.trainers().peers:
        plant(peer, plants.trainer_tie, 1)
    cluster.trainers().push(cluster.engines(), 13)
    (engine,) = cluster.engines().peers
    plant(engine, plants.engine_tie, 1, True)
    message = refused(cluster)
    plant(engine, plants.engine_tie, 1, False)
    assert "model.layers.1, MLP" in message and "a tie that rounding decides" in message
    assert push_random(cluster, 14)["sync/canary_max_abs_diff"] <= 1e-4


def test_experts_that_are_not_packed_again_are_named(cluster: RayCluster) -> None:
    (engine,) = cluster.engines().peers
    plant(engine, plants.keep_packing, True)
    with pytest.raises(SyncError, match=r"version 11: .*model.layers.0, MLP"):
        push_random(cluster, 11)
    plant(engine, plants.keep_packing, False)
    assert push_random(cluster, 12)["sync/canary_max_abs_diff"] <= 1e-4


def test_a_stale_cache_is_named(cluster: RayCluster) -> None:
    (engine,) = cluster.engines().peers
    push_random(cluster, 21)  # leaves the probe's keys and values in the cache
    plant(engine, plants.keep_caches, True)
    with pytest.raises(SyncError, match=r"model.layers.0, attention .*prefix cache holds keys and values"):
        push_random(cluster, 22)
    plant(engine, plants.keep_caches, False)
    assert push_random(cluster, 23)["sync/canary_max_abs_diff"] <= 1e-4


def test_old_logprobs_bring_the_routes_that_training_repeats(cluster: RayCluster) -> None:
    """R2, over real ranks: score_old records the trainer's own expert choices, and logprobs obeys them."""
    trainers = cluster.trainers()
    rng = np.random.default_rng(3)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 200, length).astype(np.int32)

    groups = [
        TrainGroup(
            prompt_id=f"p{i}",
            prompt_ids=ids(5),
            trajectories=tuple(Trajectory.unscored(ids(7)) for _ in "ab"),
        )
        for i in range(2)
    ]
    scored = trainers.score_old(Batch.of(groups))
    free, repeated = trainers.logprobs(Batch.of(groups)), trainers.logprobs(scored)
    altered = dataclasses.replace(scored, groups=tuple(map(with_other_experts, scored.groups)))
    forced = trainers.score_old(altered)
    for i, group in enumerate(scored.groups):
        assert group.prompt_routes is not None and group.prompt_routes.shape == (5, 4, 2)
        for k, trajectory in enumerate(group.trajectories):
            assert trajectory.routes is not None and trajectory.routes.shape == (7, 4, 2)
            assert trajectory.old_logprobs is not None
            for other in (free[i][k], repeated[i][k]):
                np.testing.assert_allclose(other, trajectory.old_logprobs, rtol=0, atol=1e-5)
            obeyed = forced.groups[i].trajectories[k]
            assert np.array_equal(obeyed.routes, altered.groups[i].trajectories[k].routes)
            assert np.abs(obeyed.old_logprobs - trajectory.old_logprobs).max() > 1e-4


def with_other_experts(group: TrainGroup) -> TrainGroup:
    """Every choice moved on by one of the eight experts."""
    trajectories = tuple(dataclasses.replace(t, routes=(t.routes + 1) % 8) for t in group.trajectories)
    return dataclasses.replace(group, prompt_routes=(group.prompt_routes + 1) % 8, trajectories=trajectories)
