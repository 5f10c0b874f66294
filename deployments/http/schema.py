"""What a client may send: OpenAI's chat and completion requests, and our few extensions.

Fields of the dialect that are not implemented are accepted only where they change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.calls import Call, Message, SamplingWish
from deployments.http.fields import Content, Prompts, Stop, no_op
from select_n_core.errors import RequestError

MAX_SEQUENCES = 128

_SEED = 2**63

MaxTokens = Annotated[
    int,
    Field(
        ge=1,
        description="Output tokens at most. Left out, it is what the context still holds but at "
        "most 256, because memory is reserved for all of them.",
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, no_op(False)] = None


class _Request(_Strict):
    """What both kinds of request share."""

    model: str
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(description="Accepted, and not used.")] | None = None

    # Extensions, spelled as other servers spell them.
    top_k: Annotated[int, Field(ge=0, description="Candidates; 0 is all.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None

    logit_bias: Annotated[Any, no_op({})] = None
    metadata: Annotated[Any, no_op({})] = None
    service_tier: Annotated[Any, no_op("auto", "default")] = None
    store: Annotated[Any, no_op(False)] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is only allowed with stream: true", field="stream_options"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends in a chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, number: int, logprobs: int | None) -> SamplingWish:
        """The wish of sequence `number`: each has its own seed, the first the one given."""
        seed = self.seed
        if seed is not None:
            seed = (seed + number + _SEED) % (2 * _SEED) - _SEED
        return SamplingWish(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class ChatMessage(_Strict):
    """One message of a conversation; `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    annotations: Annotated[Any, no_op([])] = None
    audio: Annotated[Any, no_op()] = None
    function_call: Annotated[Any, no_op()] = None
    name: Annotated[Any, no_op()] = None
    refusal: Annotated[Any, no_op()] = None
    tool_call_id: Annotated[Any, no_op()] = None
    tool_calls: Annotated[Any, no_op([])] = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    audio: Annotated[Any, no_op()] = None
    function_call: Annotated[Any, no_op("none", "auto")] = None
    functions: Annotated[Any, no_op([])] = None
    modalities: Annotated[Any, no_op(["text"])] = None
    moderation: Annotated[Any, no_op()] = None
    parallel_tool_calls: Annotated[Any, no_op(True, False)] = None
    prediction: Annotated[Any, no_op()] = None
    prompt_cache_key: Annotated[Any, no_op()] = None
    prompt_cache_retention: Annotated[Any, no_op()] = None
    reasoning_effort: Annotated[Any, no_op()] = None
    response_format: Annotated[Any, no_op({"type": "text"})] = None
    safety_identifier: Annotated[Any, no_op()] = None
    tool_choice: Annotated[Any, no_op("none", "auto")] = None
    tools: Annotated[Any, no_op([])] = None
    verbosity: Annotated[Any, no_op()] = None
    web_search_options: Annotated[Any, no_op()] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError(
                "max_tokens and max_completion_tokens differ; send one of them",
                field="max_completion_tokens",
            )
        return self

    def calls(self, request_id: str) -> tuple[Call, ...]:
        """One call per choice."""
        completion_given = self.max_completion_tokens is not None
        turns = tuple(
            Message("system" if each.role == "developer" else each.role, each.content)
            for each in self.messages
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return tuple(
            Call(
                id=f"{request_id}-{number}",
                prompt=turns,
                sampling=self._sampling(number, logprobs),
                max_tokens=self.max_completion_tokens if completion_given else self.max_tokens,
                stop=tuple(self.stop or ()),
                prompt_field="messages",
                max_tokens_field="max_completion_tokens" if completion_given else "max_tokens",
            )
            for number in range(self.n or 1)
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: Annotated[Any, no_op(1)] = None
    echo: Annotated[Any, no_op(False)] = None
    suffix: Annotated[Any, no_op("")] = None

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        sequences = len(self.prompt) * (self.n or 1)
        if sequences > MAX_SEQUENCES:
            raise RequestError(
                f"{len(self.prompt)} prompts times n are {sequences} sequences, "
                f"above the limit of {MAX_SEQUENCES}",
                field="prompt",
            )
        return self

    def calls(self, request_id: str) -> tuple[Call, ...]:
        """One call per choice: the first prompt's n, then the next one's."""
        return tuple(
            Call(
                id=f"{request_id}-{index}-{number}",
                prompt=prompt,
                sampling=self._sampling(number, self.logprobs),
                max_tokens=self.max_tokens,
                stop=tuple(self.stop or ()),
            )
            for index, prompt in enumerate(self.prompt)
            for number in range(self.n or 1)
        )
