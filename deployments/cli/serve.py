"""`select-n serve`: a Ray of its own on this machine, the configuration on it, a clean end.

Progress goes to stderr; what was deployed and how to reach it to stdout.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from deployments import ray_compat
from deployments.cli.output import emit
from deployments.naming import INGRESS, deployment_name
from deployments.tenants.keys import read_keys
from select_n_core import errors
from select_n_core.config import (
    CONTROL_APPLICATION,
    CONTROLLER,
    SERVE_APPLICATION,
    DeployConfig,
    HTTPOptions,
    ServeArgs,
)
from select_n_core.errors import ConfigError, EngineError, InfeasibleError, InputError, LinkError
from select_n_core.live import LivePolicy

# Ctrl-C: streams get GRACE_S, then an error; Ray takes the rest of ten seconds.
GRACE_S = 3.0
_SETTLE_S = 0.5
_LATE_S = 1.2
_POLL_S = 0.2
_REPORT_S = 5.0

_log = logging.getLogger(__name__)


def serve_config(
    config: DeployConfig,
    *,
    read_again: Callable[[], DeployConfig] | None = None,
    as_json: bool = False,
) -> None:
    """Serve `config` on this machine until SIGINT or SIGTERM.

    Args:
        read_again: the configuration as it stands now; SIGUSR1 takes its live policy.
        as_json: print where and what is served as one JSON object.

    Raises:
        ConfigError: the port is busy, the API keys cannot be read, Ray Serve's part of the file is
            broken, the machine lacks GPUs, or a model cannot be served as configured.
        EngineError: a replica failed for another reason.
    """
    check_port(config.http)
    check_keys(config.live)
    ray_compat.check_document(config.document)
    with _signals(signal.SIGINT, signal.SIGTERM) as stop, _signals(signal.SIGUSR1) as told:
        _say("starting Ray ...")
        ray_compat.start_local_node()
        try:
            check_capacity(config.serve, ray_compat.node_resources())
            _say("starting Ray Serve ...")
            ray_compat.start_serve(config.document)
            ray_compat.deploy(config.document)
            if _wait_until_running(config, stop):
                _announce(config, as_json=as_json)
                while not stop.wait(_POLL_S):
                    if told.is_set():
                        told.clear()
                        config = config if read_again is None else take_policy(config, read_again)
                _say("stopping: running streams may end ...")
                _drain(config.serve)
        finally:
            # Ends every process of Serve too. Ending Serve first takes longer, and Ray prints the
            # loss of our own pending calls to its controller on stdout.
            ray_compat.stop_local_node()
    _say("stopped")


def check_port(http: HTTPOptions) -> None:
    """Raise ConfigError when somebody else listens where we would."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            # Connections that ended lately do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise ConfigError(
            f"http_options.port: cannot listen on {http.host}:{http.port}: {error.strerror}; "
            "stop what runs there or choose another port",
            field="http_options.port",
        ) from error


def check_keys(policy: LivePolicy | None) -> None:
    """Raise ConfigError when tenants are named whose keys cannot be read."""
    if policy is not None and policy.keys_file is not None:
        read_keys(policy.keys_file)


def check_capacity(args: ServeArgs, resources: Mapping[str, float]) -> None:
    """Raise ConfigError when the replicas want more GPUs than there are.

    Args:
        resources: what the Ray node has, by Ray's names.
    """
    gpus = int(resources.get("GPU", 0))
    wanted = {m.name: m.replicas.max for m in args.models if m.link.kind == "cuda"}
    if sum(wanted.values()) <= gpus:
        return
    each = ", ".join(f"{name} {replicas}" for name, replicas in wanted.items())
    mend = "lower replicas.max" if gpus else "set link.kind to 'emulated' to run on the CPU"
    raise ConfigError(
        f"models: link 'cuda' takes one GPU per replica, {sum(wanted.values())} in all ({each}), "
        f"but this machine has {gpus}; {mend}",
        field="models",
    )


@contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that these signals set, again and again without harm."""
    came = threading.Event()
    before = {number: signal.signal(number, lambda *_: came.set()) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_policy(config: DeployConfig, read_again: Callable[[], DeployConfig]) -> DeployConfig:
    """Deploy the live policy of the configuration as it stands now; what is served from then on.

    Anything wrong with it, or anything else that changed, leaves all as it was.
    """
    try:
        changed = read_again()
        check_keys(changed.live)
        ray_compat.check_document(changed.document)
        if but_policy(changed) != but_policy(config):
            raise ConfigError(
                f"only the user_config of {CONTROLLER} may change while serving; start again for "
                "the rest"
            )
    except ConfigError as error:
        _say(f"the configuration was not taken: {error}")
        return config
    ray_compat.deploy(changed.document)
    _say("the live policy was taken")
    return changed


def but_policy(config: DeployConfig) -> dict[str, Any]:
    """A configuration's document without the one part that may change while it is served."""
    applications = []
    for application in config.document["applications"]:
        kept = dict(application)
        if application["name"] == CONTROL_APPLICATION:
            named = {each["name"]: dict(each) for each in kept.pop("deployments", None) or []}
            named.setdefault(CONTROLLER, {"name": CONTROLLER}).pop("user_config", None)
            kept["deployments"] = named
        applications.append(kept)
    return config.document | {"applications": applications}


