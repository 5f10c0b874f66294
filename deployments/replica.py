"""One replica's asyncio side: text in, an engine's tokens, text out. It knows neither Ray nor HTTP.

The engine behind the client owns the device; this side tokenises, detokenises, watches for stop
strings, and closes the engine's iterator whenever a client stops listening.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import cast

from deployments.calls import (
    DEFAULT_MAX_TOKENS,
    Accepted,
    Call,
    Chunk,
    Delta,
    Failure,
    Finish,
    Message,
    Report,
    TokenChance,
    TokenDetail,
)
from select_n_core.engine.client import EngineClient
from select_n_core.engine.messages import (
    EngineInfo,
    FinishReason,
    Output,
    Request,
    SamplingParams,
)
from select_n_core.engine.text import TextCodec, TextStream
from select_n_core.errors import ContextLengthError, EngineError, InputError, SelectNError
from select_n_core.slo import SLO

_LAST_CHUNKS_S = 1.0

_FINISHES: dict[FinishReason, Finish] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


class Replica:
    """Serves calls from one started engine.

    Args:
        name: of this replica, for reports.
        codec: the model's text side.
        client: a started engine's.
        info: what starting it returned.
        slo: what the model promises.
        node: of the cluster, for reports.
    """

    def __init__(
        self,
        name: str,
        codec: TextCodec,
        client: EngineClient,
        info: EngineInfo,
        slo: SLO,
        *,
        node: str = "",
    ) -> None:
        self._name = name
        self._node = node
        self._codec = codec
        self._client = client
        self._info = info
        self._slo = slo
        self._draining = False
        self._closing: asyncio.Task[None] | None = None
        self._live = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_headroom = {"ttft_headroom": 1.0, "tpot_headroom": 1.0}

    async def generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """Serve one call: its verdict before prefill, then one delta per engine step.

        Errors come as a `Failure` chunk. Closing the generator, or cancelling the task that
        runs it, stops the request in the engine.
        """
        self._live += 1
        self._idle.clear()
        try:
            async with aclosing(self._generate(call)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except SelectNError as error:
            yield Failure.of(error)
        finally:
            self._live -= 1
            if not self._live:
                self._idle.set()

    async def _generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        if self._draining:
            raise EngineError("this replica is shutting down; send the request again")
        request = self._request(call)
        text = TextStream(self._codec, request.prompt, call.stop)
        # An engine client's iterator is an async generator: closing it cancels the request.
        outputs = cast(AsyncGenerator[Output, None], self._client.generate(request))
        async with aclosing(outputs):
            verdict = await anext(outputs)
            first = self._chunk(verdict, text)
            if isinstance(first, Failure):
                yield first
                return
            yield Accepted(len(request.prompt), verdict.cached_tokens)
            async for output in outputs:
                chunk = self._chunk(output, text)
                yield chunk
                if isinstance(chunk, Failure) or chunk.finish:
                    return
        raise EngineError("the engine ended the request without a reason")

    def _request(self, call: Call) -> Request:
        """The engine's request; raises RequestError for what can never be served."""
        if isinstance(call.prompt, str):
            prompt = self._codec.encode(call.prompt)
        elif turns := [asdict(turn) for turn in call.prompt if isinstance(turn, Message)]:
            prompt = self._codec.chat(turns)
        else:
            prompt = cast(tuple[int, ...], call.prompt)
            self._check_ids(prompt, call.prompt_field)
        if not prompt:
            raise InputError(
                f"{call.prompt_field} must hold at least one token", field=call.prompt_field
            )
        left = self._info.max_tokens - len(prompt)
        max_tokens = call.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(left, DEFAULT_MAX_TOKENS))
        if max_tokens > left:
            raise ContextLengthError(
                f"{len(prompt)} prompt tokens plus {call.max_tokens_field} {max_tokens} are "
                f"{len(prompt) + max_tokens}, above this model's limit of "
                f"{self._info.max_tokens}; shorten the prompt or lower {call.max_tokens_field}",
                field=call.prompt_field if left < 1 else call.max_tokens_field,
            )
        wished = {name: value for name, value in asdict(call.sampling).items() if value is not None}
        chosen = {"temperature": 1.0} | dict(self._codec.sampling_defaults) | wished
        terms, slo = call.terms, call.terms.slo
        return Request(
            id=call.id,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, **chosen),
            tenant=terms.tenant,
            weight=terms.weight,
            slo_class=terms.slo_class,
            priority=terms.priority,
            deadline_s=None if slo is None else slo.ttft_s,
            tpot_s=None if slo is None else slo.tpot_s,
            max_wait_s=None if slo is None else slo.longest_wait_s,
            max_queue=terms.max_queue,
            max_tenant_queue=terms.max_tenant_queue,
            sender="" if call.route is None else call.route.sender,
            number=0 if call.route is None else call.route.number,
        )

    def _check_ids(self, prompt: Sequence[int], field: str) -> None:
        beyond = [token for token in prompt if not 0 <= token < self._codec.vocab_size]
        if beyond:
            raise InputError(
                f"{field} holds the token id {beyond[0]}; this model knows 0 to "
                f"{self._codec.vocab_size - 1}",
                field=field,
            )

    def _chunk(self, output: Output, text: TextStream) -> Delta | Failure:
        if output.finish is FinishReason.ERROR:
            return Failure.of(output.error or EngineError("the engine failed"))
        if output.finish is FinishReason.CANCELLED:
            return Failure.of(EngineError("the engine cancelled the request"))
        shown = text.push(output.tokens)
        finish = _FINISHES[output.finish] if output.finish else None
        if finish:
            shown += text.finish()
        if text.stopped:
            finish = "stop"
        return Delta(
            text=shown,
            tokens=len(output.tokens),
            details=self._details(output),
            finish=finish,
        )

    def _details(self, output: Output) -> tuple[TokenDetail, ...]:
        return tuple(
            TokenDetail(
                drawn=TokenChance(self._codec.token_text(token), logprob.logprob),
                top=tuple(
                    TokenChance(self._codec.token_text(other), chance)
                    for other, chance in logprob.top
                ),
            )
            for token, logprob in zip(output.tokens, output.logprobs, strict=False)
        )

    def report(self) -> Report:
        """This replica's facts and the last step's statistics."""
        stats = self._client.stats()
        # Without a call the engine has nothing to do, and what it said last still holds.
        measured_at_s = stats.measured_at_s if self._live else time.time()
        return Report(self._name, self._info, stats, self._node, measured_at_s, self._draining)

    def check_health(self) -> None:
        """Raise EngineError when the engine no longer turns; a drained replica is well."""
        if not self._draining:
            self._client.check_health()

    def check(self) -> None:
        """Raise EngineError when a call sent now would not be served."""
        if self._draining:
            raise EngineError("this replica is shutting down")
        self._client.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy reads, always all of it and always floats.

        Headroom is 1 while idle; while requests run and none has finished lately, the last
        known value stands.
        """
        stats = self._client.stats()
        idle = stats.running == 0 and stats.waiting == 0
        for name, value in (
            ("ttft_headroom", stats.ttft_headroom),
            ("tpot_headroom", stats.tpot_headroom),
        ):
            if value is not None:
                self._last_headroom[name] = float(value)
            elif idle:
                self._last_headroom[name] = 1.0
        return {
            **self._last_headroom,
            "running": float(stats.running),
            "waiting": float(stats.waiting),
            # What one request alone takes of the TPOT target: no second replica shrinks it.
            "tpot_floor": self._info.predicted_iteration_s / self._slo.tpot_s,
        }

    async def drain(self, grace_s: float) -> None:
        """Take no more calls; running ones get `grace_s`, then end in an error.

        Returns once every stream has handed over its last chunk, or a second after the grace.
        The engine goes on stopping behind it; `close` waits for that.
        """
        self._draining = True
        self._closing = asyncio.create_task(self._client.close(grace_s=grace_s))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s + _LAST_CHUNKS_S)

    async def close(self) -> None:
        """Stop the engine and wait until it is gone."""
        if self._closing is None:
            self._draining = True
            self._closing = asyncio.create_task(self._client.close())
        await self._closing
