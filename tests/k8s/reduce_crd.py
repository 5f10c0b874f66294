"""Cuts the RayService CRD of KubeRay down to what the manifests use; see rayservice_crd.README.md.

    python tests/k8s/reduce_crd.py ray.io_rayservices.yaml > tests/k8s/rayservice_crd.json

Descriptions and validation rules go, and so do the branches of the pod template (and a few of the
cluster's) that no manifest uses: a manifest that starts to use one fails the test as having an
unknown field, until it is kept here.
"""

import json
import sys

import yaml

POD = {
    "automountServiceAccountToken",
    "containers",
    "nodeSelector",
    "securityContext",
    "tolerations",
    "volumes",
}
CONTAINER = {
    "env",
    "image",
    "imagePullPolicy",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "resources",
    "securityContext",
    "startupProbe",
    "volumeMounts",
}
VOLUME = {"name", "secret"}
SPEC = {"excludeHeadPodFromServeSvc", "rayClusterConfig", "serveConfigV2", "upgradeStrategy"}
CLUSTER = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
AUTOSCALER = {"idleTimeoutSeconds", "resources", "securityContext", "upscalingMode", "version"}
HEAD = {"labels", "rayStartParams", "resources", "template"}
NOISE = {"description", "x-kubernetes-validations", "x-kubernetes-list-map-keys"}


def strip(node):
    """Without texts; a *property* named like one stays."""
    if isinstance(node, list):
        return [strip(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        if key == "properties":
            out[key] = {name: strip(schema) for name, schema in value.items()}
        elif key not in NOISE and not key.startswith("x-kubernetes-list"):
            out[key] = strip(value)
    return out


def keep(schema, names):
    assert names <= set(schema["properties"]), names - set(schema["properties"])
    schema["properties"] = {k: v for k, v in schema["properties"].items() if k in names}


def main(path):
    with open(path, encoding="utf-8") as file:
        crd = yaml.safe_load(file)
    (v1,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema = strip(v1["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    spec = schema["properties"]["spec"]
    keep(spec, SPEC)
    cluster = spec["properties"]["rayClusterConfig"]
    keep(cluster, CLUSTER)
    keep(cluster["properties"]["autoscalerOptions"], AUTOSCALER)
    keep(cluster["properties"]["headGroupSpec"], HEAD)
    groups = (
        cluster["properties"]["headGroupSpec"],
        cluster["properties"]["workerGroupSpecs"]["items"],
    )
    for group in groups:
        pod = group["properties"]["template"]["properties"]["spec"]
        keep(pod, POD)
        keep(pod["properties"]["containers"]["items"], CONTAINER)
        keep(pod["properties"]["volumes"]["items"], VOLUME)
    json.dump(schema, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
