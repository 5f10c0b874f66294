"""Kubernetes manifests from the product's configuration: a KubeRay RayService and kustomization.

The documents are built as data for KubeRay v1.7 (`ray.io/v1`) and dumped as YAML. There is one
worker group per kind of link, a pod per replica: Ray may place a replica on any pod of its kind,
so each is sized for the largest model of that kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from deployments.naming import deployment_name
from deployments.sizing import (
    GIB,
    MIB,
    OBJECT_STORE_BYTES,
    actor_options,
    pod_memory_bytes,
    replica_memory_bytes,
)
from select_n_core.config import SERVE_APPLICATION, DeployConfig, ModelConfig
from select_n_core.errors import ConfigError, InputError

HEADER = "# Written by `select-n render-k8s`: change the configuration and render again.\n"
SERVE_CONFIG_HEADER = (
    "# The configuration file, with three changes: inside a pod the proxy listens on all\n"
    "# addresses, or no Kubernetes Service could reach it; every node with replicas has one; and\n"
    "# replicas claim their memory, or several would share a pod that was sized for one.\n"
)

HEAD_CPUS = 2
HEAD_MEMORY_BYTES = 4 * GIB  # GCS, dashboard, Serve controller: no replica runs on the head
AUTOSCALER_RESOURCES = {"cpu": "500m", "memory": "512Mi"}

_AGENT_PORT = 52365
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
_RAY_PORTS = {*_HEAD_PORTS.values(), _AGENT_PORT, 8080}
_RAY_UID, _RAY_GID = 1000, 100  # the user `ray` of Ray's own images
_NAME_MAX = 47  # KubeRay appends a suffix and must stay within 63
_DNS_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What the configuration does not say.

    Attributes:
        image: holds this project, its dependencies and, for `link: cuda`, CUDA; runs as uid 1000.
        namespace: created unless it is `default`.
        name: of the RayService; its Kubernetes Service is `<name>-serve-svc`.
        cpus: cores of one worker pod. They run what is not on the device: tokenising, the link's
            worker and, where the device is emulated, the model.
    """

    image: str = "select-n:latest"
    namespace: str = "select-n"
    name: str = "select-n"
    cpus: int = 4

    def __post_init__(self) -> None:
        if not self.image or re.search(r"\s", self.image):
            raise InputError(
                f"image must name a container image, got {self.image!r}", field="image"
            )
        labels = {"namespace": (_DNS_LABEL, 63), "name": (_DNS_NAME, _NAME_MAX)}
        for field, (pattern, longest) in labels.items():
            value = getattr(self, field)
            if not pattern.fullmatch(value) or len(value) > longest:
                raise InputError(
                    f"{field} must be a DNS label (a-z, 0-9, '-') of at most {longest} characters, "
                    f"got {value!r}",
                    field=field,
                )
        if self.cpus < 1:
            raise InputError(f"cpus must be at least 1, got {self.cpus}", field="cpus")


def render(config: DeployConfig, options: RenderOptions) -> dict[str, str]:
    """The manifests of `config`, file name -> YAML text, the same for the same input.

    Raises `ConfigError` when `http_options.port` is one that Ray uses itself.
    """
    if config.http.port in _RAY_PORTS:
        raise ConfigError(
            f"http_options.port: {config.http.port} is used by Ray inside the pod; take another, "
            "for example 8000",
            field="http_options.port",
        )
    documents: dict[str, dict[str, Any]] = {}
    if options.namespace != "default":
        documents["namespace.yaml"] = _namespace(options)
    documents["rayservice.yaml"] = _ray_service(config, options)
    documents["kustomization.yaml"] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": options.namespace,
        "resources": list(documents),
    }
    return {name: HEADER + _dump(document) for name, document in documents.items()}


def write(files: Mapping[str, str], directory: Path) -> list[Path]:
    """Write rendered files into `directory`, created if missing; returns their paths.

    Raises `InputError` when the directory cannot be made or written.
    """
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = directory / name
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    except OSError as error:
        raise InputError(
            f"output: cannot write to {directory}: {error.strerror}", field="output"
        ) from error
    return paths


def _namespace(options: RenderOptions) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": options.namespace,
            "labels": {
                **_labels(),
                "pod-security.kubernetes.io/enforce": "baseline",
                "pod-security.kubernetes.io/warn": "restricted",
            },
        },
    }


