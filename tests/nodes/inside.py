"""Three nodes, a real Serve and two paced models; run by test_nodes.py, inside its namespace."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from tiny import save_tokenizer

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.cluster import RECORD
from benchmarks.cluster_break import hanging, keep_controller_down, kill_replica
from benchmarks.cluster_link import NodeLink
from benchmarks.cluster_load import UNSAID, Load, Outcome
from benchmarks.cluster_nodes import cluster, inside
from benchmarks.cluster_serve import URL, deploy, document
from benchmarks.cluster_stand import Stand, source
from benchmarks.cluster_watch import Watch, mapped_by
from benchmarks.slo_load import Lengths, Phase
from select_n_core.memory.domain import find_domain
from select_n_core.slo import SLO

assert inside(), "run test_nodes.py: these tests need namespaces of their own"

MIB = 1 << 20
BUDGET = 400 * MIB
BACK_S = 120.0
SILENCE_S = 3.0  # after which a stream counts as lost
SHORT = Lengths(median=48, sigma=0.3, least=16, most=128)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`alpha` on all three nodes, `beta` on one of them."""
    scratch = tmp_path_factory.mktemp("models")
    stand = Stand(RECORD, scratch)
    facts = {
        "source": str(save_tokenizer(scratch / "text")),
        "host_bytes": 100 * MIB,
        "targets": SLO(tpot_s=0.2, ttft_s=8.0),
    }
    return stand, {
        name: stand.model(name, 1, 256, replicas=replicas, **facts)
        for name, replicas in (("alpha", 3), ("beta", 1))
    }


@pytest.fixture(scope="module")
def nodes(models):
    with cluster(3) as made:
        policy = {"budgets": {"host_memory": BUDGET}}
        deploy(document(list(models[1].values()), policy, stream_timeout=f"{SILENCE_S}s"))
        yield made


@pytest.fixture
def alpha(models):
    return models[1]["alpha"]


@asynccontextmanager
async def watching(nodes) -> AsyncIterator[Watch]:
    """A watch that knows all four replicas, before and after."""
    async with Watch(nodes) as watch:
        await watch.until(is_whole, BACK_S)
        yield watch
        await watch.until(is_whole, BACK_S)


def is_whole(watch: Watch) -> bool:
    return (len(watch.replicas("alpha")), len(watch.replicas("beta"))) == (3, 1)


async def under_load(
    models, fault: Callable[[], Awaitable[None]], seconds: float = 12.0, rate_per_s: float = 3.0
) -> list[Outcome]:
    """How requests for both models ended, around a fault that came after a third of the time."""
    stand, served = models
    sources = [
        source(model, stand.schedule(index, rate_per_s, seconds, [Phase("steady", prompt=SHORT)]))
        for index, model in enumerate(served.values())
    ]
    load = Load(sources, time.perf_counter())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(load.run())
        await asyncio.sleep(seconds / 3)
        await fault()
    seen = running.result()
    assert len(seen.outcomes) == sum(len(each.schedule.arrivals) for each in sources)
    assert [each for each in seen.outcomes if each.ended in UNSAID] == []
    return seen.outcomes


