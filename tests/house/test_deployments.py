"""What operators use: prefect.yaml, work pool, compose and Ray manifests point to things that exist."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import RECIPES
from infra.output import outlive_reader
from infra.settings import TELEMETRY_OFF
from trip_model import __version__

yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).resolve().parents[2]
INFRA = REPOSITORY / "infra"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


DEPLOYMENTS = load(REPOSITORY / "prefect.yaml")["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["name"])
def test_an_entrypoint_resolves_and_takes_its_parameters(deployment: dict[str, Any]) -> None:
    file, name = deployment["entrypoint"].split(":")
    assert (REPOSITORY / file).is_file()
    flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
    assert outlive_reader in flow.on_running_hooks, "the run would end with its worker"
    inspect.signature(flow.fn).bind(**deployment["parameters"])
    assert deployment["parameters"].get("recipe", "demo") in RECIPES


def test_prefect_yaml_names_recipes_and_never_a_number() -> None:
    for deployment in DEPLOYMENTS:
        assert all(isinstance(value, str) for value in deployment["parameters"].values())


def test_every_flow_has_a_deployment_and_one_has_a_schedule() -> None:
    flows = {d["entrypoint"].split(":")[1] for d in DEPLOYMENTS}
    assert flows == {
        "prepare_latents",
        "train_trip",
        "evaluate_trip",
        "register_trip",
        "reproduce",
        "ablate",
        "nightly",
        "collect_garbage",
        "verify_data",
        "smoke_test",
    }
    assert [d["name"] for d in DEPLOYMENTS if d.get("schedules")] == ["nightly"]


def test_the_version_of_prefect_is_the_installed_one() -> None:
    assert load(REPOSITORY / "prefect.yaml")["prefect-version"] == version("prefect")


def test_the_work_pools_template_declares_what_it_uses() -> None:
    template = json.loads((INFRA / "work_pool_process.json").read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_every_process_starts_with_telemetry_off() -> None:
    template = json.loads((INFRA / "work_pool_process.json").read_text())
    assert TELEMETRY_OFF.items() <= template["variables"]["properties"]["env"]["default"].items()
    image = (INFRA / "Dockerfile").read_text()
    assert not [name for name, value in TELEMETRY_OFF.items() if f" {name}={value}" not in image]


def test_the_citation_has_the_version_of_the_library() -> None:
    assert load(REPOSITORY / "CITATION.cff")["version"] == __version__


def test_compose_listens_on_loopback_and_waits_for_what_exists() -> None:
    services = load(INFRA / "compose.yaml")["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        build = service.get("build")
        if build:
            assert (INFRA / build["context"] / build["dockerfile"]).is_file()


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


KUBERNETES = INFRA / "kubernetes"
BASE = [
    document
    for path in sorted((KUBERNETES / "base").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
KUSTOMIZATION = next(document for document in BASE if document["kind"] == "Kustomization")
IMAGE = f"registry.example.com/trip-i2v:{__version__}"
RAY = {"ray_cluster": KUBERNETES / "base" / "ray_cluster.yaml", "ray_job": KUBERNETES / "ray_job.yaml"}


def test_kustomize_lists_every_file_of_the_base_and_names_the_image() -> None:
    files = {path.name for path in (KUBERNETES / "base").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files
    (image,) = KUSTOMIZATION["images"]
    assert f"{image['newName']}:{image['newTag']}" == IMAGE


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a workload or a Ray manifest."""
    if manifest["apiVersion"] == "ray.io/v1":
        return [c for group in pods(manifest) for c in group["template"]["spec"]["containers"]]
    return manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])


def test_every_secret_that_a_pod_reads_is_created_by_the_commands_of_the_base() -> None:
    text = (KUBERNETES / "base" / "kustomization.yaml").read_text()
    commands = dict(re.findall(r"create secret generic (\S+) ((?:.*\\\n)*.*)", text))
    known = {name: set(re.findall(r"--from-literal=([\w-]+)=", flags)) for name, flags in commands.items()}
    for manifest in [*BASE, load(RAY["ray_job"])]:
        for container in containers(manifest):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["key"] in known[reference["name"]], variable
            for source in container.get("envFrom", []):
                assert "configMapRef" in source or source["secretRef"]["name"] in known


