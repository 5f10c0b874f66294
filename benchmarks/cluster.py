"""The cluster, measured on one machine: several nodes in a network namespace, paced replicas.

    python -m benchmarks.cluster                      (every section; more than an hour)
    python -m benchmarks.cluster --sections feedback tenants
    python -m benchmarks.cluster --again              (print and write what is there)

Sections: `budget` (one node, two models, 60% of the host memory that both want, load that moves),
`feedback` (one of two links is halved; age of the facts), `admission` (what an ingress' decision
costs), `tenants` (three nodes, two models, four tenants, unequal links, three routers), `faults`
(controller kept down, replica killed, node lost).
Everything is the product's, from HTTP to the link; only compute is *paced* by a committed record,
scaled so that the replicas fit on the machine. Parts are kept and used again while setup and source
are the same. A part in which the machine was above 80% busy is void.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cluster_nodes

RECORD = cluster_nodes.ROOT / "benchmarks" / "records" / "smollm2-135m-instruct.json"
SECTIONS = ("budget", "feedback", "admission", "tenants", "faults")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as `argv` says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument(
        "--brief",
        type=int,
        default=1,
        help="a trial so many times as short, whose result is only printed",
    )
    parser.add_argument("--cache", type=Path, help="of parts")
    parser.add_argument("--again", action="store_true", help="run nothing, use what is there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.brief < 1:
        parser.error(f"--brief must be 1 or more, got {arguments.brief}")
    if not arguments.again:
        cluster_nodes.enter("benchmarks.cluster", argv)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the sections that are missing, and publish all that is there."""
    from benchmarks import (
        cluster_admission,
        cluster_budget,
        cluster_faults,
        cluster_feedback,
        cluster_tenants,
        environment,
    )
    from benchmarks.cluster_plot import draw
    from benchmarks.cluster_stand import Stand
    from benchmarks.cluster_store import Store
    from benchmarks.environment import Provenance, publish
    from select_n_core.models.cache import cache_directory

    sections = {
        "budget": cluster_budget,
        "feedback": cluster_feedback,
        "admission": cluster_admission,
        "tenants": cluster_tenants,
        "faults": cluster_faults,
    }
    provenance = Provenance()
    store = Store(arguments.cache or cache_directory("cluster"), again=arguments.again)
    document: dict[str, Any] = {"compute": "paced", "brief": arguments.brief}
    lines = []
    with tempfile.TemporaryDirectory(prefix="sn-") as scratch:
        stand = Stand(arguments.record.resolve(), Path(scratch), arguments.seed, arguments.brief)
        for name in SECTIONS:
            # A section that is not asked for stays in the result while it holds.
            asked = name in arguments.sections
            use = store if asked else Store(store.directory, again=True)
            found = sections[name].measure(stand, use)
            if found is not None:
                document[name] = found
                lines += ["", *sections[name].lines(found)]
    document["provenance"] = provenance.document()
    # The nodes' processes are no children of this one: their time would count as somebody else's.
    del document["provenance"]["foreign_cores"]
    if arguments.brief > 1:
        print(json.dumps(document, indent=1) if arguments.json else "\n".join(lines))
    else:
        publish("cluster", document, as_json=arguments.json, lines=lines)
        draw(document, environment.RESULTS / "cluster.png")
    if void := [
        n for n in SECTIONS if isinstance(document.get(n), dict) and document[n].get("void")
    ]:
        raise SystemExit(f"void: {', '.join(void)}; run again when the machine is idle")


if __name__ == "__main__":
    main()
