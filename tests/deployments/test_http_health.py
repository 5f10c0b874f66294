"""Health and metrics, as operators and Prometheus read them."""

import httpx
from prometheus_client.parser import text_string_to_metric_families
from standins import HANG, MODEL

from deployments.calls import Delta, Terms
from deployments.http.metrics import IngressMetrics, RequestTimer
from select_n_core.errors import EngineError, OverloadedError
from select_n_core.slo import SLO


def read(page: str, name: str, **labels: str) -> float:
    """The one sample of that name whose labels hold `labels`."""
    [value] = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return value


def test_health_follows_the_engine(says):
    client = says("ok")
    assert client.http.get("/health").status_code == 200
    client.engine.health = EngineError("the loop stands still")
    response = client.http.get("/health")
    assert response.status_code == 503
    assert "the loop stands still" in response.json()["error"]["message"]


def test_metrics_tell_what_replicas_report(says):
    page = says("ok").http.get("/metrics").text
    who = {"model": MODEL, "replica": "replica-1"}
    assert read(page, "select_n_interval", **who) == 3
    assert read(page, "select_n_units", **who, state="streamed") == 10
    assert read(page, "select_n_units", **who, state="home") == 20
    assert read(page, "select_n_link_bytes_total", **who, kind="weights", direction="h2d") == 7
    assert read(page, "select_n_host_lease_bytes", **who) == 2
    assert read(page, "select_n_replicas", model=MODEL) == 1


def test_metrics_count_requests_and_time_tokens(says):
    client = says("abc")
    client.chat()
    client.complete(n=2)
    page = client.http.get("/metrics").text
    chat = {"gen_ai_request_model": MODEL, "gen_ai_operation_name": "chat"}
    texts = {"gen_ai_request_model": MODEL, "gen_ai_operation_name": "text_completion"}
    assert read(page, "gen_ai_server_request_duration_seconds_count", **chat, error_type="") == 1
    assert read(page, "gen_ai_server_time_to_first_token_seconds_count", **chat) == 1
    assert read(page, "gen_ai_server_time_per_output_token_seconds_count", **texts) == 2
    assert read(page, "select_n_admission_decisions_total", outcome="admitted") == 2


def test_metrics_count_refusals_by_their_reason(says):
    client = says(refusal=OverloadedError("full", reason="kv", retry_after_s=1))
    client.chat()
    page = client.http.get("/metrics").text
    assert read(page, "select_n_admission_decisions_total", reason="overloaded_kv") == 1


def test_metrics_tell_why_a_request_ended(says):
    client = says("a", HANG, stream_timeout="100ms")
    client.chat()
    page = client.http.get("/metrics").text
    ended = {"error_type": "stream_timeout"}
    assert read(page, "gen_ai_server_request_duration_seconds_count", **ended) == 1
    assert read(page, "select_n_admission_decisions_total", outcome="admitted") == 1


def test_a_missed_target_is_a_violation():
    metrics = IngressMetrics({MODEL: SLO(tpot_s=1e-9, ttft_s=1000)})
    timer = RequestTimer(metrics, MODEL, "chat", Terms())
    timer.delta(0, Delta("a", tokens=1))
    timer.delta(0, Delta("b", tokens=1))
    timer.delta(0, Delta("", finish="stop"))
    page = metrics.page({}).decode()
    assert read(page, "select_n_slo_violations_total", slo="tpot") == 1
    assert 'slo="ttft"' not in page


def test_the_api_describes_itself(says):
    schema = httpx.get(f"{says('ok').url}/openapi.json").json()
    assert "at most 256" in str(schema["components"]["schemas"]["ChatRequest"])
