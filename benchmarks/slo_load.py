"""The load of the SLO benchmark: six equal phases, drawn from a seed before anything runs.

Open loop: a request is sent when its time has come, whatever became of those before it. Arrivals
are a Poisson process given its count (sorted uniform draws under the phase's rate), so every phase
offers exactly the number it was sized for. Lengths are lognormal and clipped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from select_n_core.errors import InputError

BURST_S = 10.0
BURST_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal number of tokens, clipped to `least` and `most`."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths, int64."""
        return self._of_normal(rng.standard_normal(count))

    @property
    def mean(self) -> int:
        """Of what is drawn, clipping included, to the nearest token."""
        quantiles = [NormalDist().inv_cdf((i + 0.5) / 1000) for i in range(1000)]
        return round(float(self._of_normal(np.array(quantiles)).mean()))

    def _of_normal(self, normal: NDArray[np.float64]) -> NDArray[np.int64]:
        tokens = np.rint(self.median * np.exp(self.sigma * normal))
        return np.clip(tokens, self.least, self.most).astype(np.int64)


PROMPT = Lengths(median=128, sigma=0.5, least=16, most=512)
LONG_PROMPT = Lengths(median=512, sigma=0.5, least=64, most=1024)
OUTPUT = Lengths(median=32, sigma=0.5, least=8, most=128)


@dataclass(frozen=True, slots=True)
class Phase:
    """What is different from the steady load during one phase.

    Attributes:
        prompt: lengths of the prompts.
        burst: rate inside bursts of 10 s against the mean load, which goes on between them.
        link_share: of the bus's bandwidth that is left.
        load: of the first replica, in mean loads. second_load: of another replica of the same
            policy that joins the bus for this phase; 0 is none.
    """

    name: str
    prompt: Lengths = PROMPT
    burst: float = 1.0
    link_share: float = 1.0
    load: float = 1.0
    second_load: float = 0.0


PHASES = (
    Phase("steady"),
    Phase("bursts", burst=5.0),
    Phase("long", prompt=LONG_PROMPT),
    Phase("slow-link", link_share=0.5),
    Phase("second-replica", second_load=1.0),
    Phase("steady-again"),
)
STEADY = ("steady", "steady-again")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the schedule.

    Attributes:
        at_s: since the schedule's begin.
        phase: index into the schedule's phases. replica: 0, or 1 for the one that joins.
    """

    at_s: float
    phase: int
    replica: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that is offered to every policy alike; `arrivals` ascend in time."""

    seed: int
    rate_per_s: float
    phase_s: float
    phases: tuple[Phase, ...]
    arrivals: tuple[Arrival, ...]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return self.phase_s * len(self.phases)

    def phase_at(self, at_s: float) -> int:
        """The phase of a moment; what lies after the end belongs to the last."""
        return min(max(0, int(at_s / self.phase_s)), len(self.phases) - 1)

    def offered(self, phase: int) -> int:
        """Requests of a phase, of all replicas."""
        return sum(arrival.phase == phase for arrival in self.arrivals)

    def stays(self) -> list[tuple[int, int]]:
        """(first, last) phase of each stay of a second replica."""
        indices = [index for index, phase in enumerate(self.phases) if phase.second_load]
        begins = [index for index in indices if index - 1 not in indices]
        ends = [index for index in indices if index + 1 not in indices]
        return list(zip(begins, ends, strict=True))

    def digest(self) -> str:
        """Names this very schedule: another arrival, another digest."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_schedule(
    seed: int, rate_per_s: float, phase_s: float, phases: Sequence[Phase] = PHASES
) -> Schedule:
    """Draw a schedule; a phase's draws do not depend on which others are asked for.

    Args:
        rate_per_s: mean load of one replica, requests per second.
        phase_s: seconds of each phase.

    Raises:
        InputError: a negative seed, a rate or time not above zero, or a phase without requests.
    """
    for name, value in (("rate_per_s", rate_per_s), ("phase_s", phase_s)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be above zero, got {value}", field=name)
    if rate_per_s * phase_s < 1:
        raise InputError(
            f"a phase of {phase_s:g} s at {rate_per_s:g} requests/s offers none; lengthen it",
            field="phase_s",
        )
    if seed < 0:
        raise InputError(f"a seed must not be negative, got {seed}", field="seed")
    arrivals: list[Arrival] = []
    for index, phase in enumerate(phases):
        for replica, load in enumerate((phase.load, phase.second_load)):
            rng = np.random.default_rng([seed, *phase.name.encode(), replica])
            times_s = index * phase_s + _times_s(rng, phase, rate_per_s * load, phase_s)
            prompts = phase.prompt.draw(rng, len(times_s))
            outputs = OUTPUT.draw(rng, len(times_s))
            arrivals += [
                Arrival(float(at_s), index, replica, int(prompt), int(output))
                for at_s, prompt, output in zip(times_s, prompts, outputs, strict=True)
            ]
    arrivals.sort(key=lambda arrival: (arrival.at_s, arrival.replica))
    return Schedule(seed, rate_per_s, phase_s, tuple(phases), tuple(arrivals))


def phases_named(names: Sequence[str]) -> tuple[Phase, ...]:
    """Phases of the full schedule by name, in its order; raises InputError for an unknown one."""
    known = [phase.name for phase in PHASES]
    for name in names:
        if name not in known:
            raise InputError(f"no phase {name!r}; there are {', '.join(known)}", field="phases")
    return tuple(phase for phase in PHASES if phase.name in names)


def bursts(phase: Phase, phase_s: float) -> list[tuple[float, float]]:
    """(begin, end) of each burst, seconds since the phase's begin; none in a phase without."""
    if phase.burst == 1.0:
        return []
    count = max(1, round(phase_s / BURST_EVERY_S))
    length_s = min(BURST_S, phase_s / (3 * count))
    middles_s = [(number + 0.5) * phase_s / count for number in range(count)]
    return [(middle_s - length_s / 2, middle_s + length_s / 2) for middle_s in middles_s]


def _times_s(
    rng: np.random.Generator, phase: Phase, rate_per_s: float, phase_s: float
) -> NDArray[np.float64]:
    """Ascending arrival times of a Poisson process given its count, since the phase's begin."""
    edges_s, rates = [0.0], []
    for begin_s, end_s in bursts(phase, phase_s):
        edges_s += [begin_s, end_s]
        rates += [rate_per_s, rate_per_s * phase.burst]
    edges_s.append(phase_s)
    rates.append(rate_per_s)
    expected = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * rates)])
    count = round(float(expected[-1]))
    return np.interp(np.sort(rng.uniform(0.0, expected[-1], count)), expected, edges_s)