def _wait_until_running(config: DeployConfig, stop: threading.Event) -> bool:
    """Wait until every application runs and HTTP answers; False when stopped before."""
    from ray import serve

    names = {application["name"] for application in config.document["applications"]}
    said: dict[str, str] = {}
    while not stop.wait(_POLL_S):
        applications = serve.status().applications
        for name, application in applications.items():
            status = application.status.value
            if said.get(name) != status:
                said[name] = status
                _say(f"application {name}: {status}")
            messages = [each.message for each in application.deployments.values()]
            failed = status in ("DEPLOY_FAILED", "UNHEALTHY")
            _raise_failure([application.message, *messages], failed=failed)
        running = {name for name, each in applications.items() if each.status.value == "RUNNING"}
        if names <= running and _is_healthy(config.http):
            return True
    return False


@dataclass(frozen=True)
class _Cause:
    """The error at the bottom of a traceback: its class and its one line."""

    kind: type[Exception]
    line: str


def _raise_failure(messages: list[str], *, failed: bool) -> None:
    """Raise what Serve's status messages say went wrong.

    An error in the input raises at once: Serve's retries would only repeat it. Anything else
    raises once Serve gave up (`failed`).
    """
    causes = [cause for message in messages if (cause := find_cause(message))]
    for cause in causes:
        if issubclass(cause.kind, InputError | InfeasibleError | LinkError):
            raise ConfigError(cause.line)
    if failed:
        lines = [cause.line for cause in causes] or [" ".join(" ".join(messages).split())]
        raise EngineError(f"the deployment failed: {lines[0]}")


# The last line of a traceback; Ray may put its own class in front of it.
_ERROR_LINE = re.compile(
    r"^\s*(?:[\w.()]+ *:? *)?\b(?:\w+\.)*(\w+(?:Error|Exception)): (.+)$", re.M
)


def find_cause(message: str) -> _Cause | None:
    """Our own error in a status message, else the last error named there, else None."""
    found = [(name, line.strip()) for name, line in _ERROR_LINE.findall(message)]
    ours = [(name, line) for name, line in found if hasattr(errors, name)]
    if ours:
        name, line = ours[-1]
        return _Cause(getattr(errors, name), line)
    if found:
        name, line = found[-1]
        return _Cause(Exception, f"{name}: {line}")
    return None


def _is_healthy(http: HTTPOptions) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(http)}/health", timeout=3) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _announce(config: DeployConfig, *, as_json: bool) -> None:
    """Print every replica's plan, the address and an example."""
    url = _url(config.http)
    replicas = [
        {"model": model.name, "replica": report.replica, **asdict(report.info)}
        for model in config.serve.models
        for report in ray_compat.broadcast(
            SERVE_APPLICATION, deployment_name(model.name), "report", timeout_s=_REPORT_S
        )
    ]
    body = {
        "model": config.serve.models[0].name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "stream": True,
    }
    key = "-H 'Authorization: Bearer KEY' " if config.live and config.live.tenants else ""
    example = (
        f"curl -N {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
    plans = [each["plan_line"] for each in replicas]
    emit(
        {"url": url, "replicas": replicas, "example": example},
        [*plans, f"serving on {url}", f"try: {example}"],
        as_json=as_json,
    )
    sys.stdout.flush()


def _drain(args: ServeArgs) -> None:
    """Let running streams end, all models at the same time, then their answers reach the clients.

    A deployment that cannot is left to the end of Ray, which takes all its processes with it.
    """
    with ThreadPoolExecutor(len(args.models)) as pool:
        for model in args.models:
            name = deployment_name(model.name)
            pool.submit(_call_all, name, "drain", GRACE_S, timeout_s=GRACE_S + _LATE_S)
    _call_all(INGRESS, "settle", _SETTLE_S, timeout_s=_SETTLE_S + _LATE_S)


def _call_all(deployment: str, method: str, limit_s: float, *, timeout_s: float) -> None:
    try:
        ray_compat.broadcast(SERVE_APPLICATION, deployment, method, limit_s, timeout_s=timeout_s)
    except Exception as error:
        _log.warning("%s: %s failed: %r", deployment, method, error)


def _url(http: HTTPOptions) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http.host, http.host)
    return f"http://{host}:{http.port}"


def _say(line: str) -> None:
    print(f"select-n: {line}", file=sys.stderr, flush=True)
