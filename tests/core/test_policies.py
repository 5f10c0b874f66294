"""Policies by name: which k each fixes, how each starts an engine, and when it cannot."""

from dataclasses import replace

import pytest
import torch
from recorded import UNIT_BYTES, paced_config, record
from running import Heard

from select_n_core.decisions.order import k_of_interval
from select_n_core.decisions.plan import make_plan
from select_n_core.decisions.policy import Policy, PolicyKind, forced_k
from select_n_core.engine.build import build_engine
from select_n_core.engine.messages import FinishReason, Request, SamplingParams
from select_n_core.engine.planning import plan_inputs, prepare
from select_n_core.errors import HostMemoryError, InfeasibleError, InputError

torch.set_num_threads(1)

BASELINES = ["fetch_all", "static:1.5", "static:3", "flexgen", "resident"]


@pytest.fixture
def far(tmp_path):
    """Makes configurations of a model of which all but a little fits the device."""

    def make(policy: str = "select_n", **changes):
        workload = {"prompt_tokens": 64, "output_tokens": 32, "rate": 20.0}
        facts = {"policy": policy, "workload": workload, "device_memory": "576KiB"} | changes
        return paced_config(tmp_path / "record.json", record(), **facts)

    return make


class TestNames:
    @pytest.mark.parametrize("text", ["select_n", *BASELINES])
    def test_a_policy_is_written_as_it_is_read(self, text):
        assert str(Policy.parse(text)) == text

    def test_only_ours_turns_k(self):
        assert not Policy.parse("select_n").fixed
        assert all(Policy.parse(text).fixed for text in BASELINES)

    @pytest.mark.parametrize(
        "text",
        ["", "zero", "static", "static:", "static:x", "static:0.5", "static:nan", "flexgen:2"],
    )
    def test_what_is_no_policy_says_what_is(self, text):
        with pytest.raises(InputError, match="must be select_n, fetch_all, flexgen") as caught:
            Policy.parse(text)
        assert caught.value.field == "policy"


class TestForcedK:
    @pytest.fixture
    def inputs(self, far):
        return plan_inputs(far(), record())

    def test_ours_leaves_it_to_the_planner(self, inputs):
        assert forced_k(Policy(PolicyKind.SELECT_N), inputs) is None

    def test_fetch_all_streams_every_unit_and_resident_none(self, inputs):
        assert forced_k(Policy(PolicyKind.FETCH_ALL), inputs) == 6
        assert forced_k(Policy(PolicyKind.RESIDENT), inputs) == 0

    @pytest.mark.parametrize("interval", [1, 1.5, 2, 6, 100])
    def test_static_is_the_interval_given(self, inputs, interval):
        policy = Policy(PolicyKind.STATIC, interval)
        assert forced_k(policy, inputs) == k_of_interval(interval, 6)

    def test_flexgen_streams_no_more_than_the_mean_load_needs(self, inputs):
        flexgen = Policy(PolicyKind.FLEXGEN)
        ks = [forced_k(flexgen, replace(inputs, rate_per_s=rate)) for rate in (0.1, 300.0, 1e9)]
        assert ks == sorted(ks)
        assert ks[0] == 0 < ks[-1]
        candidates = make_plan(inputs).candidates
        best = max(candidate.requests_per_s for candidate in candidates)
        assert candidates[ks[-1]].requests_per_s == pytest.approx(best)

    def test_flexgen_leaves_an_impossible_promise_to_the_planner_to_explain(self, inputs):
        broken = replace(inputs, device_bytes=UNIT_BYTES)
        assert forced_k(Policy(PolicyKind.FLEXGEN), broken) is None


class TestEngines:
    @pytest.mark.parametrize("policy", BASELINES)
    def test_each_starts_with_its_k_and_keeps_it(self, far, policy):
        config = far(policy)
        engine, info = build_engine(config)
        try:
            fixed = forced_k(Policy.parse(policy), plan_inputs(far(), record()))
            assert info.k == fixed == engine.executor.k
            assert f"requested policy {policy}, " in info.plan_line
            heard = Heard(engine)
            for number in range(6):
                engine.submit(
                    Request(f"r{number}", tuple(range(60)), SamplingParams(max_tokens=30))
                )
            engine.lease.offer("more", 6 * UNIT_BYTES)
            heard.run()
            stats = engine.stats()
            assert (stats.k, stats.mirrored, stats.turns) == (fixed, fixed, {})
            assert engine.scheduler.turning.k_min == engine.scheduler.turning.k_most() == fixed
        finally:
            engine.close()
        assert all(heard.finish(f"r{number}") is FinishReason.LENGTH for number in range(6))

    def test_a_fixed_policy_gives_no_mirror_back(self, far):
        engine, _ = build_engine(far("fetch_all"))
        try:
            engine.lease.revoke("back", UNIT_BYTES, 1.0)
            answers = [answer for _ in range(5) for answer in engine.step().leases]
            assert [type(answer.error) for answer in answers] == [HostMemoryError]
        finally:
            engine.close()

    def test_ours_is_not_named_where_it_is_the_policy(self, far):
        prepared = prepare(far())
        assert "policy" not in prepared.line()
        assert not prepared.fixed
        assert prepare(far("resident")).fixed

    @pytest.mark.parametrize(
        ("policy", "changes", "reason"),
        [
            ("resident", {"device_memory": "400KiB"}, "device_too_small"),
            ("static:6", {"device_memory": "400KiB"}, "device_too_small"),
            ("fetch_all", {"host_memory": "128KiB"}, "host_too_small"),
            ("flexgen", {"device_memory": "64KiB"}, "device_too_small"),
        ],
    )
    def test_one_that_cannot_start_says_why(self, far, policy, changes, reason):
        with pytest.raises(InfeasibleError) as caught:
            build_engine(far(policy, **changes))
        assert caught.value.reason == reason
        if policy != "flexgen":
            assert f"policy {policy} (k = " in str(caught.value)
            assert "set policy: select_n" in str(caught.value)
