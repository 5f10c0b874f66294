"""What everything else gets: one OpenAI-shaped error that names the field, and no one else hurt."""

import json

import openai
import pytest
from standins import HANG, MODEL, Client, ScriptedEngine, codec, eventually, serving

from select_n_core.decisions.facts import Reason
from select_n_core.errors import DeviceMemoryError, EngineError, OverloadedError, RequestError


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]


@pytest.fixture(scope="module")
def shared(text):
    engine = ScriptedEngine(text, "ok")
    with serving(engine, text) as url:
        yield Client(url, engine)


@pytest.fixture
def client(shared):
    """One server for all requests that must reach no engine and leave the server unharmed."""
    shared.engine.requests.clear()
    yield shared
    assert not shared.engine.requests
    assert shared.complete().status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": 7}, "stop"),
        ({"stop": [7]}, "stop.0"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"includes": 1}}, "stream_options.includes"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "Bo"}]}, "messages.0.name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"model": None}, "model"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": 0}, "store"),
        ({"max_token": 5}, "max_token"),
        ({"prompt": "Hi"}, "prompt"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(client, fields, param):
    error = error_of(client.chat(**fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[65], "a"]}, "prompt"),
        ({"prompt": ["a", 65]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [65, 10**9]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(client, fields, param):
    body = json.dumps({"model": MODEL, "prompt": "Hi", **fields})
    error = error_of(client.send("/v1/completions", body), 400)
    assert error["param"] == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client, number):
    body = f'{{"model": "{MODEL}", "prompt": "Hi", "temperature": {number}}}'
    error = error_of(client.send("/v1/completions", body), 400)
    assert error["param"] == "temperature"


@pytest.mark.parametrize("body", ["{", "", "[]", "7", '"text"', "null", "\x00"])
def test_a_body_that_is_no_json_object_is_refused(client, body):
    error_of(client.send("/v1/chat/completions", body), 400)


def test_bytes_that_are_no_text_are_refused(client):
    body = b'{"model": "\xff\xfe"}'
    error_of(client.send("/v1/chat/completions", body), 400)


def test_an_unknown_field_with_an_unencodable_name_is_refused(client):
    body = json.dumps({"model": MODEL, "prompt": "Hi", "\ud800": 1})
    error_of(client.send("/v1/completions", body), 400)


def test_an_unknown_model_is_404_and_lists_the_known_ones(client):
    error = error_of(client.chat(model="other"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert MODEL in error["message"]
    assert error_of(client.http.get("/v1/models/other"), 404)["code"] == "model_not_found"
    body = json.dumps({"model": "\ud800", "prompt": "Hi"})
    error_of(client.send("/v1/completions", body), 404)


def test_an_unknown_route_and_method_have_the_same_shape(client):
    assert error_of(client.http.get("/v2/nothing"), 404)["code"] == "not_found"
    assert error_of(client.http.get("/v1/completions"), 405)["code"] == "method_not_allowed"


def test_prompt_plus_max_tokens_above_the_limit_states_the_limit(says):
    client = says("ok", max_tokens=10)
    error = error_of(client.complete(prompt="12345", max_tokens=6), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "10" in error["message"]
    assert "11" in error["message"]
    error = error_of(client.complete(prompt="1234567890"), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert client.complete(prompt="12345", max_tokens=5).status_code == 200


def test_a_model_without_a_chat_template_refuses_chats(says):
    error = error_of(says("ok", text=codec(template=None)).chat(), 400)
    assert error["param"] == "messages"


@pytest.mark.parametrize("reason", list(Reason))
def test_an_overloaded_engine_is_429_with_its_reason_and_a_delay(says, reason):
    client = says(refusal=OverloadedError("the queue is full", reason=reason, retry_after_s=2.3))
    for response in (client.chat(), client.chat(stream=True), client.chat(n=2)):
        error = error_of(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", f"overloaded_{reason}")
        assert response.headers["Retry-After"] == "3"


def test_the_delay_is_whole_seconds_and_one_at_least(says):
    client = says(refusal=OverloadedError("full", reason=Reason.KV, retry_after_s=0.02))
    assert client.chat().headers["Retry-After"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_after_a_wait_is_a_whole_429_too(says, stream):
    refusal = OverloadedError("no room came free", reason=Reason.TTFT, retry_after_s=4)
    client = says("ab", refusal=refusal, verdict_after_s=0.3, stream_timeout="100ms")
    response = client.chat(stream=stream)
    assert error_of(response, 429)["code"] == "overloaded_ttft"
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Retry-After"] == "4"


def test_one_may_wait_longer_to_be_let_in_than_between_tokens(says):
    client = says("ab", verdict_after_s=0.3, stream_timeout="100ms")
    assert client.chat().status_code == 200


def test_the_engines_own_refusal_names_the_field(says):
    client = says(refusal=RequestError("top_k is too fine", field="top_k"))
    assert error_of(client.chat(), 400)["param"] == "top_k"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_before_the_first_token_is_503(says, stream):
    client = says(EngineError("the engine died"))
    assert error_of(client.chat(stream=stream), 503)["code"] == "engine_error"


def test_an_engine_out_of_memory_is_500(says):
    error = error_of(says(DeviceMemoryError("the arena is full")).chat(), 500)
    assert (error["type"], error["code"]) == ("server_error", "device_memory")


def test_an_error_nobody_foresaw_keeps_its_details_to_itself(says):
    error = error_of(says(ValueError("secret path /root")).chat(), 500)
    assert "secret" not in error["message"]


def test_a_stream_that_breaks_ends_in_an_error_event(says):
    *chunks, last = says("ab", EngineError("the engine died")).stream()
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "ab"
    assert last["error"]["message"] == "the engine died"
    assert last["error"]["code"] == "engine_error"


def test_one_broken_choice_stops_the_others(says):
    client = says("ab", EngineError("the engine died"))
    *_, last = client.stream(n=3)
    assert "error" in last
    eventually(lambda: len(client.engine.requests) == 3)


def test_the_openai_client_sees_a_broken_stream(says):
    url = says("ab", EngineError("the engine died")).url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model=MODEL, prompt="Hi", stream=True)
    with pytest.raises(openai.APIError, match="the engine died"):
        list(stream)


def test_a_silent_engine_is_given_up_and_its_request_cancelled(says):
    client = says("ab", HANG, stream_timeout="200ms")
    *_, last = client.stream()
    assert last["error"]["code"] == "stream_timeout"
    eventually(lambda: len(client.engine.cancelled) == 1)
    assert error_of(client.chat(), 503)["code"] == "stream_timeout"
    eventually(lambda: len(client.engine.cancelled) == 2)


def test_a_client_that_leaves_stops_its_requests(says):
    client = says("ab", HANG, stream_timeout="60s")
    body = {"model": MODEL, "prompt": "Hi", "stream": True, "n": 2}
    with client.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # dropping it would close the response
        next(lines)
        assert not client.engine.cancelled
    ids = {request.id for request in client.engine.requests}
    eventually(lambda: set(client.engine.cancelled) == ids)
    assert len(ids) == 2


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_of_another_content_type_is_refused_with_the_mend(client, kind):
    body = json.dumps({"model": MODEL, "prompt": "Hi"})
    headers = {"Content-Type": kind} if kind else {}
    response = client.http.post("/v1/completions", content=body, headers=headers)
    assert "Content-Type: application/json" in error_of(response, 400)["message"]
