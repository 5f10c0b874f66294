"""Draws the next token of every row of a batch: each request by its own rules and generator.

Rows come as raw logits on the model's device. There they are only reduced (argmax, top-k,
log-sum-exp); penalties, filters and draws run in float32 on the host, so that a seed gives the
same tokens whatever the device is. Nothing a row draws depends on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from select_n_core.engine.messages import Request, SamplingParams, TokenLogprob
from select_n_core.errors import EngineError, RequestError

# Sorting a whole vocabulary costs seven times the search for its best thousand.
CANDIDATES = 1024
# Dividing by less than this overflows float32 long before it changes a draw.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token; `logprob` is set for requests that asked for log-probabilities."""

    token: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Next tokens for the live requests of one engine.

    Args:
        vocab_size: width of every row of logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._states: dict[str, _State] = {}

    def add(self, request: Request) -> None:
        """Begin to sample `request`, from the start of its own random sequence.

        Raises:
            EngineError: a request of this id is being sampled already.
            RequestError: penalties are asked for over a prompt with tokens outside the vocabulary.
        """
        if request.id in self._states:
            raise EngineError(f"request {request.id} is sampled already: drop it first")
        sampling = request.sampling
        self._states[request.id] = _State(
            request.id,
            sampling,
            penalties=(
                _Penalties(sampling, request.prompt, self._vocab_size)
                if _has_penalties(sampling)
                else None
            ),
            generator=None if _is_greedy(sampling) else _generator(sampling.seed),
        )

    def drop(self, request_id: str) -> None:
        """Forget a request; one that is not known is already forgotten."""
        self._states.pop(request_id, None)

    def sample(self, logits: Tensor, request_ids: Sequence[str]) -> list[Drawn | EngineError]:
        """Draw one token per row and remember it for that request's penalties.

        Args:
            logits: [rows, vocab] in any float dtype, on any device; not modified.
            request_ids: the request of each row, each added before.

        Returns:
            One entry per row. A row whose best logit is NaN or infinite gets an EngineError in
            the place of its token (returned, not raised); the other rows are drawn all the same.
        """
        if logits.shape != (len(request_ids), self._vocab_size):
            raise EngineError(
                f"logits are {tuple(logits.shape)}, "
                f"expected {(len(request_ids), self._vocab_size)}: one row per request"
            )
        states = [self._states[request_id] for request_id in request_ids]
        if not states:
            return []
        with torch.inference_mode():
            # max, not argmax: it brings the value along, which NaN spoils, and in bfloat16 it is
            # several times faster.
            peaks, best = logits.max(dim=-1)
            finite = torch.isfinite(peaks).tolist()
            return [
                state.draw(row, token) if usable else state.failure("the model's logits are")
                for state, row, token, usable in zip(
                    states, logits.unbind(), best.tolist(), finite, strict=True
                )
            ]


