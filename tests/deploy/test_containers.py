"""The images and what runs them together, checked by their own tools; images are not built here."""

import fnmatch
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from tools import ROOT, run

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
ENVIRONMENT = {
    "SERVE_MODELS": "/srv/models", "SERVE_MODEL": "tiny", "SERVE_ADAPTERS": "/srv/adapters",
    "LORAMIX_API_KEY": "0123456789abcdef", "GRAFANA_PASSWORD": "x",
}  # fmt: skip


def test_hadolint_has_nothing_to_say() -> None:
    assert run("hadolint", "--failure-threshold", "info", DOCKERFILE) == ""


def test_all_that_is_copied_is_sent_to_the_build() -> None:
    sent = [line[1:] for line in (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.M) for word in line.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in sent), name


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_what_the_images_hold_is_pinned_and_is_what_the_project_asks_for(engine: str) -> None:
    lines = (DEPLOY / "docker" / f"requirements-{engine}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in [*project["dependencies"], *project["optional-dependencies"][engine], "setuptools>=77"]:
        wanted = Requirement(word)
        assert wanted.specifier.contains(pins[wanted.name].partition("+")[0]), word


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=len)
def test_compose_accepts_its_files(files: list[str]) -> None:
    named = [word for name in files for word in ("--file", str(DEPLOY / name))]
    services = yaml.safe_load(run("docker-compose", *named, "config", **ENVIRONMENT))["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"]), name
        for mount in service["volumes"]:
            if mount["type"] == "bind" and not mount["source"].startswith("/srv"):
                assert (DEPLOY / mount["source"]).exists(), mount


def test_the_example_environment_names_all_that_compose_wants() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert set(re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.M)) == wanted


def test_compose_wants_keys() -> None:
    for missing in ("LORAMIX_API_KEY", "GRAFANA_PASSWORD"):
        with pytest.raises(AssertionError, match=missing):
            run("docker-compose", "--file", DEPLOY / "compose.yaml", "config", **{**ENVIRONMENT, missing: ""})


def test_grafana_finds_the_dashboard_and_prometheus_the_server() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "loramix.yaml").read_text())["providers"]
    mounted = next(volume.split(":")[1] for volume in compose["grafana"]["volumes"] if "loramix.json" in volume)
    assert mounted == provider["options"]["path"] + "/loramix.json"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["loramix:8000"]}]
    assert {"prometheus", "loramix"} <= compose.keys()
