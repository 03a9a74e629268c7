"""The manifests: kubectl builds them, they are what Kubernetes' own schemas and the operator's allow, and they fit together."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tools import ROOT, run

VERSIONS = ["1.30", "1.37"]  # preStop.sleep needs the first; the last that is known
OVERLAYS = ["one-gpu", "replicas"]
SCHEMAS = {"ServiceMonitor": "service-monitor", "PrometheusRule": "prometheus-rule"}


@cache
def manifests(overlay: str) -> list[dict[str, Any]]:
    """What docs/deploy.md has its readers make: an overlay, monitored."""
    with TemporaryDirectory() as folder:
        k8s = os.path.relpath(ROOT / "deploy" / "k8s", Path(folder).resolve())
        own = {"resources": [f"{k8s}/{overlay}"], "components": [f"{k8s}/monitoring"]}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(own))
        return list(yaml.safe_load_all(run("kubectl", "kustomize", folder)))


def the(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests(overlay) if manifest["kind"] == kind]
    return found


def pod(overlay: str) -> dict[str, Any]:
    return the(overlay, "Deployment")["spec"]["template"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_schemas_allow_each_manifest(overlay: str, version: str) -> None:
    for manifest in manifests(overlay):
        if name := SCHEMAS.get(manifest["kind"]):
            schema = ROOT / "tests" / "deploy" / "schemas" / f"{name}.json"
            jsonschema.validate(manifest, json.loads(schema.read_text()))
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_schemas_refuse_what_is_misspelt() -> None:
    wrong = json.loads(json.dumps(the("one-gpu", "Deployment")).replace("failureThreshold", "failureTreshold"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
    wrong = json.loads(json.dumps(the("one-gpu", "ServiceMonitor")).replace("credentials", "credential"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json.loads((ROOT / "tests/deploy/schemas/service-monitor.json").read_text()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_finds_the_pods_and_the_monitor_the_service(overlay: str) -> None:
    labels = pod(overlay)["metadata"]["labels"].items()
    service = the(overlay, "Service")
    selectors = [
        service["spec"]["selector"],
        the(overlay, "Deployment")["spec"]["selector"]["matchLabels"],
        the(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)
    monitor = the(overlay, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert {m["metadata"].get("namespace", "loramix") for m in manifests(overlay)} == {"loramix"}
    assert service["metadata"]["name"] == "loramix"  # the operator makes it the label `job`, which the alerts look for


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_all_it_mounts_and_time_to_drain(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {m["metadata"]["name"] for m in manifests(overlay) if m["kind"] == "PersistentVolumeClaim"}
    given = dict(word.split("=") for word in container["args"] if "=" in word)
    drained = float(given["--merge-timeout"]) + float(given["--shutdown-timeout"])
    assert spec["terminationGracePeriodSeconds"] > container["lifecycle"]["preStop"]["sleep"]["seconds"] + drained
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_of_the_operator_is_needed_without_monitoring(overlay: str) -> None:
    alone = yaml.safe_load_all(run("kubectl", "kustomize", ROOT / "deploy" / "k8s" / overlay))
    added = {manifest["kind"] for manifest in manifests(overlay)} - {manifest["kind"] for manifest in alone}
    assert added == {*SCHEMAS, "ConfigMap"}


def test_replicas_share_their_volumes() -> None:
    assert the("replicas", "Deployment")["spec"]["replicas"] > 1
    modes = [m["spec"]["accessModes"] for m in manifests("replicas") if m["kind"] == "PersistentVolumeClaim"]
    assert modes == [["ReadWriteMany"]] * 2
