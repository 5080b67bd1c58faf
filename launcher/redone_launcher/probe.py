"""The preflight's speeds: copies in every device, links between neighbour nodes, all-reduce over all."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from redone.config.schema import Config
from redone.pipeline.folder import write_json
from redone_launcher.preflight import Facts, Problem, judge_speeds
from redone_launcher.ray_node import node_name
from redone_launcher.site import Site

JOIN_S = 60.0
WHOLE_S = 180.0
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Who meets where. Ranks of a node are neighbours: rank = node index * per_node + GPU."""

    host: str
    port: int
    nodes: tuple[str, ...]
    per_node: int
    cuda: bool
    folder: str

    @property
    def world(self) -> int:
        return len(self.nodes) * self.per_node


def probe_speeds(
    facts: Facts,
    all_facts: Mapping[str, Facts],
    nodes: Sequence[str],
    cfg: Config,
    site: Site,
    folder: Path,
) -> list[Problem]:
    """Runs this node's ranks; on the first node, returns what is wrong (elsewhere the list means nothing)."""
    cuda = cfg.cluster.device == "cuda"
    head = all_facts[nodes[0]]
    meeting = Meeting(
        host=head["address"], port=head["port"], nodes=tuple(nodes),
        per_node=cfg.cluster.gpus_per_node if cuda else 1, cuda=cuda, folder=str(folder),
    )  # fmt: skip
    index = list(nodes).index(facts["node"])
    ended = _run_ranks(meeting, index)
    if index:
        return []
    missing = folder / "missing.txt"
    if missing.exists():
        return [
            Problem(node, f"did not reach {meeting.host}:{meeting.port} in {JOIN_S:.0f} s")
            for node in missing.read_text().split()
        ]
    speeds = folder / "speeds.txt"
    if not ended or not speeds.exists():
        return [Problem("", f"the bandwidth probe did not end in {WHOLE_S:.0f} s; see preflight.log")]
    found = json.loads(speeds.read_text())
    sys.stdout.write(f"preflight: {found}\n")
    return judge_speeds(found, nodes, cuda, site)


def _run_ranks(meeting: Meeting, index: int) -> bool:
    """False when they had to be ended. One rank runs here; on a GPU node each has its process."""
    if meeting.per_node == 1:
        rank_main(0, meeting, index)
        return True
    context = mp.spawn(rank_main, (meeting, index), nprocs=meeting.per_node, join=False)
    deadline = time.monotonic() + WHOLE_S
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            return False
    return True


def rank_main(local: int, meeting: Meeting, index: int) -> None:
    """One rank: join, measure, and (rank 0) write speeds.txt or missing.txt."""
    rank = index * meeting.per_node + local
    limit = datetime.timedelta(seconds=JOIN_S)
    try:
        store = dist.TCPStore(
            meeting.host, meeting.port, None, is_master=rank == 0, timeout=limit, wait_for_workers=False
        )
    except (dist.DistError, OSError) as error:
        sys.stdout.write(f"preflight: {node_name()} cannot reach {meeting.host}:{meeting.port}: {error}\n")
        return
    store.set(f"here-{rank}", "1")
    if not _all_here(store, meeting, rank):
        return
    if meeting.cuda:
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if meeting.cuda else "gloo", store=store, rank=rank, world_size=meeting.world, timeout=limit
    )
    mine = {
        "node": meeting.nodes[index],
        "copy_gbs": copy_speed(meeting.cuda),
        "pair_gbs": pair_speed(meeting, rank),
    }
    total = allreduce_speed(meeting) if meeting.world > 1 else None
    dist.barrier()
    mine["clock_s"] = time.time()
    everyone: list[Any] = [None] * meeting.world
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        write_json(Path(meeting.folder) / "speeds.txt", summarise(everyone, total))
    dist.destroy_process_group()


def _all_here(store: dist.TCPStore, meeting: Meeting, rank: int) -> bool:
    if rank:
        try:
            store.wait(["go"], datetime.timedelta(seconds=2 * JOIN_S))
        except dist.DistError:
            return False
        return store.get("go") == b"1"
    deadline, missing = time.monotonic() + JOIN_S, []
    for other in range(meeting.world):
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([f"here-{other}"], datetime.timedelta(seconds=left))
        except dist.DistError:
            missing.append(meeting.nodes[other // meeting.per_node])
    store.set("go", "0" if missing else "1")
    if missing:
        Path(meeting.folder, "missing.txt").write_text(" ".join(dict.fromkeys(missing)))
    return not missing


def _best_seconds(action: Callable[[], object], cuda: bool) -> float:
    action()
    best = float("inf")
    for _ in range(REPEATS):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _buffer(cuda: bool, mega: int, small: int) -> torch.Tensor:
    """uint8; `mega` MiB on a GPU, `small` MiB on CPU."""
    return torch.ones((mega if cuda else small) << 20, dtype=torch.uint8, device="cuda" if cuda else "cpu")


def copy_speed(cuda: bool) -> float:
    """GB/s read plus written by a copy inside this device (on CPU: in memory)."""
    source = _buffer(cuda, 1024, 32)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), cuda) / 1e9


def pair_speed(meeting: Meeting, rank: int) -> float | None:
    """GB/s, best of this node's links to its two neighbours in a ring of nodes; first rank of a node only."""
    count = len(meeting.nodes)
    if rank % meeting.per_node or count < 2:
        return None
    index, best = rank // meeting.per_node, 0.0
    buffer = _buffer(meeting.cuda, 256, 4)
    for shift in (0, 1):  # (0,1)(2,3).. then (1,2)(3,0)..: with an odd count the last node waits
        place = (index - shift) % count
        partner = place ^ 1
        if partner >= count:
            continue
        peer = (partner + shift) % count * meeting.per_node

        def exchange(peer: int = peer, first: bool = place < partner) -> None:
            (dist.send if first else dist.recv)(buffer, peer)
            (dist.recv if first else dist.send)(buffer, peer)

        best = max(best, 2 * buffer.numel() / _best_seconds(exchange, meeting.cuda) / 1e9)
    return best


def allreduce_speed(meeting: Meeting) -> float:
    """Bus bandwidth in GB/s: 2 (n - 1) / n x bytes / seconds, as nccl-tests counts it."""
    buffer = torch.ones((256 if meeting.cuda else 4) << 18, device="cuda" if meeting.cuda else "cpu")
    seconds = _best_seconds(lambda: dist.all_reduce(buffer), meeting.cuda)
    return 2 * (meeting.world - 1) / meeting.world * buffer.numel() * 4 / seconds / 1e9


def summarise(everyone: Sequence[Mapping[str, Any]], allreduce: float | None) -> dict[str, Any]:
    """Per node: its slowest copy, its best link, its clock (of any of its ranks)."""
    nodes = list(dict.fromkeys(r["node"] for r in everyone))
    of = {node: [r for r in everyone if r["node"] == node] for node in nodes}
    found: dict[str, Any] = {
        "copy_gbs": {n: round(min(r["copy_gbs"] for r in rows), 3) for n, rows in of.items()},
        "clock_s": {n: rows[0]["clock_s"] for n, rows in of.items()} if len(nodes) > 1 else {},
    }
    links = {n: [r["pair_gbs"] for r in rows if r["pair_gbs"] is not None] for n, rows in of.items()}
    found["pair_gbs"] = {n: round(max(speeds), 3) for n, speeds in links.items() if speeds}
    if allreduce is not None:
        found["allreduce_gbs"] = round(allreduce, 3)
    return found
