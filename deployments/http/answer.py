"""One HTTP request's sequences: verdicts first, then their deltas as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.calls import Accepted, Backend, Call, Chunk, Delta, Failure
from deployments.http.errors import FailureError, status_of
from deployments.http.metrics import RequestTimer
from deployments.http.stream import close_all, firsts, merged, watched
from deployments.tenants.charges import Charge


class Answer:
    """The sequences of one request; all of them are accepted or none runs.

    Args:
        calls: one per choice.
        choices_per_prompt: how many calls in a row share a prompt.
        stream_timeout_s: silence after which a sequence counts as lost.
        verdict_s: so much longer a sequence may wait to be let in.
        timer: told of every event.
        charge: of the tenant's quota; what was not used of it is given back.
    """

    def __init__(
        self,
        backend: Backend,
        calls: Sequence[Call],
        *,
        choices_per_prompt: int,
        stream_timeout_s: float,
        verdict_s: float,
        timer: RequestTimer,
        charge: Charge,
    ) -> None:
        self._streams = [
            watched(backend.generate(call), stream_timeout_s, verdict_s=verdict_s) for call in calls
        ]
        self._choices_per_prompt = choices_per_prompt
        self._timer = timer
        self._charge = charge
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    @property
    def usage(self) -> dict[str, int | dict[str, int]]:
        """Tokens so far, as OpenAI counts them: a prompt once, however many choices it has."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    async def open(self) -> None:
        """Wait for every sequence's verdict; raises FailureError, and stops all, on a refusal."""
        opened = False
        try:
            async with aclosing(firsts(self._streams)) as verdicts:
                async for number, verdict in verdicts:
                    self._count(number, verdict)
            self._timer.admitted()
            opened = True
        finally:
            if not opened:
                self._charge.settle(0)  # unless it was refunded
                await close_all(self._streams)

    def _count(self, number: int, verdict: Chunk) -> None:
        if not isinstance(verdict, Accepted):
            raise self._failed(
                verdict
                if isinstance(verdict, Failure)
                else Failure("internal_error", "internal error: no verdict came first")
            )
        if number % self._choices_per_prompt == 0:
            self._prompt_tokens += verdict.prompt_tokens
            self._cached_tokens += verdict.cached_tokens

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Every sequence's deltas with its index; raises FailureError when one breaks.

        Closing this, or leaving it by an error, stops every sequence.
        """
        chunks = merged(self._streams)
        try:
            async for index, chunk in chunks:
                if isinstance(chunk, Failure):
                    raise self._failed(chunk)
                assert isinstance(chunk, Delta)
                self._completion_tokens += chunk.tokens
                self._timer.delta(index, chunk)
                yield index, chunk
            self._timer.done()
        finally:
            self._timer.left()
            self._timer.used(self._prompt_tokens, self._completion_tokens)
            self._charge.settle(self._prompt_tokens + self._completion_tokens)
            await chunks.aclose()

    def _failed(self, failure: Failure) -> FailureError:
        self._timer.failed(failure)
        if not self._completion_tokens and status_of(failure) >= 429:  # not the client's fault
            self._charge.refund()
        return FailureError(failure)