def failed(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that were let in and came to nothing."""
    return [each for each in outcomes if each.admitted and each.ended != "length"]


def client() -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)


def told() -> dict:
    return httpx.get(f"{URL}/cluster", timeout=10).raise_for_status().json()


@pytest.mark.slow
async def test_the_cluster_is_three_nodes_whose_replicas_are_paced(nodes):
    async with watching(nodes):
        seen = told()
    assert {each["node"] for each in seen["nodes"]} == {node.id for node in nodes.nodes}
    assert {each["compute_kind"] for each in seen["replicas"]} == {"paced"}
    of_alpha = [each["node"] for each in seen["replicas"] if each["model"] == "alpha"]
    assert sorted(of_alpha) == sorted(node.id for node in nodes.nodes)


@pytest.mark.slow
async def test_both_models_answer_and_every_node_serves(nodes):
    async with watching(nodes) as watch, client() as openai_client:

        async def ask(model: str) -> int:
            stream = await openai_client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "the quick brown fox"}],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            usage = [chunk.usage async for chunk in stream if chunk.usage is not None]
            return usage[-1].completion_tokens

        before = {each.replica: each.admitted for each in watch.replicas()}
        answers = await asyncio.gather(*(ask(name) for name in ["alpha", "beta"] * 12))
        assert answers == [8] * 24

        def has_served(seen: Watch) -> bool:
            return all(each.admitted > before[each.replica] for each in seen.replicas())

        await watch.until(has_served, 30.0)


@pytest.mark.slow
def test_every_node_has_a_budget_and_mirrors_of_its_own(nodes):
    domains = set()
    for node in nodes.nodes:
        [ledger] = node.runtime.glob("*/host-1-*.json")
        domains.add(ledger.name)
    assert len(domains) == 3
    assert find_domain().id not in "".join(domains)
    mapped = mapped_by(nodes)
    assert {each.node for each in mapped} == {node.id for node in nodes.nodes}
    for node in nodes.nodes:
        assert 0 < sum(each.nbytes for each in mapped if each.node == node.id) <= BUDGET


@pytest.mark.chaos
async def test_a_controller_that_is_kept_down_costs_no_request(nodes, models):
    async with watching(nodes) as watch:
        epoch = watch.epoch

        async def fault() -> None:
            assert await keep_controller_down(6.0) > 1

        outcomes = await under_load(models, fault, 18.0)
        assert failed(outcomes) == []
        await watch.until(lambda seen: seen.epoch > epoch, BACK_S)


@pytest.mark.chaos
async def test_a_killed_replica_breaks_its_own_streams_only(nodes, models, alpha):
    async with watching(nodes) as watch:
        lost = {each.replica for each in watch.replicas("alpha")}

        async def fault() -> None:
            [victim, *_] = nodes.nodes[1].replicas_of(alpha.deployment)
            kill_replica(victim)

        outcomes = await under_load(models, fault)
        assert [each for each in failed(outcomes) if each.source == "beta"] == []
        assert any(each.ended == "length" for each in outcomes if each.source == "alpha")
        await watch.until(lambda seen: is_whole(seen) and not lost <= _names(seen), BACK_S)


@pytest.mark.chaos
async def test_a_stalled_link_costs_no_more_than_who_waits_on_it(nodes, models, alpha):
    async with watching(nodes):

        async def fault() -> None:
            with NodeLink(nodes.nodes[1], alpha.bus, alpha.link_bytes_per_s) as link:
                link.carry(1e-3)
                await asyncio.sleep(4.0)

        outcomes = await under_load(models, fault, 18.0)
        assert [each for each in failed(outcomes) if each.source == "beta"] == []
        assert {each.ended for each in failed(outcomes)} <= {"stream_timeout"}


@pytest.mark.chaos
async def test_a_hung_replica_is_an_error_for_whoever_waits_on_it(nodes, models, alpha):
    async with watching(nodes):
        [victim, *_] = nodes.nodes[1].replicas_of(alpha.deployment)

        async def fault() -> None:
            with hanging(victim.engine):
                await asyncio.sleep(2 * SILENCE_S)

        outcomes = await under_load(models, fault, 18.0)
        assert {each.ended for each in failed(outcomes)} <= {"stream_timeout", "unavailable"}


@pytest.mark.chaos
async def test_a_lost_node_takes_its_own_streams_and_leases_and_nothing_else(nodes):
    async with watching(nodes) as watch, client() as openai_client:

        async def stream(number: int) -> str:
            try:
                answer = await openai_client.completions.create(
                    model="alpha",
                    prompt=f"{number} times the quick brown fox",  # else one replica gets all
                    max_tokens=200,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                reasons = [chunk.choices[0].finish_reason async for chunk in answer]
            except openai.APIError as error:
                return str(error.code)
            return str(reasons[-1])

        def busy(seen: Watch) -> set[str]:
            return {each.node for each in seen.replicas("alpha") if each.running}

        _, *others = nodes.nodes  # the head stays
        streams = [asyncio.create_task(stream(number)) for number in range(12)]
        await watch.until(lambda seen: len(busy(seen)) > 1, 30.0)
        node = next(node for node in others if node.id in busy(watch))
        await asyncio.to_thread(nodes.kill, node)
        await watch.until(lambda seen: node.id not in {r.node for r in seen.replicas()}, 15.0)
        ended = await asyncio.gather(*streams)
        assert "length" in ended
        assert set(ended) - {"length"} <= {"unavailable", "stream_timeout"}
        assert len(set(ended)) > 1
        new = await asyncio.to_thread(nodes.add)
        await watch.until(
            lambda seen: is_whole(seen) and new.id in {each.node for each in seen.replicas()},
            BACK_S,
        )
        assert await stream(12) == "length"


def _names(watch: Watch) -> set[str]:
    return {each.replica for each in watch.replicas("alpha")}
