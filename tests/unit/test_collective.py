"""weights.channel=collective over gloo: real groups between threads of this process and other processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from redone.config.load import load_config
from redone.engine.receiver import Receiver, named_tensors
from redone.errors import ConfigError, SyncError
from redone.types import WeightBucket
from redone.weights.collective import CollectiveWriter, Meeting, bucket_span, elsewhere
from redone.weights.digest import bucket_digests
from redone.weights.plan import make_plan, plan_to_json

PLAN = make_plan([(f"layers.{i}.w", "float32", (3 + i, 50)) for i in range(6)], 2000)
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


class Sender:
    """Trainer rank 0: random tensors, version after version."""

    def __init__(self, path: Path, size: int, timeout_s: float = TIMEOUT_S) -> None:
        self.writer = CollectiveWriter(
            str(path), PLAN.total_bytes, host="127.0.0.1", size=size, backend="gloo", timeout_s=timeout_s
        )
        self.version = 0

    def publish(self) -> tuple[WeightBucket, ...]:
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        location = self.writer.begin()
        found = []
        for index, (first, last) in enumerate(PLAN.buckets):
            for t in PLAN.tensors[first:last]:
                data = torch.randn(t.shape, generator=generator)
                self.writer.view(t.offset, t.nbytes).copy_(data.view(torch.uint8).flatten())
            self.writer.announce(*bucket_span(PLAN, index))
            digests = bucket_digests(PLAN, index, self.writer)
            found.append(WeightBucket(version=self.version, index=index, location=location, digests=digests))
        return tuple(found)

    def expected(self) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in named_tensors(self.writer, PLAN.tensors)}


class Rank:
    """An engine rank: a receiver and what it loaded."""

    def __init__(self) -> None:
        self.receiver = Receiver(plan_to_json(PLAN))
        self.held: dict[str, torch.Tensor] = {}

    def load(self, buckets: tuple[WeightBucket, ...]) -> list[str | None]:
        names = {t.name for t in PLAN.tensors}

        def install(reader: object, tensors: object) -> None:
            self.held |= {name: t.clone() for name, t in named_tensors(reader, tensors)}  # type: ignore[arg-type]

        return [self.receiver.load(bucket, names, install) for bucket in buckets]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def assert_equal(held: dict[str, torch.Tensor], sender: Sender) -> None:
    expected = sender.expected()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], t) for name, t in expected.items())


def test_every_rank_receives_every_version(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    assert len(PLAN.buckets) > 2
    sender = Sender(tmp_path / "w", size=3)
    for _ in range(2):  # a group of its own each time
        ranks = [Rank(), Rank()]
        buckets = sender.publish()
        results = [threads.submit(rank.load, buckets) for rank in ranks]
        sender.writer.finish()
        assert [r.result() for r in results] == [[None] * len(buckets)] * 2
        for rank in ranks:
            assert_equal(rank.held, sender)
    sender.writer.close()
    assert not (tmp_path / "w").exists()


def test_a_later_engine_is_served_again(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sender = Sender(tmp_path / "w", size=2)
    buckets = sender.publish()
    first = threads.submit(Rank().load, buckets)
    sender.writer.finish()
    assert first.result() == [None] * len(buckets)
    location = elsewhere(buckets[0].location, "again", 1)
    late = Rank()
    moved = tuple(
        WeightBucket(version=b.version, index=b.index, location=location, digests=b.digests) for b in buckets
    )
    loading = threads.submit(late.load, moved)
    sender.writer.send_again(location, [bucket_span(PLAN, i) for i in range(len(PLAN.buckets))])
    assert loading.result() == [None] * len(buckets)
    assert_equal(late.held, sender)
    sender.writer.close()


def test_a_bucket_asked_for_late_is_kept_and_one_asked_for_twice_is_refused(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    sender, rank = Sender(tmp_path / "w", size=2), Rank()
    buckets = sender.publish()
    order = (*reversed(buckets), buckets[0])
    loading = threads.submit(rank.load, order)
    sender.writer.finish()
    *found, again = loading.result()
    assert found == [None] * len(buckets)
    assert_equal(rank.held, sender)
    assert again is not None and "bucket 0 was asked for twice" in again
    sender.writer.close()


def test_what_was_changed_on_the_way_is_named(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sender, rank = Sender(tmp_path / "w", size=2), Rank()
    buckets = sender.publish()
    other = PLAN.tensors[PLAN.buckets[1][0]]
    wrong = tuple(
        WeightBucket(
            version=b.version,
            index=b.index,
            location=b.location,
            digests=(b.digests[0] ^ 1, *b.digests[1:]) if b.index == 1 else b.digests,
        )
        for b in buckets
    )
    began = time.monotonic()
    loading = threads.submit(rank.load, wrong)
    sender.writer.finish()
    found = loading.result()
    assert time.monotonic() - began < TIMEOUT_S / 2  # whoever refuses leaves, and nobody waits for it
    assert found[0] is None and None not in found[1:]
    assert found[1] is not None and f"tensor {other.name!r}" in found[1] and "damaged" in found[1]
    sender.writer.close()


def test_a_bucket_that_never_comes_times_out(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sender, rank = Sender(tmp_path / "w", size=2, timeout_s=2.0), Rank()
    location = sender.writer.begin()
    sender.writer.announce(*bucket_span(PLAN, 0))
    digests = bucket_digests(PLAN, 0, sender.writer)
    sent = WeightBucket(version=1, index=0, location=location, digests=digests)
    missing = WeightBucket(version=1, index=1, location=location, digests=digests)
    began = time.monotonic()
    found = threads.submit(rank.load, (sent, missing)).result()
    assert found[0] is None
    assert found[1] is not None and f"bucket 1 of {len(PLAN.buckets)} did not arrive within 2 s" in found[1]
    assert time.monotonic() - began < 15
    sender.writer.close()


def test_a_member_that_never_comes_times_out(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sender, rank = Sender(tmp_path / "w", size=3, timeout_s=2.0), Rank()
    loading = threads.submit(rank.load, sender.publish()[:1])
    sender.writer.finish()  # a warning: the engines report
    (found,) = loading.result()
    assert found is not None and "not all of 3 members" in found and "within 2 s" in found
    sender.writer.close()


def _die_after(pipe: Connection) -> None:
    """Says that it is there, loads the buckets that it gets, dies."""
    pipe.send("imported")
    Rank().load(pipe.recv())
    os._exit(9)


@pytest.mark.slow
def test_a_dead_member_fails_the_others_at_once(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sender, rank = Sender(tmp_path / "w", size=3, timeout_s=60.0), Rank()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    dying = spawn.Process(target=_die_after, args=(theirs,))
    dying.start()
    assert ours.recv() == "imported"
    buckets = sender.publish()
    ours.send(buckets[:1])
    first = rank.load(buckets[:1])
    assert first == [None]
    dying.join()
    began = time.monotonic()
    found = rank.load(buckets[1:])
    assert any(f is not None and "is gone" in f for f in found)
    sender.writer.finish()
    assert time.monotonic() - began < 30  # not the time-out
    # whoever missed it gets the same bytes in a new group
    location = elsewhere(buckets[0].location, "again", 1)
    moved = tuple(
        WeightBucket(version=b.version, index=b.index, location=location, digests=b.digests) for b in buckets
    )
    late = Rank()
    loading: Future[list[str | None]] = threads.submit(late.load, moved)
    sender.writer.send_again(location, [bucket_span(PLAN, i) for i in range(len(PLAN.buckets))])
    assert loading.result() == [None] * len(buckets)
    assert_equal(late.held, sender)
    sender.writer.close()


def test_addresses_survive_their_text(tmp_path: Path) -> None:
    meeting = Meeting(host="10.0.0.7", port=4321, key="p3", size=9, backend="nccl", timeout_s=12.5)
    assert Meeting.of(meeting.location) == meeting
    for wrong in (
        "/dev/shm/redone-1-x",
        "collective://host/p1?size=2",
        "collective://h:1/p?size=x&backend=gloo",
    ):
        with pytest.raises(SyncError, match="not the address"):
            Meeting.of(wrong)


def test_delta_is_refused(tmp_path: Path) -> None:
    text = "model: {path: m}\nweights: {channel: collective, delta: true}\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="delta=true with channel=collective"):
        load_config(tmp_path / "c.yaml", [])
