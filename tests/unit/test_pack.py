"""Planning and packing: every sample once, the budget kept, rows and positions of the unshared batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from redone.data.pack import (
    build_shards,
    pack,
    pad_row,
    plan_step,
    scatter_routes,
    scatter_rows,
    token_ratio,
)
from redone.errors import TrainerError
from redone.types import Batch, Piece, StepPlan, TrainGroup, Trajectory


def make_batch(shapes: list[tuple[int, list[int]]], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def trajectory(length: int) -> Trajectory:
        return Trajectory(
            token_ids=rng.integers(1, 1000, length).astype(np.int32),
            loss_mask=rng.random(length) > 0.2,
            advantages=rng.standard_normal(length).astype(np.float32),
            engine_logprobs=rng.standard_normal(length).astype(np.float32),
        )

    return Batch.of(
        [
            TrainGroup(
                prompt_id=f"p{i}",
                prompt_ids=rng.integers(1, 1000, prompt).astype(np.int32),
                trajectories=tuple(trajectory(n) for n in responses),
            )
            for i, (prompt, responses) in enumerate(shapes)
        ]
    )


RAGGED = [(40, [7, 1, 12, 12, 3, 9, 5, 5]), (17, [6] * 4), (1, [9, 4]), (25, [12]), (33, [5] * 16)]


def placed(plan: StepPlan) -> list[tuple[int, int]]:
    return sorted((p.group, i) for slot in plan.slots for pieces in slot for p in pieces for i in p.samples)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("budget", [52, 64, 200, 10_000])
def test_every_sample_is_placed_once_within_the_budget(budget: int, dp: int, sharing: bool) -> None:
    batch = make_batch(RAGGED)
    plan = plan_step(batch, dp, budget, sharing)
    assert placed(plan) == [(g, i) for g, (_, r) in enumerate(RAGGED) for i in range(len(r))]
    assert all(len(slot) == dp for slot in plan.slots)
    for shard in build_shards(batch, plan, pad_multiple=1):
        assert len(shard.microbatches) == plan.num_microbatches
        assert (shard.num_loss_tokens, shard.num_sequences) == (batch.num_loss_tokens, batch.num_sequences)
        assert all(len(m.token_ids) <= budget for m in shard.microbatches)


def test_sharing_keeps_a_group_together_and_stores_its_prompt_once() -> None:
    batch = make_batch([(100, [5] * 8)])
    shared = build_shards(batch, plan_step(batch, 1, 1000, True), 1)[0]
    alone = build_shards(batch, plan_step(batch, 1, 1000, False), 1)[0]
    assert sum(len(m.token_ids) for m in shared.microbatches) == 140
    assert sum(len(m.token_ids) for m in alone.microbatches) == 840


def test_ranks_get_nearly_equal_work() -> None:
    rng = np.random.default_rng(1)
    batch = make_batch([(int(rng.integers(20, 200)), [int(rng.integers(1, 60))] * 4) for _ in range(64)])
    plan = plan_step(batch, 4, 1024, True)
    loads = [sum(len(m.token_ids) for m in s.microbatches) for s in build_shards(batch, plan, 1)]
    assert max(loads) / (sum(loads) / 4) < 1.05


def test_a_small_batch_is_split_so_that_no_rank_idles() -> None:
    batch = make_batch([(10, [4] * 8)])
    plan = plan_step(batch, 4, 1000, True)
    assert plan.num_microbatches == 1
    assert all(len(pieces) == 1 for pieces in plan.slots[0])


def test_a_rank_without_work_runs_padding() -> None:
    batch = make_batch([(10, [4])])
    plan = plan_step(batch, 3, 1000, True)
    shards = build_shards(batch, plan, pad_multiple=2)
    sizes = sorted(len(s.microbatches[0].token_ids) for s in shards)
    assert sizes == [2, 2, 14]
    empty = next(s.microbatches[0] for s in shards if len(s.microbatches[0].token_ids) == 2)
    assert len(empty.rows) == 0 and empty.token_weight.tolist() == [0, 0] and not empty.pieces


def test_a_sample_longer_than_the_budget_is_refused_with_the_remedy() -> None:
    batch = make_batch([(10, [4]), (60, [8])])
    with pytest.raises(
        TrainerError, match=r"max_token_len_per_rank=64 .* p1 \(60 \+ 8 tokens\).* at least 68"
    ):
        plan_step(batch, 1, 64, True)


def test_the_plan_is_deterministic() -> None:
    assert plan_step(make_batch(RAGGED), 2, 80, True) == plan_step(make_batch(RAGGED), 2, 80, True)


def test_rows_predict_their_targets() -> None:
    """The row of each target is the token before it in the ordinary sequence [prompt, response]."""
    batch = make_batch(RAGGED)
    pieces = [Piece(group=0, samples=(2, 0, 5)), Piece(group=2, samples=(1, 0))]
    m = pack(batch, pieces, pad_multiple=8)
    assert len(m.token_ids) % 8 == 0
    at = 0
    for piece in pieces:
        group = batch.groups[piece.group]
        for i in piece.samples:
            trajectory = group.trajectories[i]
            n = len(trajectory.token_ids)
            full = np.concatenate([group.prompt_ids, trajectory.token_ids])
            start = len(group.prompt_ids)
            assert m.token_ids[m.rows[at : at + n]].tolist() == full[start - 1 : -1].tolist()
            assert m.positions[m.rows[at : at + n]].tolist() == list(range(start - 1, start + n - 1))
            assert m.targets[at : at + n].tolist() == trajectory.token_ids.tolist()
            assert m.advantages[at : at + n].tolist() == trajectory.advantages.tolist()
            assert m.loss_mask[at : at + n].tolist() == trajectory.loss_mask.tolist()
            assert len(set(m.sequence_ids[at : at + n].tolist())) == 1
            at += n
    assert at == len(m.rows) and len(set(m.sequence_ids.tolist())) == 5
    assert m.old_logprobs is None


def test_segments_cover_the_row_without_gaps() -> None:
    batch = make_batch(RAGGED)
    m = pack(batch, [Piece(group=g, samples=tuple(range(len(r)))) for g, (_, r) in enumerate(RAGGED)], 16)
    spans = [span for s in m.segments for span in ((s.start, s.length), *s.responses)]
    ends = np.cumsum([0] + [n for _, n in spans])
    assert [a for a, _ in spans] == ends[:-1].tolist() and ends[-1] == len(m.token_ids)


def test_token_weight_is_the_multiplicity_in_the_unshared_batch() -> None:
    batch = make_batch([(3, [2, 2])])
    m = pack(batch, [Piece(group=0, samples=(0, 1))], pad_multiple=4)
    assert m.token_weight.tolist() == [2, 2, 2, 1, 1, 1, 1, 0]


def test_scatter_undoes_the_cut() -> None:
    batch = make_batch(RAGGED)
    for dp, budget, sharing in ((1, 10_000, True), (2, 80, True), (3, 60, False)):
        plan = plan_step(batch, dp, budget, sharing)
        shards = build_shards(batch, plan, pad_multiple=4)
        rows = [[m.targets.astype(np.float32) for m in s.microbatches] for s in shards]
        result = scatter_rows(batch, plan, rows)
        for group, values in zip(batch.groups, result, strict=True):
            for trajectory, value in zip(group.trajectories, values, strict=True):
                assert value.tolist() == trajectory.token_ids.tolist()


def test_scatter_refuses_rows_of_another_plan() -> None:
    batch = make_batch(RAGGED)
    plan = plan_step(batch, 1, 10_000, True)
    with pytest.raises(TrainerError, match="rows"):
        scatter_rows(batch, plan, [[np.zeros(3, np.float32)]])


def test_some_trajectories_without_old_logprobs_are_refused() -> None:
    batch = make_batch([(3, [2]), (4, [3])])
    filled = batch.with_logprobs("old_logprobs", [[np.zeros(2, np.float32)], [np.zeros(3, np.float32)]])
    mixed = Batch.of([batch.groups[0], filled.groups[1]])
    pieces = [Piece(group=0, samples=(0,)), Piece(group=1, samples=(0,))]
    assert pack(filled, pieces, 1).old_logprobs is not None
    with pytest.raises(TrainerError, match="1 of 2"):
        pack(mixed, pieces, 1)


def routed(batch: Batch) -> Batch:
    """Every token's routes are its own number: [1, 2] layers x choices filled with a running count."""
    count = 0
    groups = []
    for group in batch.groups:
        spans = [len(group.prompt_ids), *(len(t.token_ids) for t in group.trajectories)]
        parts = []
        for n in spans:
            parts.append(np.arange(count, count + n, dtype=np.int16)[:, None, None].repeat(2, 2))
            count += n
        members = zip(group.trajectories, parts[1:], strict=True)
        groups.append(
            dataclasses.replace(
                group,
                prompt_routes=parts[0],
                trajectories=tuple(dataclasses.replace(t, routes=r) for t, r in members),
            )
        )
    return Batch.of(groups)