def flows_commands() -> list[list[str]]:
    """The arguments of `python -m flows` in the pods and in the services of compose."""
    commands = [container.get("command", []) for manifest in BASE for container in containers(manifest)]
    found = [words[3:] for words in commands if words[:3] == ["python", "-m", "flows"]]
    for service in load(INFRA / "compose.yaml")["services"].values():
        if service.get("command") and "entrypoint" not in service and "build" in service:
            found.append(service["command"])
    return found


@pytest.mark.parametrize("words", flows_commands(), ids=" ".join)
def test_a_command_of_a_container_can_be_parsed(words: list[str]) -> None:
    from flows.cli.app import parse

    assert parse(words) is not None


def test_every_container_of_a_deployment_is_limited_probed_and_writes_to_volumes_only() -> None:
    for manifest in BASE:
        for container in containers(manifest):
            assert "limits" in container["resources"], manifest["metadata"]["name"]
            if manifest["kind"] in ("Deployment", "StatefulSet") and container.get("ports"):
                assert {"readinessProbe", "livenessProbe"} <= set(container)
            paths = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
            assert "/tmp" in paths
            places = {v["name"]: v.get("value") for v in container.get("env", []) if v["name"] in ("TMPDIR", "HOME")}
            assert set(places.values()) <= paths, places


def test_kustomize_builds_the_base_with_users_that_are_numbers(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run([kubectl, "kustomize", str(KUBERNETES / "base")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for manifest in yaml.safe_load_all(built.stdout):
        assert manifest["metadata"]["namespace"] == "trip"
        if manifest["kind"] in ("Deployment", "Job", "StatefulSet"):
            pod = manifest["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
            assert all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for c in pod["containers"])


def test_the_users_of_the_image_of_compose_and_of_kubernetes_are_one() -> None:
    image = (INFRA / "Dockerfile").read_text()
    assert "USER 10001:10001" in image
    compose = load(INFRA / "compose.yaml")
    assert compose["x-trip"]["user"] == "10001:10001"
    patched = KUSTOMIZATION["patches"][0]["patch"]
    assert "runAsUser: 10001" in patched and "runAsNonRoot: true" in patched


@pytest.mark.parametrize("path", RAY.values(), ids=RAY)
def test_a_ray_manifest_fits_the_installed_ray(path: Path) -> None:
    manifest = load(path)
    assert manifest["apiVersion"] == "ray.io/v1" and manifest["kind"] in ("RayCluster", "RayJob")
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token", "secretName": "trip-ray"}
    for group in pods(manifest):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        for container in group["template"]["spec"]["containers"]:
            resources = container["resources"]
            # Ray plans with the limit; a pod that may be evicted below it loses training.
            assert resources["requests"] == resources["limits"]
            assert container["image"] in (IMAGE, "trip-i2v")  # kustomize puts the first for the second
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def strict(schema: Any) -> Any:
    """A Kubernetes schema as a closed JSON schema: an unknown, that is misspelt, field is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    closed = {name: strict(value) for name, value in schema.items() if name != "format"}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


@pytest.mark.parametrize(("manifest", "kind"), [("ray_cluster", "rayclusters"), ("ray_job", "rayjobs")])
def test_a_ray_manifest_fits_kuberays_schema(manifest: str, kind: str) -> None:
    """Needs KubeRay's ray-operator/config/crd/bases, a megabyte of YAML a file, hence not kept here."""
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS does not name a folder with KubeRay's CRDs (ray.io_rayclusters.yaml, ...)")
    jsonschema = pytest.importorskip("jsonschema")
    versions = load(Path(folder) / f"ray.io_{kind}.yaml")["spec"]["versions"]
    (schema,) = [strict(v["schema"]["openAPIV3Schema"]) for v in versions if v["name"] == "v1"]
    schema["properties"]["metadata"] = {}
    jsonschema.Draft7Validator(schema).validate(load(RAY[manifest]))


def test_the_ray_job_runs_a_command_that_exists_on_a_cluster_it_fits() -> None:
    from flows.cli.app import parse
    from flows.recipes import find_recipe

    manifest = load(RAY["ray_job"])
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "flows"]
    arguments = parse(words[3:])
    train = find_recipe(arguments["recipe"]).train
    (workers,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert train.workers * train.gpus_per_worker <= workers["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert train.workers * train.cpus_per_worker <= workers["maxReplicas"] * int(limits["cpu"])
