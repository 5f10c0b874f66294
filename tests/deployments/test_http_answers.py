"""What well-formed requests get: text, choices, usage, log-probabilities, whole and streamed."""

import openai
import pytest
from standins import HANG, MODEL, TEMPLATE, codec


def test_a_chat_is_answered_whole(says):
    client = says("Hello there")
    answer = client.chat().json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "Hello there"
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    prompt = len("<user>Hi<assistant>")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 11,
        "total_tokens": prompt + 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_chat_is_streamed_one_chunk_per_step(says):
    chunks = says("abc").stream()
    assert chunks.pop() == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": "a"},
        {"content": "b"},
        {"content": "c"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 3 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_reports_usage_at_its_end_when_asked(says):
    *chunks, last, done = says("abc").stream(stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("prompt", "cached"), [("Hello", 3), (["Hello", "there"], 6)])
def test_usage_tells_how_much_of_every_prompt_was_cached(says, prompt, cached):
    client = says("ab")
    client.engine.cached_tokens = 3
    usage = client.complete(prompt=prompt, n=2, seed=0).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
    *_, last, _ = client.stream(stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_the_first_token_does_not_wait_for_the_second(says):
    client = says("a", HANG, stream_timeout="60s")
    body = {"model": MODEL, "prompt": "Hi", "stream": True}
    with client.http.stream("POST", "/v1/completions", json=body) as response:
        first = next(response.iter_lines())
    assert '"text":"a"' in first


def test_max_tokens_ends_a_text(says):
    choice = says("abcdef").complete(max_tokens=3).json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"


def test_without_max_tokens_a_request_takes_no_more_than_256(says):
    client = says("a")
    client.complete()
    assert client.engine.requests[0].sampling.max_tokens == 256


def test_without_max_tokens_a_request_takes_what_the_context_holds(says):
    client = says("a", max_tokens=10)
    client.complete(prompt="1234567")
    assert client.engine.requests[0].sampling.max_tokens == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_engine(says, streamed):
    client = says("one two STOP three")
    if streamed:
        chunks = client.stream("/v1/completions", prompt="Hi", stop=" STOP")[:-1]
        choices = [chunk["choices"][0] for chunk in chunks]
    else:
        choices = client.complete(stop=[" STOP", "never"]).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one two"
    assert choices[-1]["finish_reason"] == "stop"
    assert client.engine.cancelled == [client.engine.requests[0].id]


def test_n_choices_come_from_consecutive_seeds(says):
    client = says("abcdef")
    answer = client.complete(n=3, seed=1).json()
    assert [choice["text"] for choice in answer["choices"]] == ["bcdef", "cdef", "def"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        2,
        12,
        14,
    )


def test_n_choices_are_streamed_side_by_side(says):
    *chunks, done = says("abcd").stream(n=2, seed=0)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "abcd", 1: "bcd"}
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("Hi", 2), (["Hi", "you"], 5), ([65, 66], 2), ([[65], [66, 67]], 3)],
)
def test_a_prompt_has_four_spellings(says, prompt, tokens):
    answer = says("ab").complete(prompt=prompt).json()
    assert answer["usage"]["prompt_tokens"] == tokens
    assert {choice["text"] for choice in answer["choices"]} == {"ab"}


def test_a_chat_tells_log_probabilities(says):
    choice = says("ab").chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [each["token"] for each in second["top_logprobs"]] == ["b", "c"]
    assert [each["logprob"] for each in second["top_logprobs"]] == [-0.5, -1.5]


def test_a_streamed_chat_tells_log_probabilities_with_their_token(says):
    chunks = says("ab").stream(logprobs=True)[:-2]
    tokens = [chunk["choices"][0]["logprobs"]["content"][0]["token"] for chunk in chunks]
    assert tokens == ["a", "b"]


def test_a_completion_tells_log_probabilities_and_offsets(says):
    logprobs = says("abc").complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_a_streamed_completion_counts_offsets_on(says):
    chunks = says("abc").stream("/v1/completions", prompt="Hi", logprobs=0)[:-2]
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [1], [2]]


def test_sampling_reaches_the_engine(says):
    client = says("a")
    client.chat(
        max_completion_tokens=5,
        temperature=0.3,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=0,
        ignore_eos=True,
    )
    sampling = client.engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.3, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (7, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.seed, sampling.ignore_eos) == (0, True)


def test_what_a_client_leaves_open_the_model_decides(says):
    client = says("a", text=codec({"temperature": 0.6, "top_k": 40}))
    client.chat(top_k=3)
    assert client.engine.requests[0].sampling.temperature == 0.6
    assert client.engine.requests[0].sampling.top_k == 3


def test_what_nobody_decides_is_the_dialects_default(says):
    client = says("a")
    client.chat()
    assert client.engine.requests[0].sampling.temperature == 1.0


def test_fields_that_change_nothing_are_accepted(says):
    client = says("ok")
    answer = client.chat(
        tools=None,
        tool_choice="none",
        response_format={"type": "text"},
        logit_bias={},
        store=False,
        user="someone",
        service_tier="auto",
    )
    assert answer.status_code == 200
    assert client.complete(echo=False, best_of=1, suffix=None).status_code == 200


def test_a_message_may_come_in_parts_and_from_a_developer(says):
    client = says("ok")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = client.chat(
        messages=[{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    )
    prompt = "<system>Be brief<user>one\ntwo<assistant>"
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
    assert "role" in TEMPLATE


def test_the_openai_client_talks_to_it(says):
    url = says("Hello").url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "select-n"
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "Hello"
    whole = client.completions.create(model=MODEL, prompt="Hi", logprobs=1)
    assert whole.choices[0].logprobs.tokens == list("Hello")
