"""The sampler against transformers' own processors, direct formulas and counted draws."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from select_n_core.engine.messages import Request, SamplingParams
from select_n_core.engine.sampler import CANDIDATES, Drawn, Sampler, next_token_probabilities
from select_n_core.errors import EngineError, RequestError

torch.set_num_threads(1)

SMALL, LARGE = 11, 3 * CANDIDATES


def params(**rules: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "temperature": 1.0, **rules})


def noise(vocab_size: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, generator=generator) * spread


def transformers_scores(
    logits: torch.Tensor, rules: SamplingParams, history: list[int]
) -> torch.Tensor:
    """What `generate` would draw from, as log-weights with -inf for what it removed."""
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)])
    chain.append(TemperatureLogitsWarper(rules.temperature))
    if rules.top_k:
        chain.append(TopKLogitsWarper(rules.top_k))
    chain.append(TopPLogitsWarper(rules.top_p))
    chain.append(MinPLogitsWarper(rules.min_p))
    return chain(torch.tensor([history]), logits[None].float())[0]


def assume_no_token_on_a_cut(scores: torch.Tensor, rules: SamplingParams) -> None:
    """Rounding may put a token that lies exactly on a border on either side of it."""
    ranked = scores.double().sort(descending=True).values
    ranked = ranked[: rules.top_k or None]
    mass = ranked.softmax(0).cumsum(0)
    assume(rules.top_p == 1 or (mass - rules.top_p).abs().min() > 1e-5)
    ratio = (ranked - ranked[0]).exp()
    assume(rules.min_p in (0, 1) or (ratio / rules.min_p - 1).abs().min() > 1e-5)


@st.composite
def situations(draw: st.DrawFn) -> tuple[torch.Tensor, SamplingParams, list[int], list[int]]:
    vocab_size = draw(st.sampled_from([SMALL, LARGE]))
    logits = noise(vocab_size, draw(st.integers(0, 10**6)), draw(st.sampled_from([0.3, 1, 4])))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=8)
    rules = params(
        temperature=draw(st.floats(0.1, 2)),
        top_k=draw(st.sampled_from([0, 1, 3, CANDIDATES, CANDIDATES + 1, 10 * LARGE])),
        top_p=draw(st.floats(0.01, 1)),
        min_p=draw(st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0])),
        repetition_penalty=draw(st.floats(0.5, 2)),
    )
    return logits, rules, [draw(st.integers(0, vocab_size - 1)), *draw(tokens)], draw(tokens)


@given(situations())
@settings(max_examples=150, deadline=None)
def test_the_distribution_is_the_one_transformers_draws_from(situation) -> None:
    logits, rules, prompt, output = situation
    penalised = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(
        torch.tensor([prompt + output]), logits[None].clone()
    )[0]
    assume_no_token_on_a_cut(penalised / rules.temperature, rules)

    ours = next_token_probabilities(logits, rules, prompt, output)

    theirs = transformers_scores(logits, rules, prompt + output)
    assert torch.equal(ours > 0, theirs.softmax(0) > 0)
    torch.testing.assert_close(ours, theirs.softmax(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "rules",
    [params(top_p=0.99), params(min_p=1e-6), params(top_p=0.999, min_p=1e-5), params()],
    ids=["top-p", "min-p", "both", "neither"],
)
def test_a_flat_distribution_keeps_more_tokens_than_the_quick_candidates(rules) -> None:
    logits = noise(LARGE, seed=1, spread=0.1)

    ours = next_token_probabilities(logits, rules)

    assert int((ours > 0).sum()) > CANDIDATES
    torch.testing.assert_close(ours, transformers_scores(logits, rules, [0]).softmax(0))


@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    output=st.lists(st.integers(0, SMALL - 1), max_size=20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_presence_and_frequency_penalties_count_the_output_alone(
    presence: float, frequency: float, output: list[int], seed: int
) -> None:
    logits = noise(SMALL, seed)
    rules = params(presence_penalty=presence, frequency_penalty=frequency)

    ours = next_token_probabilities(logits, rules, prompt=[1, 1, 2], output=output)

    expected = [
        float(logit) - presence * (token in output) - frequency * output.count(token)
        for token, logit in enumerate(logits)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected).softmax(0))


def test_what_a_request_drew_is_penalised_in_its_next_draw() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    sampler = Sampler(4)
    sampler.add(Request("r", (3,), params(temperature=0, frequency_penalty=1.5)))

    drawn = [sampler.sample(logits, ["r"])[0].token for _ in range(6)]

    assert drawn == [0, 1, 0, 2, 1, 0]


def test_the_repetition_penalty_covers_the_prompt_and_the_output() -> None:
    logits = torch.tensor([[5.0, 4.5, 4.0]])
    sampler = Sampler(3)
    sampler.add(Request("r", (0,), params(temperature=0, repetition_penalty=2.0)))

    assert [sampler.sample(logits, ["r"])[0].token for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == [[5.0, 4.5, 4.0]], "the model's logits were modified"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_best_token_of_every_row(dtype: torch.dtype) -> None:
    logits = torch.stack([noise(LARGE, seed) for seed in range(5)]).to(dtype)
    sampler = Sampler(LARGE)
    for row in range(5):
        sampler.add(Request(str(row), (1,), params(temperature=0)))

    drawn = sampler.sample(logits, [str(row) for row in range(5)])

    assert drawn == [Drawn(int(token)) for token in logits.argmax(-1)]


@pytest.mark.parametrize("temperature", [1e-12, 1e-45])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SMALL)
    sampler.add(Request("r", (1,), params(temperature=temperature)))
    logits = noise(SMALL, seed=3)[None]

    assert sampler.sample(logits, ["r"]) == [Drawn(int(logits.argmax()))]
    assert next_token_probabilities(logits[0], params(temperature=temperature)).max() == 1


RULES = [
    params(temperature=0),
    params(temperature=0.8, seed=7),
    params(temperature=1.5, seed=-7, top_k=40),
    params(seed=11, top_p=0.9),
    params(seed=13, min_p=0.01, presence_penalty=1.0, logprobs=2),
    params(seed=17, repetition_penalty=1.3, top_p=0.95),
]


def draw_all(rules: list[SamplingParams], order: list[int], steps: int = 12) -> dict[int, list]:
    """Tokens of each request, all in one batch in this order; its own logits at every step."""
    sampler = Sampler(LARGE)
    for request in order:
        sampler.add(Request(str(request), (1, 2), rules[request]))
    drawn: dict[int, list] = {request: [] for request in order}
    for step in range(steps):
        logits = torch.stack([noise(LARGE, 1000 * request + step, 0.5) for request in order])
        for request, token in zip(
            order, sampler.sample(logits, [str(request) for request in order]), strict=True
        ):
            drawn[request].append(token)
    return drawn


def test_a_requests_tokens_do_not_depend_on_its_batch_mates() -> None:
    together = draw_all(RULES, [3, 0, 5, 2, 4, 1])

    for request in range(len(RULES)):
        assert draw_all(RULES, [request])[request] == together[request]
    assert together == draw_all(RULES, [3, 0, 5, 2, 4, 1])


def test_another_seed_and_no_seed_draw_other_tokens() -> None:
    def tokens(seed: int | None) -> list:
        return draw_all([params(seed=seed)], [0])[0]

    assert len({tuple(map(repr, tokens(seed))) for seed in (1, 2, None, None)}) == 4


@pytest.mark.parametrize(
    "rules",
    [params(seed=5), params(seed=5, temperature=0.7, top_k=5), params(seed=5, top_p=0.9)],
    ids=["pure", "top-k", "top-p"],
)
def test_tokens_come_as_often_as_their_probability_says(rules: SamplingParams) -> None:
    logits = noise(8, seed=2, spread=1.0)
    expected = next_token_probabilities(logits, rules) * 4000
    sampler = Sampler(8)
    sampler.add(Request("r", (1,), rules))

    counts = torch.zeros(8)
    for _ in range(4000):
        counts[sampler.sample(logits[None], ["r"])[0].token] += 1

    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[possible].sum()
    assert chi_square < 30  # at most 7 degrees of freedom: one seed in ten thousand is beyond


@given(st.integers(0, 1000), st.integers(0, 5), st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_logprobs_are_the_log_softmax_of_the_raw_logits(
    seed: int, alternatives: int, temperature: float
) -> None:
    logits = noise(SMALL, seed).to(torch.bfloat16)
    rules = params(
        temperature=temperature, seed=seed, repetition_penalty=1.7, logprobs=alternatives
    )
    sampler = Sampler(SMALL)
    sampler.add(Request("r", (1, 2), rules))

    (drawn,) = sampler.sample(logits[None], ["r"])

    expected = logits.float().log_softmax(0)
    assert drawn.logprob.logprob == pytest.approx(float(expected[drawn.token]))
    best = expected.topk(alternatives).values.tolist()
    assert [logprob for _, logprob in drawn.logprob.top] == pytest.approx(best)
    assert all(math.isclose(expected[token], logprob) for token, logprob in drawn.logprob.top)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rules", RULES[:4], ids=["greedy", "pure", "top-k", "top-p"])
def test_a_bad_row_fails_its_own_request_only(rules: SamplingParams, bad: float) -> None:
    sampler = Sampler(SMALL)
    for request in ("good", "bad"):
        sampler.add(Request(request, (1,), rules))
    logits = torch.stack([noise(SMALL, 1), noise(SMALL, 2)])
    logits[1, 4] = bad

    good, broken = sampler.sample(logits, ["good", "bad"])

    assert isinstance(good, Drawn)
    assert isinstance(broken, EngineError)
    assert "request bad " in str(broken)


def test_masked_tokens_are_no_error_and_never_drawn() -> None:
    logits = torch.full((1, SMALL), -math.inf)
    logits[0, 3] = -1.0
    sampler = Sampler(SMALL)
    for name, rules in {"p": params(top_p=0.9), "k": params(top_k=5), "all": params()}.items():
        sampler.add(Request(name, (1,), rules))

    drawn = sampler.sample(logits.expand(3, -1), ["p", "k", "all"])

    assert drawn == [Drawn(3)] * 3


def test_penalties_beyond_float32_fail_their_request() -> None:
    sampler = Sampler(SMALL)
    sampler.add(Request("r", (1,), params(repetition_penalty=1e-44)))

    (failed,) = sampler.sample(torch.ones(1, SMALL), ["r"])

    assert isinstance(failed, EngineError)
    assert "penalties" in str(failed)


def test_requests_come_and_go() -> None:
    sampler = Sampler(SMALL)
    request = Request("r", (1,), params(seed=1))
    sampler.add(request)
    with pytest.raises(EngineError, match="drop it first"):
        sampler.add(request)
    logits = noise(SMALL, 0)[None]
    first = [sampler.sample(logits, ["r"]) for _ in range(5)]

    sampler.drop("r")
    sampler.drop("r")
    sampler.add(request)

    assert [sampler.sample(logits, ["r"]) for _ in range(5)] == first
    assert sampler.sample(logits[:0], []) == []


def test_logits_of_another_shape_are_refused() -> None:
    sampler = Sampler(SMALL)
    sampler.add(Request("r", (1,), params()))

    with pytest.raises(EngineError, match="one row per request"):
        sampler.sample(torch.zeros(2, SMALL), ["r"])
    with pytest.raises(EngineError, match="one row per request"):
        sampler.sample(torch.zeros(1, SMALL + 1), ["r"])


def test_penalties_over_a_prompt_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match=f"token {SMALL}") as caught:
        Sampler(SMALL).add(Request("r", (1, SMALL), params(repetition_penalty=1.1)))
    assert caught.value.field == "prompt"


def test_the_sampler_works_across_inference_modes() -> None:
    rules = dataclasses.replace(RULES[5], frequency_penalty=0.5)
    sampler = Sampler(SMALL)
    with torch.inference_mode():
        sampler.add(Request("r", (1,), rules))
        inside = noise(SMALL, 1)[None]

    for _ in range(2):
        (drawn,) = sampler.sample(inside, ["r"])
        assert isinstance(drawn, Drawn)
