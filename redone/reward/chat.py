"""A plain client of one OpenAI-compatible chat endpoint: bounded concurrency, retries with back-off.

A question that the endpoint refuses (HTTP 400, 413, 422) is that question's failure. One that stays
unanswered while others are answered is too. When nothing is answered any more, the endpoint is down:
JudgeError.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from redone.config.schema import JudgeConfig
from redone.errors import ConfigError, JudgeError

ITS_OWN_FAULT = (400, 413, 422)  # the request's: too long, malformed
REFUSED = (401, 403, 404, 405)  # the same for every request: no use in asking again
LONGEST_PAUSE_S = 30.0
Message = Mapping[str, str]


class UnansweredError(Exception):
    """One question stays without an answer; the endpoint itself works."""


@dataclass(slots=True)
class Traffic:
    """Counts since the start."""

    requests: int = 0
    retries: int = 0
    answers: int = 0


class ChatClient:
    """Bound to the event loop it was made in; see connect()."""

    def __init__(self, config: JudgeConfig, http: httpx.AsyncClient, traffic: Traffic) -> None:
        self._config, self._http, self._traffic = config, http, traffic
        self._gate = asyncio.Semaphore(config.concurrency)
        self._last_answer = float("-inf")  # time.monotonic() of the last success, of any question

    async def ask(self, body: Mapping[str, Any]) -> str:
        """The text of the answer to one request. Raises UnansweredError, or JudgeError (endpoint down)."""
        config = self._config
        data = json.dumps(
            body
        ).encode()  # httpx' own would fail on the lone surrogates that a model may write
        async with self._gate:
            end = time.monotonic() + config.deadline_s
            first_failure: float | None = None
            for attempt in range(config.retries + 1):
                self._traffic.requests += 1
                self._traffic.retries += attempt > 0
                pause = min(LONGEST_PAUSE_S, config.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
                try:
                    async with asyncio.timeout(max(0.0, end - time.monotonic())):
                        response = await self._http.post("chat/completions", content=data)
                    if response.is_success:
                        text = _content(response)
                        self._last_answer = time.monotonic()
                        self._traffic.answers += 1
                        return text
                    problem = f"HTTP {response.status_code}: {response.text[:300]}"
                    if response.status_code in ITS_OWN_FAULT:
                        raise UnansweredError(problem)
                    if response.status_code in REFUSED:
                        raise JudgeError(self._down(problem))
                    pause = max(pause, _retry_after(response))
                except (httpx.HTTPError, TimeoutError) as error:
                    problem = f"{type(error).__name__}: {error}".rstrip(": ")
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                if now + pause >= end:
                    problem += f" (deadline_s={config.deadline_s:g})"
                    break
                if attempt < config.retries:
                    await asyncio.sleep(pause)
        if first_failure is not None and self._last_answer > first_failure:
            raise UnansweredError(problem)
        raise JudgeError(self._down(problem))

    def _down(self, problem: str) -> str:
        config = self._config
        return (
            f"the judge at {config.base_url} (model {config.model}) does not answer: {problem}. Finished "
            f"labels are kept{f' in {config.cache}' if config.cache else ''}; start it, or set "
            f"base_url, model, api_key_env, retries={config.retries}"
        )


@asynccontextmanager
async def connect(config: JudgeConfig, traffic: Traffic) -> AsyncIterator[ChatClient]:
    """Raises ConfigError when the variable with the key is not set."""
    limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
    async with httpx.AsyncClient(
        base_url=config.base_url.rstrip("/") + "/",
        headers=headers(config),
        timeout=config.request_timeout_s,
        limits=limits,
        trust_env=False,
        verify=config.base_url.startswith("https:"),  # reading the authorities' keys takes half a second
    ) as http:
        yield ChatClient(config, http, traffic)


def headers(config: JudgeConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {"Content-Type": "application/json"}
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"api_key_env={config.api_key_env}: this environment variable is not set; set it to the key of "
            f"{config.base_url}, or remove api_key_env for an endpoint without one"
        )
    return {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}


def request_body(
    config: JudgeConfig, messages: Sequence[Message], schema: Mapping[str, Any]
) -> dict[str, Any]:
    """What is posted; also what a finished label is remembered by."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [dict(message) for message in messages],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "seed": config.seed,
    }
    if config.structured:
        json_schema = {"name": "verdict", "strict": True, "schema": dict(schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    return body | dict(config.extra_body)


def _content(response: httpx.Response) -> str:
    """Raises httpx.DecodingError for an answer that is none: it is asked for again."""
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise httpx.DecodingError(f"not a chat completion: {response.text[:200]}") from error


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say, or says a date."""
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_PAUSE_S) if value.isdigit() else 0.0
