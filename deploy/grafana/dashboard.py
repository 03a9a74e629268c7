"""The dashboard as Grafana reads it (loramix.json), made of panels.py.

Grafana's own library builds it, so every field is one that Grafana knows.
"""

from itertools import count

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

from deploy.grafana.panels import ROWS, Panel

SOURCE = DataSourceRef("prometheus", "$datasource")
COLUMNS = 3


def dashboard_json() -> str:
    """The content of loramix.json."""
    board = (
        dashboard.Dashboard("loramix")
        .uid("loramix")
        .description("A server that merges adapters for each request: docs/operations.md says what each metric means.")
        .tags(["loramix", "vllm"])
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Server")
            .datasource(SOURCE)
            .query("label_values(loramix_leases, instance)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    ids = count(1)
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            board = board.with_panel(_graph(panel).id(next(ids)))
    return JSONEncoder(indent=2, sort_keys=True).encode(board.build()) + "\n"


def _graph(panel: Panel) -> timeseries.Panel:
    graph = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .min(0)
        .datasource(SOURCE)
        .height(8)
        .span(24 // COLUMNS)
        .line_width(1)
        .fill_opacity(10)
        .show_points(VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .legend(
            common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
    )
    for ref, (legend, expr) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        graph = graph.with_target(prometheus.Dataquery().ref_id(ref).expr(_expanded(expr)).legend_format(legend).range())
    return graph


def _expanded(expr: str) -> str:
    return expr.replace("@", 'instance=~"$instance"').replace("[*]", "[$__rate_interval]")
