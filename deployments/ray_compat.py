"""Every call into Ray that is private, or that works around it, in one place; each has a test.

Ray is imported inside the functions, so that a command line that does not need it starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from select_n_core.errors import EngineError, UnavailableError
from select_n_core.strict import config_error

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# Ray's switch for machines whose nodes cannot form a cluster: the node's address is then
# 127.0.0.1, which as an explicit address Ray would rewrite to one reachable from outside.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_DEFAULTS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
_OBJECT_STORE_BYTES = 128 << 20
_KV_NAMESPACE = b"select_n"
_EPOCH = b"epoch"


def prepare_environment() -> None:
    """Set what Ray reads: loopback only, token authentication unless set otherwise."""
    os.environ.update(_LOOPBACK_ONLY)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_private_token()
    if "ray" in sys.modules:
        _reread_environment()


def _reread_environment() -> None:
    """What Ray does at import, once more: this process must see what its children will."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _ensure_private_token() -> None:
    """The token that Ray would write with mode 0644, written with 0600; an old one is tightened."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    import secrets

    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def start_local_node(*, num_cpus: float | None = None, num_gpus: int | None = None) -> None:
    """Start Ray on this machine, of its own and on loopback, and connect to it.

    Args:
        num_cpus, num_gpus: what the node claims to have; None is what Ray finds.
    """
    prepare_environment()
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    address = ray.util.get_node_ip_address()
    if address != "127.0.0.1":
        ray.shutdown()
        raise EngineError(f"Ray's node took the address {address}; it must stay on 127.0.0.1")


def stop_local_node() -> None:
    """Disconnect from Ray and end every process that `start_local_node` brought."""
    import ray

    ray.shutdown()


def node_resources() -> dict[str, float]:
    """What the connected node has, by Ray's names (`CPU`, `GPU`, ...)."""
    import ray

    return dict(ray.cluster_resources())


def check_document(document: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the field, for a configuration that Ray Serve would not read."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise config_error(error, prefix="config") from error


def start_serve(document: Mapping[str, Any]) -> None:
    """Start Ray Serve with a configuration's proxies, as `serve run` does."""
    import logging

    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    # Serve tells this process of its every step; what matters is said by the caller.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    schema = ServeDeploySchema.model_validate(document)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        controller_options=schema.controller_options,
        logging_config={"log_level": "WARNING"},
    )


def deploy(document: Mapping[str, Any]) -> None:
    """Hand a configuration to Serve as its REST API would; returns before anything runs."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))


def broadcast(application: str, deployment: str, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a method on every replica of a deployment; their results, in no order."""
    from ray import serve

    handle = serve.get_deployment_handle(deployment, application)
    return handle.broadcast(method, *args).results(timeout_s=timeout_s)


def find_deployment(application: str, deployment: str) -> DeploymentHandle:
    """A handle for many small calls to a deployment that exists; it blocks for a moment.

    The calls go over Serve's gRPC, which takes half the CPU time of Ray's own actor calls.

    Raises:
        UnavailableError: it does not exist.
    """
    from ray import serve

    try:
        return serve.get_deployment_handle(deployment, application).options(_by_reference=False)
    except KeyError as error:
        raise UnavailableError(
            f"there is no deployment {deployment} in an application {application}"
        ) from error


def call_apart(handle: DeploymentHandle, *args: Any) -> Any:
    """`handle.remote(*args)`, told apart from all other calls of the same HTTP request.

    Serve gives all of them the id of that request, and a router that does not serve them in turn
    finds only the first one by it: the others would be routed for ever. The id in the logs stays.
    """
    import contextvars
    import uuid
    from dataclasses import replace

    from ray.serve import context

    def call() -> Any:
        request = context._get_serve_request_context()
        own = replace(request, _internal_request_id=uuid.uuid4().hex)
        context._serve_request_context.set(own)
        return handle.remote(*args)

    return contextvars.copy_context().run(call)


def next_epoch() -> int:
    """A number above every one that was drawn in this Ray cluster before; it blocks for a moment.

    It lives in Ray's key-value store, which has no counter: a number is drawn by who first writes
    a key of its name.
    """
    from ray.experimental import internal_kv

    epoch = int(internal_kv._internal_kv_get(_EPOCH, namespace=_KV_NAMESPACE) or 0)
    taken = True
    while taken:
        epoch += 1
        key = _EPOCH + b"/%d" % epoch
        taken = internal_kv._internal_kv_put(key, b"", overwrite=False, namespace=_KV_NAMESPACE)
    internal_kv._internal_kv_put(_EPOCH, b"%d" % epoch, namespace=_KV_NAMESPACE)
    return epoch