def _ray_service(config: DeployConfig, options: RenderOptions) -> dict[str, Any]:
    models = config.serve.models
    autoscaled = any(model.replicas.min != model.replicas.max for model in models)
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": autoscaled,
    }
    if autoscaled:
        cluster["autoscalerOptions"] = {
            "resources": _exactly(AUTOSCALER_RESOURCES),
            "securityContext": _container_security(),
        }
    cluster["headGroupSpec"] = _head(config, options, autoscaled=autoscaled)
    cluster["workerGroupSpecs"] = [
        _workers(kind, [model for model in models if model.link.kind == kind], config, options)
        for kind in sorted({model.link.kind for model in models})
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": options.name, "namespace": options.namespace, "labels": _labels()},
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": _serve_config(config),
            "rayClusterConfig": cluster,
        },
    }


def _serve_config(config: DeployConfig) -> str:
    document = config.document | {
        "proxy_location": "EveryNode",
        "http_options": config.document["http_options"] | {"host": "0.0.0.0"},
        "applications": [
            application | {"deployments": _claims(config, application.get("deployments", []))}
            if application["name"] == SERVE_APPLICATION
            else application
            for application in config.document["applications"]
        ],
    }
    return SERVE_CONFIG_HEADER + _dump(document)


def _claims(config: DeployConfig, given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every replica claims its memory, so that a second one wants a pod of its own."""
    named = {deployment["name"]: deployment for deployment in given}
    for model in config.serve.models:
        name = deployment_name(model.name)
        claim = actor_options(model) | {"memory": replica_memory_bytes(model)}
        options = claim | named.get(name, {}).get("ray_actor_options", {})
        named[name] = {"name": name, **named.get(name, {}), "ray_actor_options": options}
    return list(named.values())


def _head(config: DeployConfig, options: RenderOptions, *, autoscaled: bool) -> dict[str, Any]:
    container = _container(
        "ray-head",
        options,
        cpus=HEAD_CPUS,
        memory_bytes=HEAD_MEMORY_BYTES,
        ports={**_HEAD_PORTS, "serve": config.http.port},
        ready=_get("/api/healthz", _AGENT_PORT),
    )
    return {
        # No replica and no ingress runs on the head: losing a worker never takes the cluster along.
        "rayStartParams": {"num-cpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)},
        # The autoscaler beside the head talks to the Kubernetes API, nobody else does.
        "template": {"spec": _pod(container, api_token=autoscaled)},
    }


def _workers(
    kind: str, models: Sequence[ModelConfig], config: DeployConfig, options: RenderOptions
) -> dict[str, Any]:
    replica_bytes = max(replica_memory_bytes(model) for model in models)
    container = _container(
        "ray-worker",
        options,
        cpus=options.cpus,
        memory_bytes=pod_memory_bytes(replica_bytes, controlled=config.live is not None),
        gpus=1 if kind == "cuda" else 0,
        ports={"serve": config.http.port},
        ready=_get("/-/healthz", "serve"),
    )
    fewest = sum(model.replicas.min for model in models)
    return {
        "groupName": kind,
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": sum(model.replicas.max for model in models),
        "rayStartParams": {
            # What replicas may claim of the pod; the rest of it is not theirs.
            "memory": str(replica_bytes),
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": {"spec": _with_keys(_pod(container, api_token=False), config, options)},
    }


def _with_keys(pod: dict[str, Any], config: DeployConfig, options: RenderOptions) -> dict[str, Any]:
    """The pod with the keys_file mounted, where the live policy names one.

    The whole directory is the Secret's: a single file mounted out of it would never change again.
    """
    if config.live is None or config.live.keys_file is None:
        return pod
    (container,) = pod["containers"]
    directory = str(PurePosixPath(config.live.keys_file).parent)
    mount = {"name": "keys", "mountPath": directory, "readOnly": True}
    volume = {"name": "keys", "secret": {"secretName": f"{options.name}-keys"}}
    return pod | {"containers": [container | {"volumeMounts": [mount]}], "volumes": [volume]}


def _pod(container: dict[str, Any], *, api_token: bool) -> dict[str, Any]:
    return {
        "automountServiceAccountToken": api_token,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _RAY_UID,
            "runAsGroup": _RAY_GID,
            "fsGroup": _RAY_GID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }


def _container(
    name: str,
    options: RenderOptions,
    *,
    cpus: int,
    memory_bytes: int,
    ports: Mapping[str, int],
    ready: dict[str, Any],
    gpus: int = 0,
) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": f"{memory_bytes // MIB}Mi"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    alive = _get("/api/healthz", _AGENT_PORT)
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "resources": _exactly(amounts),
        "startupProbe": {**alive, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
        "securityContext": _container_security(),
    }


def _exactly(amounts: Mapping[str, str]) -> dict[str, Any]:
    # Requests equal limits: pinned memory must not be what a neighbour's burst takes.
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _get(path: str, port: int | str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _labels() -> dict[str, str]:
    return {"app.kubernetes.io/name": "select-n"}


class _Dumper(yaml.SafeDumper):
    """Strings of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        """Equal parts are written out."""
        return True


def _string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def _dump(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
