"""Everything that only a GPU can tell, in one command and one budget.

    python -m benchmarks.gpu --budget 540s

Needs neither Ray nor the network. benchmarks/results/gpu.json is rewritten after each section;
what the budget did not reach is named in it. On a machine without a GPU,
`--link emulated --models tiny` runs the same sections over the emulated link.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, Provenance, note
from benchmarks.gpu_bench import BLOCK_TOKENS, Budget, Rig, open_rig
from benchmarks.gpu_bus import bus
from benchmarks.gpu_floor import floor, floor_lines, gpu_facts
from benchmarks.gpu_law import law
from benchmarks.gpu_models import SHAPES, Shape, random_model
from benchmarks.gpu_peers import accelerate_peer, flexgen_peer
from benchmarks.gpu_sections import leases, link, parity
from select_n_core.offload.capture import GraphRuntime
from select_n_core.offload.placement import model_memory
from select_n_core.quantities import parse_bytes_per_s, parse_seconds

MODELS = ("llama-3-8b", "llama-2-13b", "opt-13b")
REQUESTS, CONTEXT = 8, 512
_LINK_SIZES = (1 << 20, 32 << 20)


def main(
    argv: Sequence[str] | None = None, graphs: Callable[[], GraphRuntime] | None = None
) -> None:
    """Run the sections; `graphs` captures where the device has none of its own (tests)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=parse_seconds, default=540.0, help="wall time, 540s")
    parser.add_argument("--link", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--bandwidth", type=parse_bytes_per_s, default=2e9, help="if emulated")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(MODELS))
    parser.add_argument("--iterations", type=int, default=12, help="per point, at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--json", action="store_true", help="print the document at the end")
    arguments = parser.parse_args(argv)

    provenance = Provenance()
    budget = Budget(arguments.budget)
    shapes = [SHAPES[name] for name in arguments.models]
    with open_rig(arguments.link, arguments.bandwidth, budget, arguments.iterations, graphs) as rig:
        report = Report(arguments.out, provenance, rig)
        run(rig, shapes, report)
    if arguments.json:
        print(json.dumps(report.document(), indent=1))
    if report.failed:
        raise SystemExit(1)


class Report:
    """The result file, rewritten whenever a section ends."""

    def __init__(self, path: Path, provenance: Provenance, rig: Rig) -> None:
        self._path = path
        self._provenance = provenance
        self._rig = rig
        self._sections: dict[str, list[Any]] = {}
        self._skipped: list[dict[str, str]] = []
        self._gpu = gpu_facts()

    @property
    def failed(self) -> bool:
        """Whether a section raised, or parity does not hold."""
        parts = [part for parts in self._sections.values() for part in parts]
        return any("error" in part or part.get("all_equal") is False for part in parts)

    def section(self, name: str, need_s: float, what: Callable[[], dict[str, Any]]) -> None:
        """Run a section if `need_s` are left. One that fails is recorded, and the run goes on."""
        left_s = self._rig.budget.left_s
        if left_s < need_s:
            self._skipped.append(
                {"section": name, "reason": f"{left_s:.0f} s left, needs about {need_s:.0f} s"}
            )
            note(f"{name}: skipped, {left_s:.0f} s left of the budget")
        else:
            try:
                part = what()
            except Exception as error:  # the sections after it may still tell something
                traceback.print_exc()
                part = {"error": f"{type(error).__name__}: {error}"}
            part["seconds"] = round(left_s - self._rig.budget.left_s, 2)
            self._sections.setdefault(name, []).append(part)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """All that was found so far."""
        provenance = self._provenance.document()
        provenance["gpu"] = self._gpu
        provenance["cuda"] = torch.version.cuda
        if self._rig.device.type == "cuda":
            provenance["machine"]["device"] = torch.cuda.get_device_name(self._rig.device)
        return {
            "link": self._rig.link.kind,
            "requests": REQUESTS,
            "context_tokens": CONTEXT,
            **self._sections,
            "skipped": self._skipped,
            "provenance": provenance,
        }


def run(rig: Rig, shapes: list[Shape], report: Report) -> None:
    """All sections, the most telling first."""
    on_gpu = rig.device.type == "cuda"
    scale = 1.0 if on_gpu else 0.05  # of the time that a section needs

    def expected() -> dict[str, Any]:
        found = floor(rig, shapes, (256 << 20) if on_gpu else (4 << 20), REQUESTS, CONTEXT)
        for line in floor_lines(found):
            note(line)
        return found

    report.section("floor", 0.0, expected)
    report.section("parity", 20 * scale, lambda: parity(rig))
    units = [model_memory(random_model(shape), BLOCK_TOKENS).slot_bytes for shape in shapes]
    sizes = [*units, *(_LINK_SIZES if on_gpu else (1 << 20,))]
    report.section("links", 10 * scale, lambda: link(rig, sizes))
    for slots in (2, 1, 3):  # d = 2 of every model before the rest of one
        for shape in shapes if slots == 2 else [each for each in shapes if each.all_slots][:1]:
            report.section("law", 60 * scale, partial(law, rig, shape, random_model(shape), slots))
        if slots == 2:
            report.section(
                "leases", 30 * scale, lambda: leases(rig, shapes[0], random_model(shapes[0]))
            )
            report.section(
                "bus", 90 * scale, lambda: bus(rig, shapes[0], seconds=10.0 if on_gpu else 1.0)
            )
    for shape in shapes:
        memory = model_memory(random_model(shape), BLOCK_TOKENS)
        every = memory.static_bytes + sum(memory.unit_bytes)
        kept = every - memory.mirrored_bytes(memory.units // 4)
        report.section(
            "peers",
            45 * scale,
            partial(
                accelerate_peer,
                rig,
                shape,
                device_bytes=kept,
                requests=REQUESTS,
                context=CONTEXT,
            ),
        )
        report.section(
            "peers",
            5 * scale,
            partial(
                flexgen_peer,
                rig,
                shape,
                device_share=kept / every,
                requests=REQUESTS,
                context=CONTEXT,
            ),
        )


if __name__ == "__main__":
    main()
