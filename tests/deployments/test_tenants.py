"""Tenants over HTTP: a key opens what its tenant may use, as much as it may, as well as it may."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import openai
import pytest
from standins import HANG, MODEL, Client, ScriptedEngine, eventually, serving
from test_http_errors import error_of

from deployments.calls import DEFAULT_MAX_TOKENS
from deployments.tenants.keys import hash_of
from select_n_core.errors import EngineError, OverloadedError, RequestError
from select_n_core.live import LivePolicy, parse_policy

OTHER = "tiny/other"
CLASSES = {
    "gold": {"tpot": "100ms", "ttft": "1s", "priority": 10, "max_queue": 4, "max_wait": "500ms"},
    "batch": {"tpot": "1s", "ttft": "1min", "priority": -10},
}


class Service:
    """A served engine with tenants, whose policy and keys a test may change."""

    def __init__(self, directory, text, stack: ExitStack) -> None:
        self.keys_file = directory / "keys.yaml"
        self.policy: LivePolicy | None = None
        self._text, self._stack = text, stack

    def serve(self, *script, **engine) -> "Service":
        self.engine = ScriptedEngine(self._text, *script or ("ok",), **engine)
        models = (MODEL, OTHER)
        self.url = self._stack.enter_context(
            serving(self.engine, self._text, policy=lambda: self.policy, models=models)
        )
        return self

    def tenants(self, *tenants: dict, **fields) -> None:
        """The tenants from now on; each one's key is `sk-` and its name."""
        self.policy = parse_policy(
            {"tenants": tenants, "keys_file": str(self.keys_file), "classes": CLASSES, **fields}
        )
        self.open(*(tenant["name"] for tenant in tenants))

    def open(self, *names: str) -> None:
        """Write the key file anew."""
        written = self.keys_file.with_suffix(".new")
        lines = (f"{hash_of(f'sk-{name}')}: {name}\n" for name in names)
        written.write_text("".join(lines) or "{}")
        written.replace(self.keys_file)

    def client(self, key: str | None) -> Client:
        client = Client(self.url, self.engine, key)
        self._stack.callback(client.http.close)
        return client

    def openai(self, key: str, **options) -> openai.OpenAI:
        options = {"max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)


@pytest.fixture
def service(text, tmp_path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield Service(tmp_path, text, stack)


@pytest.fixture
def two(service) -> Service:
    """Two tenants, one of whom may use one model only."""
    service.serve("hello")
    service.tenants({"name": "acme", "admin": True}, {"name": "zeta", "models": [OTHER]})
    return service


class TestKeys:
    def test_without_tenants_nobody_needs_one(self, service):
        service.policy = LivePolicy()
        client = service.serve().client(None)
        assert client.chat().status_code == 200
        assert client.http.get("/metrics").status_code == 200

    @pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/metrics", "/v2", "/"])
    def test_nothing_is_shown_without_a_key(self, two, path):
        response = two.client(None).http.get(path)
        error = error_of(response, 401)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert MODEL not in response.text

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    def test_a_body_is_not_even_read_without_one(self, two, path):
        client = two.client(None)
        assert error_of(client.send(path, "no JSON"), 401)["code"] == "invalid_api_key"
        assert error_of(two.client("sk-strange").send(path, "{"), 401)["code"] == "invalid_api_key"

    @pytest.mark.parametrize(
        "header", ["sk-acme", "Basic sk-acme", "Bearer", "Bearer sk-acme x", "Bearer é"]
    )
    def test_what_is_no_bearer_token_is_no_key(self, two, header):
        response = httpx.get(f"{two.url}/v1/models", headers={"Authorization": header.encode()})
        error_of(response, 401)

    def test_the_scheme_may_be_written_as_one_likes(self, two):
        headers = {"authorization": "bearer   sk-acme"}
        assert httpx.get(f"{two.url}/v1/models", headers=headers).status_code == 200

    def test_health_stays_open(self, two):
        assert two.client(None).http.get("/health").json() == {"status": "ok"}
        assert two.client("sk-zeta").http.get("/health").json() == {"status": "ok"}
        assert MODEL in two.client("sk-acme").http.get("/health").text
        error_of(two.client(None).http.get("/health/"), 401)

    def test_ill_health_names_no_model_to_strangers(self, two):
        two.engine.health = EngineError("the engine died")
        error = error_of(two.client(None).http.get("/health"), 503)
        assert error["message"] == "not every model answers"
        assert MODEL in error_of(two.client("sk-acme").http.get("/health"), 503)["message"]

    def test_the_openai_client_raises_its_own_error(self, two):
        with pytest.raises(openai.AuthenticationError) as caught:
            two.openai("sk-strange").models.list()
        assert caught.value.code == "invalid_api_key"
        assert [model.id for model in two.openai("sk-zeta").models.list()] == [OTHER]

    def test_the_error_does_not_repeat_the_key(self, two):
        assert "sk-strange" not in two.client("sk-strange").http.get("/v1/models").text

    def test_what_concerns_everybody_is_for_admins(self, two):
        error = error_of(two.client("sk-zeta").http.get("/metrics"), 403)
        assert error["code"] == "insufficient_permissions"
        page = two.client("sk-acme").http.get("/metrics").text
        assert 'reason="insufficient_permissions",tenant="zeta"} 1.0' in page


class TestModels:
    def test_a_tenant_sees_its_own(self, two):
        def listed(key):
            return [each["id"] for each in two.client(key).http.get("/v1/models").json()["data"]]

        assert listed("sk-acme") == [MODEL, OTHER]
        assert listed("sk-zeta") == [OTHER]

    def test_another_is_not_there_for_it(self, two):
        zeta = two.client("sk-zeta")
        hidden = zeta.chat()
        strange = zeta.chat(model="nothing")
        assert error_of(hidden, 404)["code"] == "model_not_found"
        assert (
            hidden.json()["error"]["message"].replace(MODEL, "nothing")
            == (error_of(strange, 404)["message"])
        )
        error_of(zeta.http.get(f"/v1/models/{MODEL}"), 404)
        assert zeta.chat(model=OTHER).status_code == 200
        with pytest.raises(openai.NotFoundError):
            two.openai("sk-zeta").completions.create(model=MODEL, prompt="Hi")


class TestChanges:
    def test_a_policy_holds_from_the_next_request_on(self, two):
        zeta = two.client("sk-zeta")
        assert zeta.chat().status_code == 404
        two.tenants({"name": "acme"}, {"name": "zeta"})
        assert zeta.chat().status_code == 200
        two.tenants({"name": "acme"})
        two.open("acme", "zeta")
        error_of(zeta.chat(), 401)  # the key is there, the tenant is not

    def test_the_first_tenant_closes_the_door(self, service):
        service.policy = LivePolicy()
        client = service.serve().client(None)
        assert client.chat().status_code == 200
        service.tenants({"name": "acme"})
        error_of(client.chat(), 401)

    def test_keys_change_while_serving(self, two):
        zeta = two.client("sk-zeta")
        assert zeta.chat(model=OTHER).status_code == 200
        two.open("acme")
        error_of(zeta.chat(model=OTHER), 401)
        two.open("acme", "zeta")
        assert zeta.chat(model=OTHER).status_code == 200

    def test_a_stream_goes_on_after_its_key_was_taken_away(self, service):
        service.serve("abc", HANG)
        service.tenants({"name": "acme"})
        acme = service.client("sk-acme")
        body = {"model": MODEL, "prompt": "Hi", "stream": True}
        with acme.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            service.open()
            assert '"b"' in next(line for line in lines if line)
        error_of(acme.chat(), 401)

    def test_a_broken_key_file_locks_nobody_out(self, two, caplog):
        acme = two.client("sk-acme")
        assert acme.chat().status_code == 200
        with caplog.at_level(logging.ERROR):
            two.keys_file.write_text("sk-acme: acme\n")
            assert acme.chat().status_code == 200
        assert "the keys before it stay" in caplog.text

    def test_before_the_policy_is_known_nobody_is_let_in(self, service):
        client = service.serve().client("sk-acme")
        error = error_of(client.chat(), 503)
        assert error["code"] == "unavailable"
        assert client.http.get("/health").status_code == 200
        service.tenants({"name": "acme"})
        assert client.chat().status_code == 200

    def test_without_a_key_file_nobody_is_let_in(self, two):
        two.keys_file.unlink()
        error = error_of(two.client("sk-acme").chat(), 503)
        assert (error["code"], error["type"]) == ("unavailable", "service_unavailable_error")
        two.open("acme")
        assert two.client("sk-acme").chat().status_code == 200


class TestQuotas:
    def serve(self, service: Service, *script, tenant: dict, **engine) -> Client:
        service.serve(*script, **engine)
        service.tenants({"name": "acme", "admin": True, **tenant})
        return service.client("sk-acme")

    def test_too_many_requests_are_429_with_a_time_to_come_again(self, service):
        client = self.serve(service, tenant={"requests_per_minute": 2})
        assert [client.chat().status_code for _ in range(2)] == [200, 200]
        for response in (client.chat(), client.chat(stream=True), client.complete()):
            error = error_of(response, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert 28 <= int(response.headers["Retry-After"]) <= 30
        assert len(client.engine.requests) == 2

    def test_choices_and_prompts_are_one_request(self, service):
        client = self.serve(service, tenant={"requests_per_minute": 2})
        assert client.chat(n=5).status_code == 200
        assert client.complete(prompt=["a", "b", "c"], n=2).status_code == 200
        error_of(client.chat(), 429)

    def test_tokens_are_settled_by_what_was_used(self, service):
        client = self.serve(service, "abcde", tenant={"tokens_per_minute": 600})
        for _ in range(8):  # 2 + 5 each, of the 501 that were reserved
            assert client.complete(max_tokens=500).status_code == 200

    def test_what_runs_is_reserved_until_it_ends(self, service):
        client = self.serve(service, "ab", HANG, tenant={"tokens_per_minute": 300})
        body = {"model": MODEL, "prompt": "Hi", "stream": True, "max_tokens": 200}
        with client.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # dropping it would close the response
            next(lines)
            error_of(client.complete(max_tokens=150), 429)
        eventually(lambda: client.engine.cancelled)
        with client.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200

    def test_who_asks_for_more_than_it_ever_gets_is_not_told_to_retry(self, service):
        client = self.serve(service, tenant={"tokens_per_minute": 100})
        response = client.complete(max_tokens=200)
        assert "lower max_tokens" in error_of(response, 429)["message"]
        assert "Retry-After" not in response.headers
        with pytest.raises(openai.RateLimitError):
            service.openai("sk-acme", max_retries=3).completions.create(
                model=MODEL, prompt="Hi", max_tokens=200
            )
        metrics = client.http.get("/metrics").text
        assert 'reason="rate_limit_exceeded",tenant="acme"} 2.0' in metrics

    @pytest.mark.parametrize(
        "engine",
        [
            {"refusal": OverloadedError("full", reason="kv", retry_after_s=1)},
            {"refusal": EngineError("it died")},
        ],
    )
    def test_what_could_not_be_served_costs_nothing(self, service, engine):
        limits = {"requests_per_minute": 2, "tokens_per_minute": 600}
        client = self.serve(service, tenant=limits, **engine)
        codes = {client.chat().json()["error"]["code"] for _ in range(6)}
        assert "rate_limit_exceeded" not in codes

    def test_a_broken_request_costs_a_request_and_no_tokens(self, service):
        refusal = RequestError("top_k is too fine", field="top_k")
        limits = {"requests_per_minute": 3, "tokens_per_minute": 300}
        client = self.serve(service, refusal=refusal, tenant=limits)
        assert [client.chat().status_code for _ in range(4)] == [400, 400, 400, 429]

    def test_one_tenants_flood_is_not_anothers(self, service):
        service.serve("ok")
        service.tenants({"name": "acme", "requests_per_minute": 1}, {"name": "zeta"})
        acme, zeta = service.client("sk-acme"), service.client("sk-zeta")
        assert [acme.chat().status_code for _ in range(3)] == [200, 429, 429]
        assert zeta.chat().status_code == 200

    def test_a_quota_is_raised_while_serving(self, service):
        client = self.serve(service, tenant={"requests_per_minute": 1})
        assert [client.chat().status_code for _ in range(2)] == [200, 429]
        service.tenants({"name": "acme"})
        assert client.chat().status_code == 200


class TestClasses:
    def test_the_engine_is_told_whose_request_it_is_and_what_was_promised(self, service):
        service.serve("ok")
        service.tenants({"name": "acme", "slo_class": "gold", "weight": 3})
        service.client("sk-acme").chat(n=2)
        for request in service.engine.requests:
            assert (request.tenant, request.weight) == ("acme", 3)
            assert (request.slo_class, request.priority, request.max_queue) == ("gold", 10, 4)
            assert (request.tpot_s, request.deadline_s, request.max_wait_s) == (0.1, 1.0, 0.5)
        assert len(service.engine.requests) == 2

    def test_without_classes_it_keeps_to_its_own_targets(self, service):
        service.policy = LivePolicy()
        service.serve("ok").client(None).chat()
        [request] = service.engine.requests
        assert (request.tenant, request.deadline_s, request.tpot_s) == ("", None, None)

    def test_a_header_lowers_the_class(self, service):
        service.serve("ok")
        service.tenants({"name": "acme", "slo_class": "gold"})
        client = service.client("sk-acme")
        client.http.headers.update({"X-SelectN-Class": "batch", "X-SelectN-TTFT": "90s"})
        assert client.chat().status_code == 200
        [request] = service.engine.requests
        assert (request.slo_class, request.priority, request.deadline_s) == ("batch", -10, 90)
        assert request.max_wait_s == 90

    def test_a_broken_header_is_a_bad_request(self, two):
        client = two.client("sk-acme")
        client.http.headers["X-SelectN-Class"] = "silver"
        error = error_of(client.chat(), 400)
        assert error["param"] == "X-SelectN-Class"
        assert "there is gold, batch" in error["message"]

    def test_a_class_changes_while_serving(self, service):
        service.serve("ok")
        service.tenants({"name": "acme", "slo_class": "gold", "weight": 1})
        client = service.client("sk-acme")
        client.chat()
        service.tenants({"name": "acme", "slo_class": "batch", "weight": 5})
        client.chat()
        first, second = service.engine.requests
        assert (first.slo_class, first.weight) == ("gold", 1)
        assert (second.slo_class, second.weight) == ("batch", 5)


class TestTelemetry:
    def page(self, service: Service) -> str:
        return service.client("sk-acme").http.get("/metrics").text

    def test_requests_and_tokens_are_counted_by_tenant(self, two):
        two.client("sk-acme").complete(n=2)
        two.client("sk-zeta").complete(model=OTHER)
        page = self.page(two)
        who = f'model="{MODEL}"'
        assert f'decisions_total{{{who},outcome="admitted",reason="",tenant="acme"}} 1.0' in page
        assert f'select_n_tokens_total{{{who},tenant="acme",type="input"}} 2.0' in page
        assert f'select_n_tokens_total{{{who},tenant="acme",type="output"}} 10.0' in page
        assert f'tokens_total{{model="{OTHER}",tenant="zeta",type="output"}} 5.0' in page

    def test_strangers_are_counted_and_never_named(self, two):
        for key in ("sk-one", "sk-two", None):
            two.client(key).chat()
        page = self.page(two)
        assert 'outcome="refused",reason="invalid_api_key",tenant=""} 3.0' in page
        assert "sk-" not in page

    def test_a_missed_target_is_the_classs(self, service):
        service.serve("ok", verdict_after_s=0.05)
        fast = {"fast": {"tpot": "1s", "ttft": "10ms"}, "slow": {"tpot": "1s", "ttft": "30s"}}
        service.tenants(
            {"name": "acme", "slo_class": "fast", "admin": True},
            {"name": "zeta", "slo_class": "slow"},
            classes=fast,
        )
        for key in ("sk-acme", "sk-zeta"):
            assert service.client(key).chat().status_code == 200
        [violation] = [
            line
            for line in self.page(service).splitlines()
            if line.startswith("select_n_slo_violations_total")
        ]
        assert 'class="fast"' in violation
        assert 'tenant="acme"' in violation


def test_the_default_of_tokens_reserved_is_the_replicas():
    assert DEFAULT_MAX_TOKENS == 256
