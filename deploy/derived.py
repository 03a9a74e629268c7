"""Files that are made of others: `python -m deploy.derived` writes them anew, and a test says when that was forgotten."""

from pathlib import Path
from textwrap import indent

from deploy.grafana.dashboard import dashboard_json

FOLDER = Path(__file__).parent
_RULE_HEAD = """\
# prometheus/alerts.yaml for the Prometheus operator, written by `python -m deploy.derived`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: loramix
  namespace: loramix
spec:
"""


def derived() -> dict[Path, str]:
    """Content by file."""
    alerts = (FOLDER / "prometheus" / "alerts.yaml").read_text()
    groups = alerts[alerts.index("groups:") :]
    return {
        FOLDER / "grafana" / "loramix.json": dashboard_json(),
        FOLDER / "k8s" / "monitoring" / "rules.yaml": _RULE_HEAD + indent(groups, "  "),
    }


if __name__ == "__main__":
    for path, text in derived().items():
        path.write_text(text)
