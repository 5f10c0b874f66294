import copy
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from crd import check, strict_schema

from deployments.cli.render import RenderOptions, render, write
from deployments.sizing import GIB, MIB, pod_memory_bytes, replica_memory_bytes
from select_n_core.config import load_config, parse_config
from select_n_core.errors import ConfigError, InputError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"


def model(name="m", link=None, **fields):
    return {
        "name": name,
        "source": f"org/{name}",
        "device_memory": "8GiB",
        "host_memory": "32GiB",
        "link": link or {"kind": "cuda"},
        "slo": {"tpot": "50ms"},
        **fields,
    }


def config(*models, **document):
    return parse_config(
        {
            "applications": [
                {
                    "name": "serve",
                    "route_prefix": "/",
                    "import_path": "deployments.app:build_app",
                    "args": {"models": list(models)},
                }
            ],
            **document,
        }
    )


def rendered(config, **options):
    return {
        name: yaml.safe_load(text)
        for name, text in render(config, RenderOptions(**options)).items()
    }


def service(config, **options):
    return rendered(config, **options)["rayservice.yaml"]


def cluster(config, **options):
    return service(config, **options)["spec"]["rayClusterConfig"]


def workers(config, **options):
    return cluster(config, **options)["workerGroupSpecs"]


def container(group):
    (only,) = group["template"]["spec"]["containers"]
    return only


def serve_config(config, **options):
    return yaml.safe_load(service(config, **options)["spec"]["serveConfigV2"])


EMULATED = {"kind": "emulated", "bandwidth": "1GB/s"}
CONFIGS = {
    "quickstart": load_config(QUICKSTART),
    "gpu": config(model()),
    "autoscaled": config(model(replicas={"min": 1, "max": 3})),
    "several": config(
        model("a", replicas={"min": 1, "max": 2}),
        model("b", host_memory="64GiB", replicas={"min": 2, "max": 2}),
        model("c", link=EMULATED),
    ),
}


def controlled(*models, **policy):
    """A configuration with a controller beside its models."""
    document = config(*models).document
    deployments = [{"name": "ClusterController", "user_config": policy}]
    control = {
        "name": "control",
        "route_prefix": None,
        "import_path": "deployments.control.app:build_app",
        "deployments": deployments,
    }
    return parse_config(document | {"applications": [control, *document["applications"]]})


TENANTS = {"tenants": [{"name": "acme"}], "keys_file": "/etc/select-n/keys.yaml"}
CONFIGS["cluster"] = load_config(ROOT / "examples" / "cluster.yaml")
CONFIGS["tenants"] = controlled(model(), **TENANTS)


@pytest.fixture(scope="module")
def schema():
    return strict_schema()


@pytest.mark.parametrize("name", CONFIGS)
def test_kuberay_accepts_the_service_field_by_field(name, schema):
    check(service(CONFIGS[name]), schema)


def test_the_strict_schema_refuses_what_kuberay_does_not_know(schema):
    """The check itself: unknown fields at any depth, wrong types, missing required fields."""
    good = service(CONFIGS["gpu"])

    def broken(change):
        document = copy.deepcopy(good)
        change(document["spec"]["rayClusterConfig"])
        with pytest.raises(jsonschema.ValidationError):
            check(document, schema)

    broken(lambda c: c.update(enableAutoscaling=True))
    broken(lambda c: c["authOptions"].update(mode="tokens"))
    broken(lambda c: c["headGroupSpec"].pop("template"))
    broken(lambda c: c["workerGroupSpecs"][0].update(minReplicas="1"))
    broken(lambda c: c["workerGroupSpecs"][0]["rayStartParams"].update(memory=1))
    broken(lambda c: container(c["headGroupSpec"])["livenessProbe"]["httpGet"].pop("port"))
    broken(lambda c: container(c["headGroupSpec"])["securityContext"].update(runAsRoot=False))
    broken(lambda c: container(c["headGroupSpec"])["resources"]["limits"].update(memory="4 GB"))


def test_what_kuberay_fills_in_may_be_left_out(schema):
    document = service(CONFIGS["gpu"])
    for field in ("replicas", "minReplicas", "maxReplicas"):
        document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop(field)
    check(document, schema)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_serve_config_is_the_file_but_for_address_and_memory_claims(name):
    source = CONFIGS[name].document
    document = serve_config(CONFIGS[name])
    for rendered, given in zip(document["applications"], source["applications"], strict=True):
        ours = {"deployments"} if given["name"] == "serve" else set()
        assert {k: v for k, v in rendered.items() if k not in ours} == given
    assert document["http_options"] == source["http_options"] | {"host": "0.0.0.0"}
    assert document["proxy_location"] == "EveryNode"
    assert set(document) == set(source)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_serve_config_is_one_that_we_and_ray_read(name):
    from ray.serve.schema import ServeDeploySchema

    document = serve_config(CONFIGS[name])
    again = parse_config(document)
    assert again.serve == CONFIGS[name].serve
    assert again.live == CONFIGS[name].live
    assert again.http.host == "0.0.0.0"
    schema = ServeDeploySchema.model_validate(document)
    given = [application["name"] for application in CONFIGS[name].document["applications"]]
    assert [application.name for application in schema.applications] == given
    assert schema.http_options.port == CONFIGS[name].http.port


