"""Routing in a world of replicas on a virtual clock, whose reports come late."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from select_n_core.decisions.correction import Correction, Seen
from select_n_core.decisions.latency import ComputeModel, LatencyModel, StepShape
from select_n_core.decisions.pace import pace_of
from select_n_core.decisions.routing import NOTHING, Candidate, Need, Sent, judge, plan_course
from select_n_core.decisions.vacancy import Vacancy, levels_of

MS = 1e-3
PROMPT, OUTPUT, SLOTS = 100, 16, 2
END = PROMPT + OUTPUT
COMPUTE = ComputeModel(((1, 1 * MS), (256, 16 * MS)), 2e-8, 0.0, 1 * MS, 0.01 * MS)
RECORDED = LatencyModel(24, 6 * MS, COMPUTE)
NEED = Need(PROMPT, OUTPUT, ttft_s=30.0, tpot_s=0.1, max_wait_s=0.0)
REPORT_S, ON_THE_WAY_S = 0.05, 0.1


@dataclass
class Replica:
    """It holds as many requests as it has places and KV for, each for its time, and no queue."""

    name: str
    places: int
    recorded: LatencyModel = RECORDED
    kv_at: tuple[tuple[int, int], ...] = ((4, 1000), (12, 8000))
    link: float = 1.0  # of the bandwidth that was recorded
    correction: Correction = field(default_factory=Correction)
    left: list[int] = field(default_factory=list)  # tokens of each that runs
    stepped_s: float = 0.0
    heard: dict[str, int] = field(default_factory=dict)
    reports: list[tuple[float, Vacancy]] = field(default_factory=list)

    @property
    def believed(self) -> LatencyModel:
        return self.correction.applied(self.recorded)

    @property
    def k(self) -> int:
        """The most that keeps the promise, as far as the replica knows."""
        shape = StepShape(max(1, len(self.left)), END * len(self.left))
        kept = [
            k
            for k, _ in self.kv_at
            if pace_of(self.believed, k, SLOTS).step_s(shape) <= NEED.tpot_s
        ]
        return max(kept, default=self.kv_at[0][0])

    def takes(self) -> bool:
        fits = (len(self.left) + 1) * END <= dict(self.kv_at)[self.k]
        return fits and len(self.left) < self.places

    def let_in(self) -> bool:
        taken = self.takes()
        if taken:
            self.left.append(OUTPUT)
        return taken

    def run_until(self, now_s: float) -> None:
        """Steps as long as the link lets them take; the replica learns from each."""
        while True:
            shape, k = StepShape(max(1, len(self.left)), END * len(self.left)), self.k
            truth = replace(self.recorded, transfer_s=self.recorded.transfer_s / self.link)
            took_s = pace_of(truth, k, SLOTS).step_s(shape)
            if self.stepped_s + took_s > now_s:
                return
            self.stepped_s += took_s
            if self.left:
                seen = Seen(shape, k, took_s, None, truth.transfer_s, k * truth.transfer_s)
                self.correction = self.correction.after(seen, self.recorded, SLOTS)
            self.left = [tokens - 1 for tokens in self.left if tokens > 1]

    def report(self, now_s: float) -> None:
        levels = levels_of(self.believed, SLOTS, self.kv_at, self.places, 128)
        running = len(self.left)
        vacancy = Vacancy(
            levels,
            self.places,
            128,
            OUTPUT,
            NEED.tpot_s,
            running=running,
            running_tokens=running * END,
            heard=dict(self.heard),
        )
        self.reports.append((now_s, vacancy))

    def known(self, now_s: float) -> Vacancy:
        while len(self.reports) > 1 and self.reports[1][0] <= now_s - ON_THE_WAY_S:
            self.reports.pop(0)
        return self.reports[0][1]


@dataclass
class Ingress:
    """Sends requests by what it knows, its own among them."""

    name: str
    draw: random.Random
    sent: list[tuple[int, str]] = field(default_factory=list)
    number: int = 0

    def candidates(self, replicas: list[Replica], now_s: float) -> list[Candidate]:
        known = {each.name: each.known(now_s) for each in replicas}
        self.sent = [
            (number, name)
            for number, name in self.sent
            if number > known[name].heard.get(self.name, 0)
        ]
        counts = [name for _, name in self.sent]
        return [
            Candidate(name, vacancy, sent=_sent(counts.count(name)))
            for name, vacancy in known.items()
        ]

    def tell(self, replica: Replica) -> None:
        self.number += 1
        self.sent.append((self.number, replica.name))
        replica.heard[self.name] = self.number


def _sent(count: int) -> Sent:
    return Sent(count, count * END, count * PROMPT) if count else NOTHING


Choose = Callable[[list[Candidate], random.Random], list[str]]


def by_draw(candidates: list[Candidate], draw: random.Random) -> list[str]:
    return [*plan_course(candidates, NEED, draw).prefer]


def best_first(candidates: list[Candidate], draw: random.Random) -> list[str]:
    room = {each.name: judge(each.vacancy, NOTHING, NEED).headroom for each in candidates}
    return sorted(room, key=lambda name: -room[name])


@dataclass
class World:
    replicas: list[Replica]
    choose: Choose = by_draw
    ingresses: int = 4
    seed: int = 0
    went: list[tuple[float, str]] = field(default_factory=list)
    needless: list[int] = field(default_factory=lambda: [0, 0])  # refused once and twice, though
    # another one had room

    def run(
        self, per_s: float, seconds: float, halved: tuple[float, Replica] | None = None
    ) -> None:
        chance = random.Random(self.seed)
        senders = [Ingress(str(number), random.Random(number)) for number in range(self.ingresses)]
        for replica in self.replicas:
            replica.report(-1.0)
        events: list[tuple[float, str]] = [(chance.expovariate(per_s), "request")]
        events += [(number * REPORT_S, "report") for number in range(int(seconds / REPORT_S))]
        heapq.heapify(events)
        while events and events[0][0] < seconds:
            now_s, what = heapq.heappop(events)
            for replica in self.replicas:
                if halved is not None and replica is halved[1] and now_s >= halved[0]:
                    replica.link = 0.5
                replica.run_until(now_s)
            if what == "report":
                for replica in self.replicas:
                    replica.report(now_s)
                continue
            heapq.heappush(events, (now_s + chance.expovariate(per_s), "request"))
            sender = chance.choice(senders)
            course = self.choose(sender.candidates(self.replicas, now_s), sender.draw)
            self.went.append((now_s, course[0]))
            self.ask(sender, course[:2])

    def ask(self, sender: Ingress, course: list[str]) -> None:
        has_room = any(each.takes() for each in self.replicas)
        for refusals, name in enumerate(course):
            [chosen] = [each for each in self.replicas if each.name == name]
            sender.tell(chosen)
            if chosen.let_in():
                return
            self.needless[refusals] += has_room

    def chosen(self, begin_s: float, end_s: float) -> list[str]:
        return [name for at_s, name in self.went if begin_s <= at_s < end_s]


def crowded(choose: Choose) -> list[float]:
    """The shares refused needlessly, once and twice, by eight unlike replicas with much to do."""
    replicas = [Replica(str(number), places=8 + 4 * (number % 3)) for number in range(8)]
    world = World(replicas, choose)
    step_s = pace_of(RECORDED, 12, SLOTS).step_s(StepShape(10, 10 * END))
    world.run(per_s=0.7 * sum(each.places for each in replicas) / (OUTPUT * step_s), seconds=30)
    return [refused / len(world.went) for refused in world.needless]


def test_four_ingresses_on_late_reports_are_seldom_refused_where_there_is_room():
    (once, twice), (herd_once, herd_twice) = crowded(by_draw), crowded(best_first)
    assert once < 0.03
    assert twice < 0.003
    assert herd_once > 3 * once
    assert herd_twice >= twice


def share_after_a_halved_link(begin_s: float, end_s: float, worlds: int = 10) -> float:
    """Of the replica whose link is halved at 10 s, against one like it; over several worlds."""
    chosen: list[str] = []
    for seed in range(worlds):
        slow, other = Replica("slow", places=16), Replica("other", places=16)
        world = World([slow, other], ingresses=2, seed=seed)
        world.run(per_s=6.0, seconds=end_s, halved=(10.0, slow))
        chosen += world.chosen(begin_s, end_s)
    return chosen.count("slow") / len(chosen)


def test_a_halved_link_moves_requests_elsewhere_within_a_second():
    assert abs(share_after_a_halved_link(2.0, 10.0, worlds=4) - 0.5) < 0.07
    assert share_after_a_halved_link(11.0, 13.0) < 0.4
