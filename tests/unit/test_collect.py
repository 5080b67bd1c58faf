"""Dynamic sampling and batch building, with a fake engine fleet and a fake reward."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from redone.config.schema import Config
from redone.data.stream import PromptStream, sampling_seed
from redone.errors import EngineError, RedoneError
from redone.reward.base import failed
from redone.rollout.build import build_batch
from redone.rollout.collect import Collected, collect, tail_seconds
from redone.types import Completion, Message, Prompt, Sampling, Score, VersionSpan

N = 4


def prompt(i: int) -> Prompt:
    return Prompt(
        id=f"p{i:02d}",
        task=f"task{i % 2}",
        domain="sns",
        data_source="t",
        messages=(Message(role="user", content=str(i)),),
        token_ids=np.arange(i + 1, dtype=np.int32),
        reference=i,
        reward="default",
    )


def config(**changes) -> Config:
    """`section__key=value` changes a leaf."""
    tree = {
        "model": {"path": "x"},
        "data": {"train": (), "max_response_length": 8},
        "rewards": {"default": {"family": "exact"}},
        "algorithm": {"train_batch_size": 4, "ppo_mini_batch_size": 4, "filter_groups": {}},
        "rollout": {"n": N, "temperature": 0.8},
    }
    for key, value in changes.items():
        *path, leaf = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return Config.model_validate(tree)


class FakeFleet:
    """Answers sample index i of a prompt with i + 1 tokens; `delays` lets prompts finish in another
    order."""

    def __init__(self, delays=None, finish=None, broken=None):
        self.requests: list[tuple[int, Sampling, tuple[int, ...]]] = []
        self._delay = delays or (lambda i: 0.0)
        self._finish = finish or (lambda i, sample: "stop")
        self._broken = broken

    async def generate(self, prompt_ids, sampling, seeds):
        i = len(prompt_ids) - 1
        self.requests.append((i, sampling, tuple(seeds)))
        await asyncio.sleep(self._delay(i))
        if self._broken == i:
            raise EngineError("the engine died")
        return [
            Completion(
                token_ids=np.full(sample + 1, seed % 97, dtype=np.int32),
                text=f"{i}/{sample}",
                logprobs=np.full(sample + 1, -0.5, dtype=np.float32),
                finish=self._finish(i, sample),
                versions=(VersionSpan(version=7, start=0, end=sample + 1),),
            )
            for sample, seed in enumerate(seeds)
        ]


class FakeRewards:
    """`rule(i, sample)` gives a raw reward, or a Score."""

    def __init__(self, rule):
        self._rule = rule

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [self.score(prompt, completion) for completion in completions]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        i, sample = (int(x) for x in completion.text.split("/"))
        raw = self._rule(i, sample)
        return raw if isinstance(raw, Score) else Score(raw=raw, value=raw, correct=raw >= 1)

    def metrics(self) -> dict[str, float]:
        return {}


def mixed(i: int, sample: int) -> float:
    return float(sample == 0)


def even_prompts_teach(i: int, sample: int) -> float:
    return float(sample == 0 and i % 2 == 0)


def run(cfg, rule, fleet=None, prompts=20, step=1) -> tuple[Collected, FakeFleet]:
    fleet = fleet or FakeFleet()
    stream = PromptStream([prompt(i) for i in range(prompts)], seed=0, shuffle=False)
    return collect(stream, fleet, FakeRewards(rule), cfg, step, stop_token_ids=(1,)), fleet


def ids(groups) -> list[str]:
    return [g.prompt.id for g in groups]


def test_forced_lengths_make_every_group_the_same_work():
    _, fleet = run(config(rollout__forced_lengths=[2, 7]), mixed)
    for _, sampling, seeds in fleet.requests:
        assert sorted(sampling.lengths) == [2, 2, 7, 7] and len(seeds) == N
        assert sampling.ignore_eos and sampling.stop_token_ids == () and sampling.max_tokens == 7


def test_a_task_with_shorter_responses_asks_for_fewer_tokens():
    fleet = FakeFleet()
    prompts = [dataclasses.replace(prompt(i), max_tokens={0: 3, 1: 20}.get(i)) for i in range(4)]
    stream = PromptStream(prompts, seed=0, shuffle=False)
    found = collect(stream, fleet, FakeRewards(mixed), config(), 1, (1,))
    assert [sampling.max_tokens for _, sampling, _ in sorted(fleet.requests)] == [3, 8, 8, 8]
    assert found.metrics["response_length/clip_ratio"] == 2 / (4 * N)  # 3 and 4 tokens of a limit of 3


def test_the_tail_is_what_the_last_tenth_of_groups_takes():
    assert tail_seconds([]) == tail_seconds([5.0]) == 0.0
    assert tail_seconds([float(i) for i in range(1, 10)] + [30.0]) == 21.0
    assert tail_seconds([float(i) for i in range(20, 0, -1)]) == 2.0


def test_one_round_is_enough_when_everything_teaches():
    cfg = config()
    found, fleet = run(cfg, mixed)
    assert ids(found.groups) == ["p00", "p01", "p02", "p03"]
    assert found.drops == ()
    i, sampling, seeds = fleet.requests[2]
    assert seeds == tuple(sampling_seed(0, 0, f"p{i:02d}", k) for k in range(N))
    assert sampling == Sampling(temperature=0.8, max_tokens=8, stop_token_ids=(1,))
    assert found.metrics["rollout/gen_rounds"] == 1
    assert found.metrics["reward/mean"] == 0.25
    assert found.metrics["response_length/mean"] == 2.5
    assert found.metrics["response_length/max"] == 4
    assert found.metrics["prompt_length/max"] == 4
    assert found.metrics["critic/score/mean"] == 0.25
    assert found.metrics["rollout/informative_share"] == 1.0


def test_refill_keeps_the_first_informative_groups_and_accounts_for_every_prompt():
    found, fleet = run(config(), even_prompts_teach)
    # 4 drawn -> 2 teach; 2 missing at a share of 1/2 -> 4 more
    assert ids(found.groups) == ["p00", "p02", "p04", "p06"]
    assert [(d.prompt_id, d.reason) for d in found.drops] == [
        (f"p{i:02d}", "uninformative") for i in (1, 3, 5, 7)
    ]
    assert len(fleet.requests) == 8
    assert found.metrics["rollout/gen_rounds"] == 2
    assert found.metrics["rollout/informative_share"] == 0.5
    assert found.metrics["reward/mean"] == 0.125  # of all that was generated
    assert found.metrics["critic/score/mean"] == 0.25  # of what is trained on
    assert found.metrics["reward/task0/mean"] == 0.25
    assert found.metrics["reward/task1/mean"] == 0.0


def test_surplus_groups_are_recorded():
    found, _ = run(config(), lambda i, s: float(s == 0 and i != 0 and i != 1))
    # 2 of 4 -> 4 more, all of which teach
    assert ids(found.groups) == ["p02", "p03", "p04", "p05"]
    assert [(d.prompt_id, d.reason) for d in found.drops][2:] == [("p06", "surplus"), ("p07", "surplus")]
    assert found.metrics["rollout/surplus_groups"] == 2


def test_arrival_order_does_not_matter():
    calm, _ = run(config(), even_prompts_teach)
    for delays in (lambda i: 0.002 * (20 - i), lambda i: 0.002 * (i * 7 % 5)):
        found, _ = run(config(), even_prompts_teach, FakeFleet(delays))
        assert ids(found.groups) == ids(calm.groups)
        assert found.drops == calm.drops
        assert found.metrics == calm.metrics
        tokens = [[r.completion.token_ids.tolist() for r in g.rollouts] for g in found.groups]
        assert tokens == [[r.completion.token_ids.tolist() for r in g.rollouts] for g in calm.groups]


def test_exhaustion_is_short_or_an_error():
    rule = lambda i, s: float(s == 0 and i == 2)  # noqa: E731
    found, fleet = run(config(algorithm__filter_groups__max_num_gen_batches=3), rule)
    assert ids(found.groups) == ["p02"]
    assert found.metrics["train/num_gen_batches"] == 3
    assert len(fleet.requests) == len(found.drops) + 1
    strict = config(
        algorithm__filter_groups__max_num_gen_batches=2, algorithm__filter_groups__on_exhausted="error"
    )
    with pytest.raises(RedoneError, match=r"step 3: 1 of 4 informative groups after 2 generation rounds"):
        run(strict, rule, step=3)


def test_filter_off_keeps_every_group():
    cfg = config(algorithm__filter_groups__enable=False)
    found, fleet = run(cfg, even_prompts_teach)
    assert len(found.groups) == len(fleet.requests) == 4
    assert found.drops == ()
    assert len(build_batch(found.groups, cfg).groups) == 4


def test_selection_reads_raw_rewards_not_shaped_ones():
    """All wrong, but of different length: with the overlong penalty the values differ, the raw rewards do
    not."""
    cfg = config(
        algorithm__overlong_buffer={"enable": True, "len": 8, "penalty_factor": 1.0},
        algorithm__filter_groups__max_num_gen_batches=1,
    )
    found, _ = run(cfg, lambda i, s: 0.0)
    assert found.groups == ()
    with pytest.raises(RedoneError, match="can train the model"):
        build_batch(found.groups, cfg)


def test_failed_scores_are_dropped_and_counted_never_zero():
    def rule(i, sample):
        return failed("sandbox gone") if (i, sample) == (1, 3) else mixed(i, sample)

    found, _ = run(config(rollout__max_failed_share=0.1), rule)
    assert [len(g.rollouts) for g in found.groups] == [4, 3, 4, 4]
    assert found.metrics["rollout/failed"] == 1
    assert found.metrics["reward/mean"] == pytest.approx(4 / 15)
    with pytest.raises(RedoneError, match=r"failed on 1 of 16 rollouts.*first failure: error: sandbox gone"):
        run(config(), rule)


def test_aborted_completions_and_groups_too_small_are_dropped():
    def finish(i, sample):
        return "abort" if (i == 0 and sample > 0) or (i, sample) == (1, 2) else "stop"

    found, _ = run(config(), mixed, FakeFleet(finish=finish))
    assert ids(found.groups) == ["p01", "p02", "p03", "p04"]
    assert [len(g.rollouts) for g in found.groups] == [3, 4, 4, 4]
    first = found.drops[0]
    assert (first.prompt_id, first.reason) == ("p00", "rollouts failed")
    assert found.metrics["rollout/aborted"] == 4


def test_an_engines_error_arrives_as_itself():
    with pytest.raises(EngineError, match="the engine died"):
        run(config(), mixed, FakeFleet(broken=2))


def test_the_batch_holds_what_the_trainer_needs():
    cfg = config(data__max_response_length=4, algorithm__overlong_buffer={"enable": True, "len": 2})
    found, _ = run(cfg, mixed)
    batch = build_batch(found.groups, cfg)
    assert batch.num_loss_tokens == 4 * (1 + 2 + 3 + 4)
    assert batch.num_sequences == 16
    group = batch.groups[1]
    assert (group.prompt_id, group.prompt_ids.tolist()) == ("p01", [0, 1])
    values = np.array([1.0, 0.0, -0.5, -1.0])  # reward + penalty at 1, 2, 3 and 4 of 4 tokens
    expected = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    for size, trajectory in enumerate(group.trajectories, start=1):
        assert trajectory.advantages.tolist() == pytest.approx([expected[size - 1]] * size, rel=1e-6)
        assert trajectory.loss_mask.all()
        assert trajectory.engine_logprobs.tolist() == [-0.5] * size
        assert trajectory.old_logprobs is None
        assert trajectory.version == 7


def test_build_batch_leaves_out_groups_without_spread():
    cfg = config(algorithm__filter_groups__enable=False)
    found, _ = run(cfg, even_prompts_teach)
    filtering = config()
    assert [g.prompt_id for g in build_batch(found.groups, filtering).groups] == ["p00", "p02"]
    single = [dataclasses.replace(found.groups[1], rollouts=found.groups[1].rollouts[:1])]
    with pytest.raises(RedoneError, match="no group of this step can train"):
        build_batch(single, filtering)
