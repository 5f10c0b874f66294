"""How deltas read in OpenAI's two dialects, streamed and whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deployments.calls import Delta, Finish, TokenChance, TokenDetail


class Dialect(Protocol):
    """The spelling of one endpoint; one object per request, fed every delta in order."""

    operation: str
    id_prefix: str
    object_name: str
    chunk_name: str

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A streamed choice."""
        ...

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A finished choice."""
        ...


class ChatDialect:
    """chat.completion and chat.completion.chunk; a choice's first chunk names the role."""

    operation = "chat"
    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """See `Dialect.chunk`."""
        content: dict[str, str] = {"content": delta.text} if delta.text or not delta.finish else {}
        if index not in self._begun:
            self._begun.add(index)
            content = {"role": "assistant", "content": delta.text}
        return {
            "index": index,
            "delta": content,
            "logprobs": self._chances([delta]),
            "finish_reason": delta.finish,
        }

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `Dialect.whole`."""
        text = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._chances(deltas),
            "finish_reason": _finish(deltas),
        }

    def _chances(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        details = [detail for delta in deltas for detail in delta.details]
        return {
            "content": [
                _chance(detail.drawn) | {"top_logprobs": [_chance(each) for each in detail.top]}
                for detail in details
            ],
            "refusal": None,
        }


class CompletionDialect:
    """text_completion, streamed and whole; logprobs carry each token's place in the text."""

    operation = "text_completion"
    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """See `Dialect.chunk`."""
        return self._choice(index, [delta], delta.finish)

    def whole(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """See `Dialect.whole`."""
        return self._choice(index, deltas, _finish(deltas))

    def _choice(self, index: int, deltas: Sequence[Delta], finish: Finish | None) -> dict[str, Any]:
        details = [detail for delta in deltas for detail in delta.details]
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": self._chances(index, details) if self._logprobs else None,
            "finish_reason": finish,
        }

    def _chances(self, index: int, details: Sequence[TokenDetail]) -> dict[str, Any]:
        offsets = []
        for detail in details:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(detail.drawn.text)
        return {
            "tokens": [detail.drawn.text for detail in details],
            "token_logprobs": [detail.drawn.logprob for detail in details],
            "top_logprobs": [{each.text: each.logprob for each in d.top} for d in details],
            "text_offset": offsets,
        }


def _finish(deltas: Sequence[Delta]) -> Finish | None:
    return deltas[-1].finish if deltas else None


def _chance(chance: TokenChance) -> dict[str, Any]:
    return {
        "token": chance.text,
        "logprob": chance.logprob,
        "bytes": list(chance.text.encode("utf-8", "replace")),
    }
