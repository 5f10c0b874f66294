"""`select-n status`: the cluster as an ingress knows it, in a terminal or as JSON."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from select_n_core.errors import InputError
from select_n_core.quantities import format_bytes

_ANSWER_S = 5.0
_REFRESH_S = 1.0
_WIDE = 200  # columns of a file, which folds nothing


def fetch(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What `/cluster` of the ingress at `url` answers.

    Raises InputError when nothing answers there, or something else does.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/cluster", headers=headers)
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"url: {url} answers {error.code}: {_reason(error)}", field="url"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"url: no select-n answers at {url} ({reason}); start it, or name its address with "
            "--url",
            field="url",
        ) from error
    if not isinstance(document, dict) or not {"nodes", "domains", "replicas"} <= document.keys():
        raise InputError(f"url: what answers at {url} is no select-n", field="url")
    return document


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return str(error.reason)


def watch(url: str, api_key: str | None) -> None:
    """Show the cluster until Ctrl-C; once where stdout is no terminal."""
    console = Console()
    shown = tables(fetch(url, api_key))
    if not console.is_terminal:
        Console(width=_WIDE).print(shown)
        return
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(shown, console=console, auto_refresh=False, screen=True) as live,
    ):
        while True:
            time.sleep(_REFRESH_S)
            live.update(tables(fetch(url, api_key)), refresh=True)


def tables(document: dict[str, Any]) -> Group:
    """The document of `/cluster` for people."""
    shown: list[RenderableType] = [_headline(document), _nodes(document)]
    if document["domains"]:
        shown.append(_domains(document))
    return Group(*shown, _replicas(document))


def _headline(document: dict[str, Any]) -> str:
    controller = document["controller"]
    if controller is None:
        return "no controller: asked the replicas themselves"
    return (
        f"controller: epoch {controller['epoch']}, policy {controller['policy_version']}, "
        f"heard {controller['age_s']:.1f} s ago"
    )


def _nodes(document: dict[str, Any]) -> Table:
    table = _table("node", "replicas", "budget", "leased", "mirrored")
    for node in document["nodes"]:
        table.add_row(
            _short(node["node"]),
            str(node["replicas"]),
            _size(node["budget_bytes"]),
            _size(node["lease_bytes"]),
            _size(node["mirrored_bytes"]),
        )
    return table


def _domains(document: dict[str, Any]) -> Table:
    """Host memory under each limit, and who holds it; what is late is red."""
    table = _table(
        "host memory", "of", "free", "holder", "sharing", "class", "floor", "held", "granted",
        "revoked", "wanted",
    )  # fmt: skip
    for domain in document["domains"]:
        where = ", ".join(map(_short, domain["nodes"]))
        first = [where, _size(domain["capacity_bytes"]), _size(domain["free_bytes"])]
        for each in domain["holders"]:
            table.add_row(
                *first,
                each["name"],
                str(len(each["replicas"])),
                "-" if each["priority"] is None else str(each["priority"]),
                _size(each["floor_bytes"]),
                _size(each["held_bytes"]),
                _size(each["granted_bytes"]),
                Text(_size(each["revoked_bytes"]), style="red" if each["is_late"] else ""),
                _size(each["wanted_bytes"]),
            )
            first = ["", "", ""]
    return table


def _replicas(document: dict[str, Any]) -> Table:
    table = _table(
        "model", "replica", "node", "N", "k", "m", "leased", "held", "GB/s", "run+wait", "KV free",
        "TTFT ms", "TPOT ms", "in", "returned", "age ms",
    )  # fmt: skip
    for each in document["replicas"]:
        table.add_row(
            each["model"] if each["compute_kind"] == "real" else f"{each['model']} (paced)",
            each["replica"],
            _short(each["node"]),
            "off" if each["interval"] is None else f"{each['interval']:.2f}",
            f"{each['k']} of {each['k_min']}-{each['k_most']}",
            str(each["mirrored"]),
            _size(each["lease_bytes"]),
            _size(each["mirrored_bytes"]),
            f"{each['link_bytes_per_s'] / 1e9:.3g}",
            f"{each['running']}+{each['waiting']}",
            f"{each['kv_free_tokens'] / max(1, each['kv_tokens']):.0%}",
            _against(each["ttft_p95_s"], each["ttft_target_s"]),
            _against(each["tpot_p95_s"], each["tpot_target_s"]),
            str(each["admitted"]),
            str(sum(each["returned"].values())),
            f"{1e3 * each['feedback_age_s']:.0f}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _short(node: str) -> str:
    return node[:8]


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def _against(seen_s: float | None, target_s: float) -> Text:
    """p95 lately against the target, milliseconds; red where it is missed."""
    seen = "-" if seen_s is None else f"{1e3 * seen_s:.0f}"
    missed = seen_s is not None and seen_s > target_s
    return Text(f"{seen}/{1e3 * target_s:.0f}", style="red" if missed else "")
