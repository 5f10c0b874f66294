"""The live policy: what may change while serving; what is broken is one line naming the field."""

import json
import pickle

import pytest
from test_config import document

from select_n_core.config import parse_config
from select_n_core.errors import ConfigError
from select_n_core.live import LivePolicy, parse_policy
from select_n_core.slo import SLO

WHERE = "applications.1.deployments.1.user_config"
KEYS = {"keys_file": "/etc/select-n/keys.yaml"}
ACME = {"name": "acme", "slo_class": "gold"}
POLICY = {
    "classes": {
        "gold": {"tpot": "100ms", "ttft": "1s", "max_wait": "500ms", "priority": 10},
        "batch": {"tpot": "1s", "ttft": "1min", "priority": -10, "max_queue": 100},
    },
    "default_class": "batch",
    "tenants": [
        {**ACME, "weight": 2, "requests_per_minute": 600, "tokens_per_minute": 1e5, "admin": True},
        {"name": "zeta", "models": ["smollm2-135m-instruct"]},
    ],
    **KEYS,
    "budgets": {"host_memory": "4GiB"},
}


def controlled(policy: object) -> dict:
    """The quickstart with a controller that is given `policy`."""
    raw = document()
    controller = {"name": "ClusterController", "user_config": policy}
    raw["applications"].append(
        {
            "name": "control",
            "import_path": "deployments.control.app:build_app",
            "deployments": [{"name": "Other"}, controller],
        }
    )
    return raw


def test_a_whole_policy():
    config = parse_config(controlled(POLICY))
    live = config.live
    assert live.classes["gold"].targets() == SLO(tpot_s=0.1, ttft_s=1.0, max_wait_s=0.5)
    assert (live.classes["batch"].ttft, live.classes["batch"].max_queue) == (60.0, 100)
    acme, zeta = live.tenants
    assert (acme.slo_class, acme.weight, acme.requests_per_minute) == ("gold", 2, 600)
    assert (acme.admin, zeta.admin, zeta.weight, zeta.tokens_per_minute) == (True, False, 1, None)
    assert zeta.models == ("smollm2-135m-instruct",)
    assert live.budgets.host_memory == 4 << 30


def test_it_reaches_ray_serve_as_it_was_written():
    raw = controlled(POLICY)
    assert parse_config(raw).document["applications"] == controlled(POLICY)["applications"]


def test_without_a_controller_there_is_none_and_it_needs_none():
    assert parse_config(document()).live is None
    assert parse_config(controlled(None)).live == LivePolicy()
    raw = controlled({})
    del raw["applications"][1]["deployments"]
    assert parse_config(raw).live == LivePolicy()


def test_it_travels_between_processes_and_as_json():
    live = parse_policy(POLICY)
    assert pickle.loads(pickle.dumps(live)) == live
    assert parse_policy(json.loads(live.model_dump_json())) == live


@pytest.mark.parametrize(
    ("policy", "field", "says"),
    [
        ({"classes": {"gold": {}}}, "classes.gold.tpot", "Field required"),
        ({"classes": {"gold": {"tpot": "1GiB"}}}, "classes.gold.tpot", "not a second quantity"),
        ({"classes": {"a b": {"tpot": "1s"}}}, "classes.a b.", "should match pattern"),
        (
            {"classes": {"gold": {"tpot": "1s", "ttft": "1s", "max_wait": "2s"}}},
            "classes.gold",
            "max_wait (2 s) is above ttft (1 s)",
        ),
        ({"classes": {"gold": {"tpot": "1s", "max_queue": 0}}}, "classes.gold.max_queue", "1"),
        ({"default_class": "gold"}, "default_class", "there is no class 'gold'; there is none"),
        (
            {"tenants": [ACME], **KEYS},
            "tenants",
            "tenant acme: there is no class 'gold'; there is none",
        ),
        (
            {"tenants": [{"name": "a"}, {"name": "b"}, {"name": "a"}], **KEYS},
            "tenants",
            "tenant names must differ, got a, b, a",
        ),
        ({"tenants": [{"name": "a", "weight": 0}], **KEYS}, "tenants.0.weight", "greater than 0"),
        (
            {"tenants": [{"name": "a", "requests_per_minute": 0}], **KEYS},
            "tenants.0.requests_per_minute",
            "greater than or equal to 1, got 0",
        ),
        (
            {"tenants": [{"name": "a", "tokens_per_minute": -1}], **KEYS},
            "tenants.0.tokens_per_minute",
            "greater than or equal to 1",
        ),
        ({"tenants": [{"name": "a", "models": []}], **KEYS}, "tenants.0.models", "at least 1"),
        ({"tenants": [{"name": "a", "key": "sk"}], **KEYS}, "tenants.0.key", "unknown field"),
        (
            {"tenants": [{"name": "a", "models": ["other"]}], **KEYS},
            "tenants.0.models",
            "there is no model 'other'; there is smollm2-135m-instruct",
        ),
        ({"tenants": [{"name": "a"}]}, "", "tenants need keys_file"),
        (KEYS, "", "keys_file without tenants would let everybody in"),
        (
            {"tenants": [{"name": "a"}], "keys_file": "keys.yaml"},
            "keys_file",
            "must be an absolute path, the same on every node, got 'keys.yaml'",
        ),
        ({"budgets": {"host_memory": "0GiB"}}, "budgets.host_memory", "greater than 0"),
        ({"quotas": {}}, "quotas", "unknown field; remove it or check its spelling"),
        ("gold", "", "needs its fields, as a mapping"),
    ],
)
def test_what_is_broken_is_named(policy, field, says):
    with pytest.raises(ConfigError) as caught:
        parse_config(controlled(policy))
    assert caught.value.field.startswith(f"{WHERE}.{field}".rstrip("."))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_controllers_are_one_too_many():
    raw = controlled({})
    raw["applications"].append(raw["applications"][1])
    with pytest.raises(ConfigError, match="exactly one entry named 'control', found 2"):
        parse_config(raw)


def test_a_controller_of_another_kind_is_refused():
    raw = controlled({})
    raw["applications"][1]["deployments"] = {"name": "ClusterController"}
    with pytest.raises(ConfigError, match=r"applications\.1\.deployments must be a list"):
        parse_config(raw)
