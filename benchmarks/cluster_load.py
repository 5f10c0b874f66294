"""The load of the cluster benchmark: tenants that send open-loop through HTTP, each in phases.

A request is sent when its time has come, whatever became of those before it. What became of it is
one `Outcome`: every request ends in tokens, in an error of the server's, or in a reason why it was
refused; a connection that was cut or that says nothing any more is called so.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from benchmarks.cluster_serve import URL
from benchmarks.slo_load import Arrival, Schedule
from benchmarks.slo_machine import until

DRAIN_S = 60.0  # for what still runs after the last request was sent
SAMPLE_S = 0.5
BUCKET_S = 0.1
_FIRST_ID, _IDS = 2, 250  # of token ids that every tokenizer has
# What a request must not end in: nobody said how it ended.
UNSAID = ("cut", "silent")


@dataclass(frozen=True, slots=True)
class Source:
    """One tenant's requests for one model.

    Attributes:
        api_key: None where nobody needs one.
        schedule: when they come, and how long they are.
        ttft_s, tpot_s: what is promised.
        weight: of the tenant.
    """

    name: str
    model: str
    schedule: Schedule
    ttft_s: float
    tpot_s: float
    api_key: str | None = None
    weight: float = 1.0


class Outcome(NamedTuple):
    """What became of one request.

    Attributes:
        at_s: when it was due, since the load's begin.
        admitted: whether it was let in.
        ended: `length` where all tokens came; a refusal's or an error's code; `cut` where the
            connection ended without a word; `silent` where it did not end in time.
        ttft_s: from when it was due. tpot_s: mean per token after the first, where all came.
        ended_s: since the load's begin.
    """

    source: str
    phase: int
    at_s: float
    admitted: bool
    ended: str
    ttft_s: float | None
    tpot_s: float | None
    tokens: int
    ended_s: float


@dataclass(slots=True)
class Seen:
    """Everything that a load has seen.

    Attributes:
        tokens: that came, by (source, bucket of `BUCKET_S` since the load's begin).
        waiting: (second, requests of each source that waited for their first token) twice a second.
        lag_s: how late the driver was at worst.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    tokens: Counter[tuple[str, int]] = field(default_factory=Counter)
    waiting: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    lag_s: float = 0.0


class Load:
    """Sends what the sources ask for, from a moment of `time.perf_counter` on.

    Attributes:
        seen: so far.
    """

    def __init__(self, sources: Sequence[Source], origin_s: float, url: str = URL) -> None:
        self._sources = sources
        self._origin_s = origin_s
        self._url = url
        self._waiting: Counter[str] = Counter()
        self.seen = Seen()

    @property
    def seconds(self) -> float:
        """Of the longest source."""
        return max(source.schedule.seconds for source in self._sources)

    async def run(self) -> Seen:
        """Send everything, and wait for how it ends."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with (
            httpx.AsyncClient(base_url=self._url, limits=limits, timeout=None) as client,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._sample())
            for source in self._sources:
                group.create_task(self._offer(client, source))
        return self.seen

    async def _offer(self, client: httpx.AsyncClient, source: Source) -> None:
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(source.schedule.arrivals):
                due_s = self._origin_s + arrival.at_s
                await until(due_s)
                self.seen.lag_s = max(self.seen.lag_s, time.perf_counter() - due_s)
                prompt = prompt_of(number, arrival.prompt_tokens)
                group.create_task(self._request(client, source, arrival, prompt))

    async def _request(
        self, client: httpx.AsyncClient, source: Source, arrival: Arrival, prompt: list[int]
    ) -> None:
        answer = Answer()
        self._waiting[source.name] += 1
        left_s = self.seconds + DRAIN_S - self._now_s()
        try:
            tokens = answer.tokens_of(client, source, prompt, arrival.output_tokens)
            async with asyncio.timeout(left_s), aclosing(tokens):
                async for _ in tokens:
                    now_s = self._now_s()
                    if answer.first_s is None:
                        answer.first_s = now_s
                        self._waiting[source.name] -= 1
                    answer.last_s = now_s
                    self.seen.tokens[source.name, int(now_s / BUCKET_S)] += 1
        except TimeoutError:
            answer.ended = "silent"
        except httpx.HTTPError:
            answer.ended = "cut"
        finally:
            self._waiting[source.name] -= answer.first_s is None
            self.seen.outcomes.append(answer.outcome(source, arrival, self._now_s()))

    async def _sample(self) -> None:
        for number in range(int(self.seconds / SAMPLE_S)):
            await until(self._origin_s + number * SAMPLE_S)
            self.seen.waiting.append((number * SAMPLE_S, dict(self._waiting)))

    def _now_s(self) -> float:
        return time.perf_counter() - self._origin_s


@dataclass(slots=True)
class Answer:
    """One request and what has come of it; times since the load's begin."""

    admitted: bool = False
    ended: str = "cut"
    tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0

    async def tokens_of(
        self, client: httpx.AsyncClient, source: Source, prompt: list[int], max_tokens: int
    ) -> AsyncGenerator[None, None]:
        """Send the request; yields at each token."""
        body = {
            "model": source.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {} if source.api_key is None else {"Authorization": f"Bearer {source.api_key}"}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if not answer.is_success:
                self.ended = code_of(await answer.aread(), answer.status_code)
                return
            self.admitted = True
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    self.ended = str(event["error"]["code"])
                    return
                self.tokens += 1
                self.ended = event["choices"][0]["finish_reason"] or self.ended
                yield

    def outcome(self, source: Source, arrival: Arrival, now_s: float) -> Outcome:
        """How it ended, at `now_s`."""
        tpot_s = None
        if self.ended == "length" and self.tokens > 1 and self.first_s is not None:
            tpot_s = (self.last_s - self.first_s) / (self.tokens - 1)
        return Outcome(
            source=source.name,
            phase=arrival.phase,
            at_s=arrival.at_s,
            admitted=self.admitted,
            ended=self.ended,
            ttft_s=None if self.first_s is None else self.first_s - arrival.at_s,
            tpot_s=tpot_s,
            tokens=self.tokens,
            ended_s=now_s,
        )


def prompt_of(number: int, tokens: int) -> list[int]:
    """Token ids of the prompt of a source's request; it begins unlike those of the others."""
    begin = [_FIRST_ID + number % _IDS, _FIRST_ID + number // _IDS % _IDS]
    return (begin + [_FIRST_ID] * tokens)[:tokens]


def code_of(body: bytes, status: int) -> str:
    """The code of an error's body; the status where it is none of ours."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, TypeError, KeyError):
        return f"http_{status}"
