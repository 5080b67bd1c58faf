"""The preflight's judgement: which node is named for what. Its measurements run in tests/slurm."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.preflight import Facts, Problem, judge_facts, judge_speeds, odd_ones, read_all
from redone_launcher.probe import Meeting, rank_main
from redone_launcher.ray_node import free_ports
from redone_launcher.site import Site

from redone.cluster.actors import use_granted_gpus
from redone.config.load import config_from_dict
from redone.config.schema import Config
from redone.errors import RedoneError

NODES = ("a", "b", "c", "d")


def config(**cluster: object) -> Config:
    return config_from_dict(
        {
            "model": {"path": "m"},
            "data": {"train": ["t"]},
            "rewards": {"default": {"family": "exact"}},
            "cluster": cluster,
        }
    )


def facts(node: str, **changes: Any) -> Facts:
    return {
        "node": node,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
        "gpus": [{"name": "H100", "driver": "550.1"}] * 8,
        "ram_free_gb": 900.0,
        "shm_free_gb": 500.0,
        "problems": [],
        **changes,
    }


def judged(*rows: Facts, site: Site | None = None, **cluster: object) -> list[Problem]:
    return judge_facts({r["node"]: r for r in rows}, NODES, config(**cluster), site or Site())


def test_equal_nodes_are_fit() -> None:
    assert judged(*map(facts, NODES), device="cuda", gpus_per_node=8) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.0", "ray": "2.60.0"}}, "torch is 2.12.0"),
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, "ray is absent, on the other nodes 2.60.0"),
        ({"gpus": [{"name": "H100", "driver": "535.9"}] * 8}, "driver is 535.9, on the other nodes 550.1"),
        ({"gpus": [{"name": "A100", "driver": "550.1"}] * 8}, "GPU is A100"),
        ({"gpus": [{"name": "H100", "driver": "550.1"}] * 7}, "7 GPUs, cluster.gpus_per_node=8"),
        ({"ram_free_gb": 90.0}, "90.0 GB of memory free, 500.0 needed"),
        ({"shm_free_gb": 0.05}, "/dev/shm free"),
        ({"problems": ["ports are taken"]}, "ports are taken"),
    ],
)
def test_the_odd_node_is_named(changes: dict[str, Any], expected: str) -> None:
    rows = [*map(facts, "abd"), facts("c", **changes)]
    (problem,) = judged(*rows, site=Site(min_ram_gb=500), device="cuda", gpus_per_node=8)
    assert problem.node == "c" and expected in problem.text


def test_a_node_that_wrote_nothing_is_named(tmp_path: Path) -> None:
    for node in "abd":
        (tmp_path / f"{node}.json").write_text(json.dumps(facts(node)))
    found = read_all(tmp_path, NODES, wait_s=0.3)
    (problem,) = judge_facts(found, NODES, config(), Site())
    assert problem.node == "c" and "shared file system" in problem.text


def test_a_tie_blames_the_later_node() -> None:
    (problem,) = odd_ones({"a": {"torch": "1"}, "b": {"torch": "2"}})
    assert problem.node == "b"


def test_slow_links_copies_and_clocks() -> None:
    level = dict.fromkeys(NODES, 100.0)
    clocks = dict.fromkeys(NODES, 1000.0)
    good = {"copy_gbs": level, "pair_gbs": level, "clock_s": clocks, "allreduce_gbs": 300.0}
    assert judge_speeds(good, NODES, True, Site(expect_allreduce_gbs=250)) == []
    for key, value, expected in (
        ("copy_gbs", 40.0, "slow copy"),
        ("pair_gbs", 40.0, "slow link"),
        ("clock_s", 1003.5, "+3.5 s off"),
    ):
        bad = {**good, key: {**good[key], "c": value}}  # type: ignore[dict-item]
        (problem,) = judge_speeds(bad, NODES, True, Site())
        assert problem.node == "c" and expected in problem.text
    # one number over all nodes: the node with the slowest link is named
    bad = {**good, "pair_gbs": {**level, "b": 90.0}, "allreduce_gbs": 100.0}
    (problem,) = judge_speeds(bad, NODES, True, Site(expect_allreduce_gbs=250))
    assert problem.node == "b" and "100.00 GB/s" in problem.text


def test_processes_on_cpu_are_not_compared_with_each_other() -> None:
    uneven = {"copy_gbs": {"a": 8.0, "b": 1.0, "c": 8.0}, "pair_gbs": {"a": 1.0, "b": 0.1, "c": 1.0}}
    assert judge_speeds(uneven, "abc", False, Site()) == []
    (problem,) = judge_speeds(uneven, "abc", False, Site(expect_copy_gbs=2.0))
    assert problem.node == "b"


def test_one_rank_measures_itself(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank_main(
        0, Meeting(host="127.0.0.1", port=port, nodes=("a",), per_node=1, cuda=False, folder=str(tmp_path)), 0
    )
    found = json.loads((tmp_path / "speeds.txt").read_text())
    assert found["copy_gbs"]["a"] > 0 and found["clock_s"] == {}


def test_free_ports_skip_what_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port not in free_ports(port, 8, 0, 4)
        with pytest.raises(RedoneError, match="REDONE_PORT_BASE"):
            free_ports(port, 1, 0, 1)


def test_seats_count_from_the_granted_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDONE_NODE_GPUS", "4,5,6,7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    use_granted_gpus()
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    monkeypatch.setenv("REDONE_NODE_GPUS", "")
    use_granted_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
