"""The plots of a record: what the scale decides, and what the rank of a merged set does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import pictures
from merging import METHODS

_LEARNED = {"cat-free": "black", "cat-softmax": "dimgray", "cat-random": "lightgray"}
_REFERENCES = {"best-single": ":", "union": "--", "target": "-."}


def draw(record: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>-scales.png` and `<stem>-ranks.png`, as far as the record has their figures.

    Raises:
        OutputError: without matplotlib.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    title = f"{record['hardware']}, {record['date']}, mean of {record['seeds']} seeds"
    return pictures.draw(record, {"scales": _scales, "ranks": _ranks}, title, 9, stem)


def _scales(figure: Any, record: Mapping[str, Any]) -> bool:
    """A panel for each pair and set: right answers by the scale of the merged ΔW."""
    series, figures = record["series"], record["figures"]
    columns = min(4, len(series))
    figure.set_size_inches(3.2 * columns, 3.4 * -(-len(series) // columns) + 0.8)
    panels = figure.subplots(-(-len(series) // columns), columns, squeeze=False).flatten()
    for panel, (key, rows) in zip(panels, series.items(), strict=False):
        for row, points in rows.items():
            if row in METHODS or row in _LEARNED:
                style = {"color": _LEARNED[row], "lw": 1.8} if row in _LEARNED else {"color": f"C{list(METHODS).index(row)}"}
                panel.plot(*zip(*points, strict=True), marker=".", label=row, **{"lw": 1.0, **style})
        for row, line in _REFERENCES.items():
            if f"{key}.{row}.mean" in figures:
                panel.axhline(figures[f"{key}.{row}.mean"], color="tab:green", ls=line, lw=1.0, label=row)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_title(key, fontsize=9)
        panel.set(xlabel="scale of the merged ΔW", ylabel="right, %", ylim=(-3, None))
    for panel in panels[len(series) :]:
        panel.remove()
    labelled = {label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=8, fontsize=7)
    return bool(series)


def _ranks(figure: Any, record: Mapping[str, Any]) -> bool:
    """Each set's tuned accuracy by the rank it is merged at, cat's beside."""
    figures = record["figures"]
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, value in figures.items():
        key, _, rest = name.rpartition(".mean")[0].rpartition(".")
        method, _, rank = rest.rpartition("-")
        if method in METHODS and rank.isdecimal():
            lines.setdefault(key, {}).setdefault(method, []).append((int(rank), value))
    figure.set_size_inches(5.5, 4)
    panels = figure.subplots(1, len(lines), squeeze=False)[0] if lines else ()
    for panel, (key, methods) in zip(panels, lines.items(), strict=True):
        for method, points in methods.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, label=method)
        panel.axhline(figures[f"{key}.cat.mean"], color="tab:gray", ls="--", lw=1.0, label="cat, rank N")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(title=key, xlabel="rank of the merged adapter", ylabel="relative to own adapters, %", ylim=(0, None))
        panel.legend(fontsize=8)
    return bool(lines)