def test_routes_follow_their_tokens_through_any_cut() -> None:
    plain = make_batch(RAGGED)
    given = routed(plain)
    for dp, budget, sharing in ((1, 10_000, True), (2, 80, True), (3, 60, False)):
        plan = plan_step(given, dp, budget, sharing)
        shards = build_shards(given, plan, pad_multiple=4)
        found = scatter_routes(plain, plan, [[m.routes for m in s.microbatches] for s in shards])
        for a, b in zip(found.groups, given.groups, strict=True):
            assert np.array_equal(a.prompt_routes, b.prompt_routes)
            for x, y in zip(a.trajectories, b.trajectories, strict=True):
                assert np.array_equal(x.routes, y.routes)


def test_some_tokens_without_routes_are_refused() -> None:
    given = routed(make_batch([(3, [2]), (4, [3])]))
    lost = dataclasses.replace(given.groups[1], prompt_routes=None)
    pieces = [Piece(group=0, samples=(0,)), Piece(group=1, samples=(0,))]
    with pytest.raises(TrainerError, match="1 of 4"):
        pack(dataclasses.replace(given, groups=(given.groups[0], lost)), pieces, 1)


def test_a_padded_row_is_the_row_with_padding() -> None:
    given = routed(make_batch([(3, [2, 2])]))
    row = pack(given, [Piece(group=0, samples=(0, 1))], 1)
    padded = pad_row(row, 12)
    assert pad_row(row, 7) is row
    assert len(padded.token_ids) == len(padded.positions) == len(padded.routes) == 12
    assert padded.token_weight.tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert (padded.segments[-1].start, padded.segments[-1].length) == (7, 5)
    assert np.array_equal(padded.rows, row.rows)
    assert padded.routes[-1].tolist() == [[0, 1]]


def test_token_ratio_counts_the_plan() -> None:
    batch = make_batch([(100, [5] * 8)])
    assert token_ratio(batch, plan_step(batch, 1, 1000, True)) == 840 / 140
    assert token_ratio(batch, plan_step(batch, 1, 1000, False)) == 1.0