def test_the_serve_config_says_why_it_listens_on_all_addresses():
    assert (
        "no Kubernetes Service could reach it" in service(CONFIGS["gpu"])["spec"]["serveConfigV2"]
    )


def test_replicas_claim_what_a_worker_pod_offers():
    """As many replicas fit a pod as it was sized for: one."""
    (deployment,) = serve_config(CONFIGS["gpu"])["applications"][0]["deployments"]
    claim = deployment["ray_actor_options"]
    (group,) = workers(CONFIGS["gpu"])
    assert claim["num_gpus"] == 1
    assert claim["memory"] == int(group["rayStartParams"]["memory"])


def test_claims_of_the_file_win_and_its_other_options_stay():
    plain = config(model("m"))
    application = plain.document["applications"][0] | {
        "deployments": [
            {"name": "model-m", "ray_actor_options": {"num_cpus": 3}, "max_ongoing_requests": 7}
        ]
    }
    given = parse_config(plain.document | {"applications": [application]})
    (deployment,) = serve_config(given)["applications"][0]["deployments"]
    assert deployment["max_ongoing_requests"] == 7
    assert deployment["ray_actor_options"]["num_cpus"] == 3
    assert deployment["ray_actor_options"]["memory"] > 0


def test_other_parts_of_the_file_pass_through():
    plain = config(model(interval=False), logging_config={"encoding": "JSON"})
    document = serve_config(plain)
    assert document["logging_config"] == {"encoding": "JSON"}
    assert parse_config(document).serve.models[0].interval == "off"


def test_ray_is_the_installed_version_with_token_authentication():
    import ray

    spec = cluster(CONFIGS["gpu"])
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}


def test_a_cuda_replica_gets_a_gpu_and_an_emulated_one_none():
    (gpu,) = workers(CONFIGS["gpu"])
    (cpu,) = workers(CONFIGS["quickstart"])
    for amounts in container(gpu)["resources"].values():
        assert amounts["nvidia.com/gpu"] == "1"
    for amounts in container(cpu)["resources"].values():
        assert "nvidia.com/gpu" not in amounts


def test_memory_is_what_the_model_may_use_and_the_processes_around_it():
    """An emulated device's arena is host memory; a GPU's is not."""
    gpu, emulated = (CONFIGS[name].serve.models[0] for name in ("gpu", "quickstart"))
    assert replica_memory_bytes(gpu) == 32 * GIB + 2 * GIB
    assert replica_memory_bytes(emulated) == 1 * GIB + 256 * MIB + 2 * GIB
    (group,) = workers(CONFIGS["quickstart"])
    pod = pod_memory_bytes(replica_memory_bytes(emulated))
    assert group["rayStartParams"]["memory"] == str(replica_memory_bytes(emulated))
    assert container(group)["resources"]["requests"]["memory"] == f"{pod // MIB}Mi"
    # Ray kills workers at 95 %: everything that is counted stays below.
    assert replica_memory_bytes(emulated) + 256 * MIB + GIB + 512 * MIB <= 0.9 * pod


def test_a_controller_is_passed_on_as_it_is_and_any_pod_has_room_for_it():
    document = serve_config(CONFIGS["tenants"])
    [control] = [each for each in document["applications"] if each["name"] == "control"]
    assert control["deployments"] == [{"name": "ClusterController", "user_config": TENANTS}]
    needed = replica_memory_bytes(CONFIGS["gpu"].serve.models[0])
    memory = {}
    for name in ("gpu", "tenants"):
        (group,) = workers(CONFIGS[name])
        memory[name] = container(group)["resources"]["requests"]["memory"]
        assert group["rayStartParams"]["memory"] == str(needed)
    assert memory["gpu"] == f"{pod_memory_bytes(needed) // MIB}Mi"
    assert memory["tenants"] == f"{pod_memory_bytes(needed, controlled=True) // MIB}Mi"
    assert pod_memory_bytes(needed, controlled=True) > pod_memory_bytes(needed)


def test_the_keys_of_tenants_come_from_a_secret_at_the_place_the_policy_names():
    (group,) = workers(CONFIGS["tenants"], name="mine")
    assert group["template"]["spec"]["volumes"] == [
        {"name": "keys", "secret": {"secretName": "mine-keys"}}
    ]
    assert container(group)["volumeMounts"] == [
        {"name": "keys", "mountPath": "/etc/select-n", "readOnly": True}
    ]
    (group,) = workers(CONFIGS["cluster"])
    assert "volumes" not in group["template"]["spec"]


