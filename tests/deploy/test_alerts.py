"""The alerts: Prometheus accepts them, each fires when it should and not otherwise, and each says what to do."""

import re

import yaml
from metric_names import our_metrics
from tools import ROOT, run

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
TESTS = ROOT / "tests" / "deploy" / "alerts-test.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def test_they_fire_when_they_should_and_not_otherwise() -> None:
    run("promtool", "check", "rules", ALERTS)
    run("promtool", "test", "rules", TESTS)


def test_each_is_seen_to_fire() -> None:
    fired = re.findall(r'alertname="(\w+)"', TESTS.read_text())
    assert set(fired) == {rule["alert"] for rule in RULES}


def test_docs_name_them() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    assert set(re.findall(r"`(Loramix\w+)`", text)) == {rule["alert"] for rule in RULES}


def test_each_asks_for_metrics_that_exist_and_names_its_server() -> None:
    for rule in RULES:
        assert set(re.findall(r"\bloramix_\w+", rule["expr"])) <= our_metrics(), rule["alert"]
        assert "instance" in rule["expr"] or " by " not in rule["expr"], rule["alert"]


def test_each_says_what_to_do_and_where_to_read_on() -> None:
    for rule in RULES:
        assert rule["labels"].keys() == {"severity"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}, rule["alert"]
        page, _, section = rule["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
        assert section in {heading.lower().replace(" ", "-") for heading in headings}, rule["alert"]


def test_the_configuration_of_prometheus_is_one() -> None:
    run("promtool", "check", "config", "--syntax-only", ROOT / "deploy" / "prometheus" / "prometheus.yaml")
