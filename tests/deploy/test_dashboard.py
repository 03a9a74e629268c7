"""The dashboard: made of deploy/grafana/panels.py, whole, and of queries that Prometheus accepts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from metric_names import our_metrics
from tools import ROOT, run

from deploy.derived import derived

BOARD = json.loads((ROOT / "deploy" / "grafana" / "loramix.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRS = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize("path", derived(), ids=lambda path: path.name)
def test_what_is_derived_is_in_step_with_what_it_is_made_of(path: Path) -> None:
    assert path.read_text() == derived()[path], "write it anew: python -m deploy.derived"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_says_what_it_shows_and_asks_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["legendFormat"]


def test_panels_have_places_and_numbers_of_their_own() -> None:
    places = [(place["x"], place["y"]) for place in (panel["gridPos"] for panel in BOARD["panels"])]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in BOARD["panels"]})
    assert all(place["x"] + place["w"] <= 24 for place in (panel["gridPos"] for panel in PANELS))


def test_queries_name_metrics_that_exist_and_each_metric_is_shown() -> None:
    shown = set(re.findall(r"\bloramix_\w+", " ".join(EXPRS)))
    assert shown <= our_metrics()
    # A histogram is shown by its buckets.
    assert {name for name in our_metrics() if not name.endswith(("_sum", "_count"))} <= shown


def test_prometheus_accepts_each_query(tmp_path: Path) -> None:
    sent = [expr.replace("$instance", ".*").replace("$__rate_interval", "1m") for expr in EXPRS]
    assert not any("$" in expr for expr in sent)
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(sent)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run("promtool", "check", "rules", tmp_path / "queries.yaml")