def test_requests_equal_limits_so_that_nothing_pinned_is_reclaimed():
    spec = cluster(CONFIGS["several"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]


def test_the_object_store_is_small_on_every_node():
    spec = cluster(CONFIGS["several"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) == 256 * MIB


def test_no_replica_runs_on_the_head():
    assert cluster(CONFIGS["gpu"])["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service(CONFIGS["gpu"])["spec"]["excludeHeadPodFromServeSvc"] is True


def test_fixed_replicas_need_no_autoscaler():
    spec = cluster(config(model(replicas={"min": 2, "max": 2})))
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 2)
    assert spec["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in spec
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_bounds_that_differ_turn_the_autoscaler_on():
    spec = cluster(CONFIGS["autoscaled"])
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 3)
    assert spec["enableInTreeAutoscaling"] is True
    security = spec["autoscalerOptions"]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    # The autoscaler beside the head talks to the Kubernetes API.
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_models_of_one_kind_share_a_group_sized_for_the_largest():
    cuda, emulated = workers(CONFIGS["several"])
    assert (cuda["groupName"], emulated["groupName"]) == ("cuda", "emulated")
    assert (cuda["minReplicas"], cuda["maxReplicas"]) == (3, 4)
    assert (emulated["minReplicas"], emulated["maxReplicas"]) == (1, 1)
    largest = replica_memory_bytes(CONFIGS["several"].serve.models[1])
    assert cuda["rayStartParams"]["memory"] == str(largest)


def test_every_pod_runs_unprivileged():
    spec = cluster(CONFIGS["several"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_probes_ask_ray_and_on_workers_the_proxy():
    spec = cluster(config(model(), http_options={"port": 9000}))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for probe in ("startupProbe", "livenessProbe"):
            assert container(group)[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
        assert ports["serve"] == 9000
    ready = container(spec["workerGroupSpecs"][0])["readinessProbe"]["httpGet"]
    assert ready == {"path": "/-/healthz", "port": "serve"}


def test_options_reach_every_manifest():
    options = {"image": "example.test/select-n:1", "namespace": "llm", "name": "chat", "cpus": 16}
    files = rendered(CONFIGS["several"], **options)
    assert list(files) == ["namespace.yaml", "rayservice.yaml", "kustomization.yaml"]
    assert files["namespace.yaml"]["metadata"]["name"] == "llm"
    assert files["kustomization.yaml"]["namespace"] == "llm"
    assert files["kustomization.yaml"]["resources"] == ["namespace.yaml", "rayservice.yaml"]
    metadata = files["rayservice.yaml"]["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("chat", "llm")
    spec = files["rayservice.yaml"]["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert container(group)["image"] == "example.test/select-n:1"
    for group in spec["workerGroupSpecs"]:
        assert container(group)["resources"]["limits"]["cpu"] == "16"


def test_the_default_namespace_is_not_created():
    files = rendered(CONFIGS["gpu"], namespace="default")
    assert list(files) == ["rayservice.yaml", "kustomization.yaml"]
    assert files["kustomization.yaml"]["resources"] == ["rayservice.yaml"]


@pytest.mark.parametrize(
    "options",
    [
        {"image": ""},
        {"image": "two words"},
        {"namespace": "Has_Capitals"},
        {"name": "9starts-with-a-digit"},
        {"name": "n" * 48},
        {"cpus": 0},
    ],
)
def test_options_that_kubernetes_would_refuse_are_refused_by_name(options):
    with pytest.raises(InputError) as error:
        RenderOptions(**options)
    assert error.value.field in options
    assert "\n" not in str(error.value)


def test_a_port_that_ray_uses_is_refused():
    with pytest.raises(ConfigError) as error:
        render(config(model(), http_options={"port": 8265}), RenderOptions())
    assert error.value.field == "http_options.port"


def test_rendering_leaves_the_configuration_alone():
    before = copy.deepcopy(CONFIGS["several"].document)
    render(CONFIGS["several"], RenderOptions())
    assert CONFIGS["several"].document == before


def test_the_files_in_k8s_are_what_the_quickstart_renders_to(tmp_path):
    paths = write(render(load_config(QUICKSTART), RenderOptions()), tmp_path / "new" / "folder")
    checked_in = {path.name for path in (ROOT / "k8s").glob("*.yaml")}
    assert {path.name for path in paths} == checked_in
    for path in paths:
        assert path.read_text() == (ROOT / "k8s" / path.name).read_text(), path.name


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        write({"a.yaml": "x"}, tmp_path / "file")
    assert error.value.field == "output"
    assert "\n" not in str(error.value)


def test_rendering_needs_neither_ray_nor_torch():
    """`render-k8s` answers at once, and on a machine without a GPU's libraries."""
    code = (
        "import sys; import deployments.cli.render; "
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
