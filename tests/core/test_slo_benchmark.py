"""The SLO benchmark: its load, its arithmetic, what it keeps, and a miniature of a whole run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from recorded import mode, record

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import environment, slo, slo_machine, slo_run
from benchmarks.slo_cache import Cache, Key, Result, engine_digest
from benchmarks.slo_changes import change_line, changes
from benchmarks.slo_load import (
    LONG_PROMPT,
    OUTPUT,
    PHASES,
    PROMPT,
    bursts,
    make_schedule,
    phases_named,
)
from benchmarks.slo_score import Outcome, Sample, Share, goals, score_phases
from benchmarks.slo_stand import UTILISATION, Stand, calibrate
from select_n_core.engine.client import ProcessClient
from select_n_core.errors import InputError
from select_n_core.slo import SLO

MIB = 1 << 20
BUS_BYTES_PER_S = 5e8
TARGETS = SLO(tpot_s=0.1, ttft_s=2.0)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# The load


def test_a_seed_decides_every_arrival():
    assert make_schedule(1, 4.0, 30.0) == make_schedule(1, 4.0, 30.0)
    assert make_schedule(1, 4.0, 30.0).digest() != make_schedule(2, 4.0, 30.0).digest()


def test_phases_are_equally_long_and_offer_what_they_were_sized_for():
    schedule = make_schedule(0, 4.0, 125.0)
    assert schedule.seconds == 6 * 125.0
    offered = {phase.name: schedule.offered(i) for i, phase in enumerate(schedule.phases)}
    assert offered.pop("bursts") == 500 + 2 * 10 * 4 * 4  # two bursts, four times as much on top
    assert offered.pop("second-replica") == 2 * 500
    assert set(offered.values()) == {500}
    for arrival in schedule.arrivals:
        assert schedule.phase_at(arrival.at_s) == arrival.phase
    assert [a.at_s for a in schedule.arrivals] == sorted(a.at_s for a in schedule.arrivals)


def test_bursts_last_ten_seconds_and_bring_five_times_as_many():
    phase = next(phase for phase in PHASES if phase.name == "bursts")
    spans = bursts(phase, 120.0)
    assert [end_s - begin_s for begin_s, end_s in spans] == [10.0, 10.0]
    schedule = make_schedule(3, 50.0, 120.0, [phase])
    inside = sum(any(b <= a.at_s < e for b, e in spans) for a in schedule.arrivals)
    outside = len(schedule.arrivals) - inside
    assert (inside / 20) / (outside / 100) == pytest.approx(5.0, rel=0.05)


def test_a_phase_does_not_depend_on_which_others_run():
    alone = make_schedule(7, 4.0, 30.0, phases_named(["slow-link"]))
    whole = make_schedule(7, 4.0, 30.0)
    index = [phase.name for phase in PHASES].index("slow-link")
    own = [a for a in whole.arrivals if a.phase == index]
    assert [(a.prompt_tokens, a.output_tokens) for a in own] == [
        (a.prompt_tokens, a.output_tokens) for a in alone.arrivals
    ]
    assert [a.at_s - index * 30.0 for a in own] == pytest.approx([a.at_s for a in alone.arrivals])


def test_only_one_phase_has_a_second_replica_and_it_stays_for_that_phase():
    schedule = make_schedule(0, 4.0, 30.0)
    index = [phase.name for phase in PHASES].index("second-replica")
    assert schedule.stays() == [(index, index)]
    assert {a.phase for a in schedule.arrivals if a.replica == 1} == {index}


def test_lengths_keep_their_median_their_ends_and_the_mean_they_say():
    schedule = make_schedule(0, 100.0, 60.0, [PHASES[0], PHASES[2]])
    for index, lengths in ((0, PROMPT), (1, LONG_PROMPT)):
        drawn = sorted(a.prompt_tokens for a in schedule.arrivals if a.phase == index)
        assert drawn[len(drawn) // 2] == pytest.approx(lengths.median, rel=0.05)
        assert lengths.least <= drawn[0]
        assert drawn[-1] <= lengths.most
        assert sum(drawn) / len(drawn) == pytest.approx(lengths.mean, rel=0.03)
    outputs = [a.output_tokens for a in schedule.arrivals]
    assert sum(outputs) / len(outputs) == pytest.approx(OUTPUT.mean, rel=0.03)


@pytest.mark.parametrize(("rate", "phase_s"), [(0.0, 10.0), (1.0, float("nan")), (0.01, 1.0)])
def test_a_load_of_nothing_is_refused(rate, phase_s):
    with pytest.raises(InputError):
        make_schedule(0, rate, phase_s)


def test_an_unknown_phase_is_named():
    with pytest.raises(InputError, match="no phase 'lunch'"):
        phases_named(["steady", "lunch"])


# The score


def test_the_lower_bound_is_wilsons():
    assert Share(500, 500).low == pytest.approx(0.99238, abs=1e-5)
    assert Share(10, 20).low == pytest.approx(0.29930, abs=1e-5)
    assert Share(0, 20).low == pytest.approx(0.0, abs=1e-12)
    assert Share(0, 0).share is None
    assert Share(0, 0).low is None


def two_phases():
    """Ten requests in each of two phases of five seconds."""
    return make_schedule(0, 2.0, 5.0, PHASES[:1] + PHASES[-1:])


def test_refusals_are_misses_over_offered_and_nothing_over_admitted():
    good = Outcome(0, 0, True, "length", 1.0, 0.05)
    late = Outcome(0, 0, True, "length", 2.5, 0.05)
    slow = Outcome(0, 0, True, "length", 0.5, 0.11)
    stuck = Outcome(0, 0, True, "unfinished", 0.5, None)
    refused = Outcome(0, 0, False, "overloaded_kv", None, None)
    outcomes = [good] * 5 + [late, slow, stuck, refused, refused]
    score, empty = score_phases(two_phases(), TARGETS, outcomes, [], [40, 0])
    assert (score.offered, score.admitted) == (10, 8)
    assert score.refused == {"overloaded_kv": 2, "unfinished": 1}
    assert (score.ttft, score.tpot) == (Share(7, 10), Share(6, 10))
    assert (score.admitted_ttft, score.admitted_tpot) == (Share(7, 8), Share(6, 8))
    assert score.good == Share(5, 10)
    assert score.goodput_per_s == 1.0
    assert score.tokens_per_s == 8.0
    assert empty.good == Share(0, 10)
    assert empty.admitted_tpot.share is None


def sample(at_s, k, replica=0, link_bytes=0, host_bytes=0):
    return Sample(at_s, replica, k, 0, 0, 0, host_bytes, link_bytes)


def test_k_and_bytes_are_of_the_phase_they_were_seen_in():
    samples = [
        sample(0.0, 2, link_bytes=100, host_bytes=7),
        sample(4.0, 4, link_bytes=600, host_bytes=9),
        sample(6.0, 8, link_bytes=700, host_bytes=9),
        sample(6.0, 1, replica=1, link_bytes=0),
        sample(9.0, 10, link_bytes=1200, host_bytes=5),
        sample(9.0, 1, replica=1, link_bytes=500),
    ]
    first, second = score_phases(two_phases(), TARGETS, [], samples, [])
    assert first.k == (3.0, 2, 4)
    assert second.k == (9.0, 8, 10)
    assert (first.host_bytes, second.host_bytes) == (9, 9)
    assert (first.link_bytes_per_s, second.link_bytes_per_s) == (100.0, 200.0)


def test_a_link_that_changes_is_seen_before_and_after():
    schedule = make_schedule(0, 2.0, 5.0, [PHASES[0], PHASES[3], PHASES[3]])
    assert [phase.link_share for phase in schedule.phases] == [1.0, 0.5, 0.5]
    samples = [
        Sample(at_s, 0, k, running, 0, 0, 0, 0)
        for at_s, k, running in ((4.5, 10, 6), (5.5, 9, 5), (7.5, 6, 2), (9.9, 5, 1), (12.5, 4, 1))
    ]
    (change,) = changes(schedule, [*samples, sample(4.9, 1, replica=1)])
    assert (change.k, change.running) == ((10, 6), (6, 2))
    assert change_line([change]) == "slow-link begins: k 10 -> 6, running 6 -> 2 after 2 s"
    assert changes(schedule, []) == ()


def test_goals_compare_goodput_by_schedule_and_by_phase():
    def run(*met):
        outcomes = [
            Outcome(phase, 0, True, "length", 1.0, 0.05 if number < count else 0.2)
            for phase, count in enumerate(met)
            for number in range(10)
        ]
        return score_phases(two_phases(), TARGETS, outcomes, [], [])

    found = goals(
        {
            "select_n": run(9, 8),
            "flexgen": run(5, 0),
            "static:2": run(10, 2),
            "static:4": run(6, 4),
        }
    )
    assert found["over_flexgen"] == 17 / 5
    assert found["over_flexgen_steady"] == 17 / 5
    assert found["over_best_static"]["steady"] == {"static": "static:2", "ratio": 0.9}
    assert found["over_best_static"]["steady-again"] == {"static": "static:4", "ratio": 2.0}
    assert found["admitted_tpot_worst"] == 0.8
    assert found["admitted_ttft_worst"] == 1.0


def test_a_ratio_to_nothing_is_none():
    ours = score_phases(two_phases(), TARGETS, [Outcome(0, 0, True, "length", 1.0, 0.05)], [], [])
    idle = score_phases(two_phases(), TARGETS, [], [], [])
    found = goals({"select_n": ours, "flexgen": idle})
    assert found["over_flexgen"] is None
    assert found["over_best_static"]["steady"] == {"static": None, "ratio": None}
    assert goals({"flexgen": idle}) == {}


# What is kept


KEY = Key(schedule="a", record="b", setup="c", engine="d")
KEPT = Result(
    key=KEY,
    seed=1,
    memory_bytes=MIB,
    policy="static:2.5",
    plan="a line",
    outcomes=(Outcome(0, 0, True, "length", 1.0, 0.05),),
    samples=(sample(0.0, 2),),
    tokens=(7,),
)


def test_a_partial_result_comes_back_as_it_was(tmp_path):
    kept = Cache(tmp_path)
    kept.save(KEPT)
    assert kept.load(KEY, 1, MIB, "static:2.5") == KEPT
    assert list(kept.all()) == [KEPT]
    assert kept.load(KEY, 2, MIB, "static:2.5") is None
    assert kept.load(KEY, 1, 2 * MIB, "static:2.5") is None
    assert kept.load(KEY, 1, MIB, "static:2") is None


@pytest.mark.parametrize("part", ["schedule", "record", "setup", "engine"])
def test_another_schedule_record_configuration_or_engine_is_measured_again(tmp_path, part):
    kept = Cache(tmp_path)
    kept.save(KEPT)
    assert kept.load(KEY.model_copy(update={part: "new"}), 1, MIB, "static:2.5") is None


def test_a_void_run_is_measured_again(tmp_path):
    kept = Cache(tmp_path)
    kept.save(KEPT.model_copy(update={"void": "too busy"}))
    assert kept.load(KEY, 1, MIB, "static:2.5") is None


def test_a_torn_file_is_measured_again(tmp_path, capsys):
    kept = Cache(tmp_path)
    kept.save(KEPT)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:50])
    assert kept.load(KEY, 1, MIB, "static:2.5") is None
    assert "measured again" in capsys.readouterr().err


def test_the_engine_is_another_when_its_source_is(tmp_path):
    source = tmp_path / "select_n_core" / "decisions" / "law.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    before = engine_digest(tmp_path)
    assert engine_digest(tmp_path) == before
    source.write_text("a = 2\n")
    assert engine_digest(tmp_path) != before


# A whole run


def tiny_record():
    """Six units of 1 MiB over 500 MB/s: 8 ms of compute, and each is copied in 2 ms."""
    streaming = mode(
        unit_s=0.001,
        outside_s=0.002,
        grid=((1, 0.001), (256, 0.003)),
        per_context_token_s=1e-7,
        per_pair_s=1e-9,
        outside_per_row_s=1e-5,
    )
    return record(
        transfer_s=MIB / BUS_BYTES_PER_S,
        unit_bytes=MIB,
        streaming=streaming,
        static_bytes=MIB,
        kv_bytes_per_token=1024,
    )


@pytest.fixture
def record_path(tmp_path):
    path = tmp_path / "tiny.json"
    tiny_record().save(path)
    return path


def test_the_load_follows_from_the_record(record_path):
    stand = Stand(record_path, tiny_record(), 12 * MIB)
    load = calibrate(stand)
    assert load.rate_per_s == UTILISATION * load.capacity_per_s
    half = calibrate(replace(stand, link_share=0.1))
    assert half.capacity_per_s < load.capacity_per_s
    with pytest.raises(InputError, match="raise --memory"):
        calibrate(replace(stand, memory_bytes=MIB))


def test_policies_run_side_by_side_and_are_not_run_again(
    tmp_path, record_path, monkeypatch, capsys
):
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(slo, "engine_digest", lambda: "this very source")
    monkeypatch.setattr(slo_run, "MAX_CPU", 1.01)  # whatever else this machine does
    monkeypatch.setattr(slo_machine, "_QUIET_S", 0.0)
    monkeypatch.setattr(slo_run, "_JOIN_S", 0.5)
    arguments = [
        *("--record", str(record_path), "--cache", str(tmp_path / "kept"), "--seed", "5"),
        *("--policies", "select_n", "static:2", "resident", "--memory", "7MiB"),
        *("--phases", "steady", "slow-link", "second-replica", "--phase-seconds", "1"),
    ]
    slo.main([*arguments, "--json"], engine="inline")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "results" / "slo.json").read_text())
    assert (tmp_path / "results" / "slo.png").stat().st_size > 10_000
    runs = {run["policy"]: run for run in found["runs"]}
    for policy in ("select_n", "static:2"):
        steady, slow, joined = runs[policy]["phases"]
        assert joined["offered"] == 2 * steady["offered"] == 2 * slow["offered"]
        assert steady["good"]["met"] > 0
        assert steady["tokens_per_s"] > 0
        assert 0 < slow["link_bytes_per_s"] <= 0.55 * BUS_BYTES_PER_S
        assert "paced" in runs[policy]["plan"]
    assert runs["static:2"]["phases"][0]["k"] == [3.0, 3, 3]
    steady = runs["resident"]["phases"][0]
    assert "device_too_small" in runs["resident"]["cannot_start"]
    assert steady["good"] == {"met": 0, "of": steady["offered"], "share": 0.0, "low": 0.0}
    assert found["goals"][0]["over_flexgen"] is None

    def never(*_):
        raise AssertionError("what is kept must not run again")

    monkeypatch.setattr(slo, "run_together", never)
    slo.main(arguments, engine="inline")
    said = capsys.readouterr().out
    assert "cannot start: model slo: device_too_small" in said
    assert "goodput over flexgen: -" in said
    with pytest.raises(SystemExit):  # nothing is kept of another schedule
        slo.main([*arguments[:-1], "2", "--again"], engine="inline")
    assert "there is no partial result of this schedule" in capsys.readouterr().err


def test_a_run_on_a_busy_machine_is_void(tmp_path, record_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(slo_run, "MAX_CPU", -1.0)
    monkeypatch.setattr(slo_machine, "_QUIET_S", 0.0)
    with pytest.raises(SystemExit, match="1 runs are void: the machine was"):
        slo.main(
            [
                *("--record", str(record_path), "--cache", str(tmp_path / "kept")),
                *("--policies", "select_n", "--memory", "7MiB"),
                *("--phases", "steady", "--phase-seconds", "1.5"),
            ],
            engine="inline",
        )
    assert "VOID: the machine was" in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "slo.json").read_text())
    assert found["runs"][0]["void"]
    assert found["goals"] == [{"seed": 0, "memory_bytes": 7 * MIB}]


def test_an_unknown_policy_is_one_line(record_path, capsys):
    with pytest.raises(SystemExit):
        slo.main(["--record", str(record_path), "--policies", "magic"])
    assert "select_n, fetch_all, flexgen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bus", "--phases", "steady"], "--phases has no effect on --bus"),
        (["--bus", "--memory", "7MiB", "8MiB"], "--bus takes one --memory"),
        (["--together", "0"], "--together must be 1 or more"),
        (["--seed", "-1", "--memory", "7MiB"], "a seed must not be negative"),
        (["--memory", "7parsecs"], "is not a byte quantity"),
        (["--again", "--memory", "7MiB"], "there is no partial result"),
    ],
)
def test_an_argument_that_makes_no_sense_is_one_line(
    arguments, said, tmp_path, record_path, capsys
):
    kept = ["--record", str(record_path), "--cache", str(tmp_path / "kept")]
    with pytest.raises(SystemExit) as ended:
        slo.main([*kept, *arguments], engine="inline")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_pairs_of_replicas_share_a_bus(tmp_path, record_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    monkeypatch.setattr(slo_run, "MAX_CPU", 1.01)
    monkeypatch.setattr(slo_machine, "_QUIET_S", 0.0)
    arguments = [
        *("--bus", "--record", str(record_path), "--cache", str(tmp_path / "kept")),
        *("--memory", "7MiB", "--phase-seconds", "2"),
    ]
    slo.main(arguments, engine="inline")
    found = json.loads((tmp_path / "slo_bus.json").read_text())
    (seed,) = found["seeds"]
    ours, alone, half, free, uncoordinated = seed["pairs"]
    for pair in (ours, alone, half, free):
        even, uneven, saturated = pair["phases"]
        assert abs(even["offered"] - uneven["offered"]) <= 1  # each replica's own is rounded
        assert saturated["offered"] > 2 * even["offered"]
        assert even["good"]["met"] > 0, pair["pair"]
    assert uncoordinated["plan"]
    assert set(seed["ratios"]) == {"even", "four-to-one", "saturated"}
    assert set(seed["ratios"]["even"]) == {pair["pair"] for pair in seed["pairs"][1:]}
    assert 0 < seed["saturation"]["share"] < 1.1
    assert "goodput, four-to-one" in capsys.readouterr().out


async def test_a_process_that_was_spawned_and_never_started_ends(record_path):
    client = ProcessClient(Stand(record_path, tiny_record(), 7 * MIB).config("select_n", "b"))
    client.spawn()
    process = psutil.Process(client.pid)
    await client.close()
    assert not process.is_running()
