"""`select-n audit`: what this machine's ledgers say of host memory against what the kernel maps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from select_n_core.memory.audit import audit, mapped_files
from select_n_core.memory.domain import Domain
from select_n_core.memory.ledger import Ledger
from select_n_core.memory.ledger_file import domains_at, read_ledger
from select_n_core.memory.room import runtime_directory
from select_n_core.quantities import format_bytes

_LOOKS = 5  # bytes are written down before they are mapped: what differs for a moment may be that
_PAUSE_S = 0.05


def audit_machine(
    directory: Path | None = None, pause: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Every domain of this user on this machine, with each process that holds or waits.

    Args:
        directory: of the ledgers; None is this user's.
    """
    directory = directory or runtime_directory()
    domains = [_domain(domain, directory, pause) for domain in domains_at(directory)]
    agrees = all(
        not each["differences"] and each["error"] is None
        for domain in domains
        for each in domain["processes"]
    )
    return {"agrees": agrees, "domains": domains}


def audit_lines(document: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = []
    for domain in document["domains"]:
        lines.append(
            f"{domain['domain']}: {format_bytes(domain['used_bytes'])} of "
            f"{format_bytes(domain['limit_bytes'])} held"
        )
        for each in domain["processes"]:
            told = f"  {each['name']} (process {each['pid']}): "
            if each["error"] is not None:
                lines.append(told + each["error"])
                continue
            lines.append(
                f"{told}{format_bytes(each['reserved_bytes'])} pinned, "
                f"{format_bytes(each['aside_bytes'])} kept for mirrors to come, "
                f"{format_bytes(each['mapped_bytes'])} mapped, "
                f"{format_bytes(each['resident_bytes'])} in memory"
            )
            lines += [
                f"    {differs['what']}: {format_bytes(differs['reserved_bytes'])} pinned, "
                f"{format_bytes(differs['mapped_bytes'])} mapped"
                for differs in each["differences"]
            ]
    verdict = "every byte agrees" if document["agrees"] else "the ledger and the kernel DIFFER"
    return [*lines, verdict if document["domains"] else "nobody has reserved host memory here"]


def _domain(domain: Domain, directory: Path, pause: Callable[[float], None]) -> dict[str, Any]:
    for look in range(_LOOKS):
        if look:
            pause(_PAUSE_S)
        ledger = read_ledger(domain, directory)
        pids = sorted({each.pid for each in ledger.holders if each.held_bytes})
        processes = [_process(ledger, pid) for pid in pids]
        if not any(each["differences"] for each in processes):
            break
    return {
        "domain": domain.id,
        "limit_bytes": ledger.limit_bytes,
        "used_bytes": ledger.used_bytes,
        "processes": processes,
    }


def _process(ledger: Ledger, pid: int) -> dict[str, Any]:
    own = [each for each in ledger.holders if each.pid == pid]
    pinned = {file: pin.nbytes for each in own for file, pin in each.pins.items()}
    facts: dict[str, Any] = {
        "name": ", ".join(sorted({each.name for each in own if each.held_bytes})),
        "pid": pid,
        "reserved_bytes": sum(pinned.values()),
        "aside_bytes": sum(each.aside_bytes for each in own),
        "mapped_bytes": None,
        "resident_bytes": None,
        "differences": [],
        "error": None,
    }
    try:
        mapped, differences = mapped_files(pid).values(), audit(ledger, pid)
    except (FileNotFoundError, PermissionError, ProcessLookupError) as error:
        why = f"its maps cannot be read here: {error.strerror}"
        return facts | {"error": f"{why}; run this in its container, as its user"}
    return facts | {
        "mapped_bytes": sum(each.nbytes for each in mapped),
        "resident_bytes": sum(each.resident_bytes for each in mapped),
        "differences": [asdict(each) for each in differences],
    }