def next_token_probabilities(
    logits: Tensor,
    sampling: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> Tensor:
    """The distribution that `Sampler` draws a request's next token from.

    Penalties come first, then temperature, top-k, top-p and min-p, each over what the one before
    left, as in transformers. Of equal logits at a cut, which one stays is left open.

    Args:
        logits: [vocab], raw.
        sampling: the rules; a greedy request gets all the mass on its best token.
        prompt: the request's prompt, for the repetition penalty.
        output: its tokens so far, for all penalties.

    Returns:
        [vocab] float32 on the host, summing to 1.
    """
    with torch.inference_mode():
        if _has_penalties(sampling):
            penalties = _Penalties(sampling, prompt, logits.shape[0])
            for token in output:
                penalties.record(token)
            logits = penalties.apply(logits)
        probabilities = torch.zeros(logits.shape[0])
        if _is_greedy(sampling):
            probabilities[int(logits.argmax())] = 1.0
            return probabilities
        tokens, weights = _candidates(logits, sampling)
        if tokens is None:
            return weights / weights.sum()
        return probabilities.scatter_(0, tokens, weights / weights.sum())


@dataclass(slots=True)
class _State:
    """A live request's rules, generator (None: greedy) and penalties (None: it has none)."""

    request_id: str
    sampling: SamplingParams
    penalties: _Penalties | None
    generator: torch.Generator | None

    def draw(self, row: Tensor, best: int) -> Drawn | EngineError:
        """A token of `row` [vocab], whose most likely token is `best`."""
        scores = row
        if self.penalties is not None:
            scores = self.penalties.apply(row)
            peak, at = scores.max(dim=-1)
            if not math.isfinite(peak):
                return self.failure("its penalties make the logits")
            best = int(at)
        token = best if self.generator is None else self._pick(scores)
        if self.penalties is not None:
            self.penalties.record(token)
        return Drawn(token, _logprob(row, token, self.sampling.logprobs))

    def failure(self, subject: str) -> EngineError:
        """The error that stands where the token should be."""
        return EngineError(f"request {self.request_id} cannot go on: {subject} NaN or infinite")

    def _pick(self, scores: Tensor) -> int:
        """Where a uniform draw falls in the weights, laid end to end."""
        tokens, weights = _candidates(scores, self.sampling)
        # float32 has too few values for rare tokens, in the draw as in the sums.
        ends = weights.cumsum(0, dtype=torch.float64)
        # In (0, 1], so that the draw falls on a token whose weight is not 0, and never beyond.
        share = 1 - torch.rand((), generator=self.generator, dtype=torch.float64)
        winner = int(torch.searchsorted(ends, share * ends[-1]))
        return winner if tokens is None else int(tokens[winner])


class _Penalties:
    """What a request has said so far, as the penalties need it: host tensors of [vocab]."""

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._seen: Tensor | None = None  # in prompt or output
        self._counts: Tensor | None = None  # in output
        if self._repetition != 1:
            stray = next((token for token in prompt if not 0 <= token < vocab_size), None)
            if stray is not None:
                raise RequestError(
                    f"prompt has token {stray}, but the vocabulary ends at {vocab_size - 1}",
                    field="prompt",
                )
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt, dtype=torch.int64)] = True
        if self._presence or self._frequency:
            self._counts = torch.zeros(vocab_size)

    def record(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def apply(self, row: Tensor) -> Tensor:
        """`row` [vocab] penalised, as float32 on the host; `row` itself stays as it is."""
        scores = row.to("cpu", torch.float32)
        if self._seen is not None:
            penalised = torch.where(
                scores < 0, scores * self._repetition, scores / self._repetition
            )
            scores = torch.where(self._seen, penalised, scores)
        if self._counts is not None:
            scores = scores - self._presence * (self._counts > 0) - self._frequency * self._counts
        return scores


def _candidates(row: Tensor, sampling: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """The tokens of `row` [vocab] that may be drawn, and their weights, on the host.

    Weights are float32, in proportion to the probabilities, the largest being 1. Tokens are None
    when every token may be drawn; the weights are then in vocabulary order.
    """
    vocab_size = row.shape[0]
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        scores = row.to("cpu", torch.float32)
        return None, ((scores - scores.max()) / sampling.temperature).exp()
    wanted = sampling.top_k or CANDIDATES
    for count in sorted({min(wanted, vocab_size), vocab_size}):
        logits, tokens = row.topk(count)
        top = logits.to("cpu", torch.float32)
        scores = (top - top[0]) / sampling.temperature
        whole = bool(sampling.top_k) or count == vocab_size  # nothing outside may be drawn
        total = (
            scores.exp().sum()
            if whole
            else ((row.float() - logits[0]) / sampling.temperature).exp().sum().cpu()
        )
        kept = _kept(scores, total, sampling)
        if whole or kept < count:
            return tokens.to("cpu")[:kept], scores[:kept].exp()
    raise AssertionError("the whole vocabulary decides every filter")


def _kept(scores: Tensor, total: Tensor, sampling: SamplingParams) -> int:
    """How many of the descending log-weights `scores`, a share of `total`, top-p and min-p keep.

    All of them, when neither filter ends within `scores`.
    """
    kept: int = scores.shape[0]
    if sampling.top_p < 1:
        # A token stays while the mass of those above it is still below top_p.
        mass = (scores.exp() / total).cumsum(0)
        kept = min(kept, int(torch.searchsorted(mass, sampling.top_p)) + 1)
    if sampling.min_p > 0:
        kept = min(kept, int((scores >= math.log(sampling.min_p)).sum()))
    return kept


def _logprob(row: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    """Log-softmax of the raw `row` [vocab] at `token` and at its `alternatives` best tokens."""
    if alternatives is None:
        return None
    logprobs = row.to("cpu", torch.float32).log_softmax(0)
    values, tokens = logprobs.topk(min(alternatives, row.shape[0]))
    return TokenLogprob(
        logprob=float(logprobs[token]),
        top=tuple(zip(tokens.tolist(), values.tolist(), strict=True)),
    )


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < GREEDY_TEMPERATURE


def _has_penalties(sampling: SamplingParams) -> bool:
    return bool(
        sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    )


def _generator(seed: int | None) -> torch.Generator:
    """A host generator, seeded by `seed` or by the operating system."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
