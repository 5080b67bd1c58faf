"""The LLM judge against vLLM's own OpenAI server on loopback, with a tiny random model."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.config.schema import JudgeConfig
from redone.data.tiny import make_tiny_model
from redone.engine import engine_env
from redone.errors import JudgeError
from redone.reward.judge import JudgeItem, JudgeScore, LlmJudge
from redone.types import Completion, Message, Prompt
from tests.engines.harness import engine_config

pytestmark = pytest.mark.slow
START_S = 240
RUBRIC = "Grade {answer} to {prompt}."
NO_IDS = np.zeros(0, dtype=np.int32)


@dataclasses.dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("judge")
    folder = make_tiny_model(work / "model", "llama", max_position_embeddings=1024)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    # the grammar of JSON lets a random model write blanks for ever
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    env = os.environ | engine_env(engine_config(folder, in_process=False)) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = work / "server.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        found = Server(f"http://127.0.0.1:{port}/v1", process, log)
        try:
            wait_until_it_answers(found)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_it_answers(server: Server) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{server.url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no answer in {START_S} s: {server.log.read_text()[-3000:]}")


def items(*texts: str) -> list[JudgeItem]:
    prompt = Prompt(
        id="p",
        task="t",
        domain="general",
        data_source="d",
        messages=(Message(role="user", content="Why?"),),
        token_ids=NO_IDS,
        reference=None,
        reward="r",
    )
    logprobs = np.zeros(0, dtype=np.float32)
    return [
        JudgeItem(
            prompt=prompt,
            completion=Completion(token_ids=NO_IDS, text=t, logprobs=logprobs, finish="stop", versions=()),
        )
        for t in texts
    ]


def judge(server: Server, **config: Any) -> LlmJudge:
    values = {"base_url": server.url, "model": "judge", "rubric": RUBRIC, "max_tokens": 40, "backoff_s": 0.05}
    return LlmJudge(JudgeConfig(**{**values, "retries": 2, **config}))


def run(judge: LlmJudge, what: list[JudgeItem]) -> list[JudgeScore]:
    return asyncio.run(judge.score(what))


def test_structured_verdicts_are_scores(server: Server, tmp_path: Path) -> None:
    """A random model can be held to the form, so every answer gets a score; and the same one again."""
    cache = str(tmp_path / "verdicts.jsonl")
    texts = [f"answer {i}" for i in range(24)]
    first = judge(server, structured=True, cache=cache, concurrency=8)
    found = run(first, items(*texts))
    assert [s.status for s in found] == ["ok"] * 24, found
    assert all(s.score is not None and 0 <= s.score <= 1 for s in found)
    second = judge(server, structured=True, cache=cache)
    assert [s.score for s in run(second, items(*texts))] == [s.score for s in found]
    assert second.traffic.requests == 0 and second.counts()["cached"] == 24


def test_pairs_in_both_orders(server: Server) -> None:
    one = judge(server, structured=True, mode="pairwise", opponents="candidates", rubric=None)
    found = run(one, items("good", "bad", "fair"))
    assert [s.status for s in found] == ["ok"] * 3, found
    assert one.traffic.requests >= 6


def test_gibberish_is_unparsed_and_too_long_is_its_own_error(server: Server) -> None:
    one = judge(server, max_tokens=8)
    found = run(one, items("short", "long " * 1000))
    assert [(s.score, s.status) for s in found] == [(None, "unparsed"), (None, "error")]
    assert "400" in found[1].detail


def test_an_unknown_model_is_named(server: Server) -> None:
    with pytest.raises(JudgeError, match=r"model nobody\b.*404"):
        run(judge(server, model="nobody"), items("x"))


def test_a_killed_server_is_named_and_labels_stay(server: Server, tmp_path: Path) -> None:
    """Last: the server is gone afterwards."""
    cache = tmp_path / "verdicts.jsonl"
    one = judge(server, structured=True, cache=str(cache), concurrency=1)
    run(one, items("a", "b"))
    server.process.terminate()
    server.process.wait(timeout=60)
    with pytest.raises(JudgeError, match=server.url):
        run(one, items("a", "b", "c"))
    assert len(cache.read_text().splitlines()) == 2
    assert [s.status for s in run(one, items("a", "b"))] == ["ok", "ok"]
