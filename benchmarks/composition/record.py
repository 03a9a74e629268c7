"""Figures of what was judged: `<study>.<pair or set>.<row>.mean` and `.std`, in percent.

A pair's figure is the exact match on its target. A set's is the mean over its tasks of the exact match, relative to that of
each task's own adapter (as trained) with the same seed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.composition.groups import Group, Row, groups
from benchmarks.composition.study import Sizes
from benchmarks.composition.work import Work

Curve = dict[float, dict[str, float]]  # scale -> part -> percent


def record(work: Work, sizes: Sizes) -> dict[str, Any]:
    """The record of a complete run.

    For each row, over seeds: `.mean` and `.std` on the test items at the scale that is best on the seed's validation items,
    `.scale` the median of those, `.highest` and `.lowest` the best and the worst mean at any one scale of the grid; `series`
    has the means at all.
    """
    figures: dict[str, float] = {}
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in groups(sizes):
        judged = {row.name: [_curve(work, seed, group, row) for seed in range(sizes.seeds)] for row in group.rows}
        singles = [judged.pop(row.name) for row in group.rows if row.adapters == (row.name,)]
        best = [max(curves, key=lambda curve: curve[_chosen(curve)]["validation"]) for curves in zip(*singles, strict=True)]
        for name, curves in {"base": judged["base"], "best-single": best, **judged}.items():
            figures |= {f"{group.key}.{name}.{key}": value for key, value in _figures(curves).items()}
            points = [(scale, _rounded(fmean(curve[scale]["test"] for curve in curves))) for scale in curves[0]]
            series.setdefault(group.key, {})[name] = points
        for place, question in enumerate(group.asked):
            if question.own is not None:
                own = [_own(work, seed, group, "test")[place] for seed in range(sizes.seeds)]
                figures |= {f"{group.key}.own-{question.task}.{key}": value for key, value in _spread(own).items()}
    seconds = {stage: round(took) for stage, took in work.seconds.items()}
    took = {"wall_seconds": round(work.wall_seconds), "seconds": seconds}
    return {**work.head, "seeds": sizes.seeds, **took, "figures": figures, "series": series}


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write it, each row's points on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    series = {key: {row: json.dumps(points) for row, points in rows.items()} for key, rows in record["series"].items()}
    text = json.dumps({**record, "series": series}, indent=1)
    for rows in series.values():
        for points in rows.values():
            text = text.replace(f'"{points}"', points)
    path.write_text(text + "\n")


def _figures(curves: list[Curve]) -> dict[str, float]:
    chosen = [_chosen(curve) for curve in curves]
    by_scale = [fmean(curve[scale]["test"] for curve in curves) for scale in set.intersection(*map(set, curves))]
    tuned = _spread([curve[scale]["test"] for curve, scale in zip(curves, chosen, strict=True)])
    return {
        **tuned, "scale": median(chosen), "highest": _rounded(max(by_scale)), "lowest": _rounded(min(by_scale)),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": _rounded(fmean(values)), **({"std": _rounded(stdev(values))} if len(values) > 1 else {})}


def _chosen(curve: Curve) -> float:
    """The scale that is best on the validation items; of equals, that nearest to 1."""
    return max(curve, key=lambda scale: (curve[scale]["validation"], -abs(scale - 1)))


def _curve(work: Work, seed: int, group: Group, row: Row) -> Curve:
    score = work.score(seed, group, row)
    assert score is not None, f"{group.key} {row.name} of seed {seed} is not judged"
    parts = ("validation", "test")
    own = {part: [100.0] * len(row.asked) or _own(work, seed, group, part) for part in parts}
    return {float(scale): {part: _relative(right[part], own[part]) for part in parts} for scale, right in score.items()}


def _own(work: Work, seed: int, group: Group, part: str) -> list[float]:
    """What counts as 100 % of each question: what its own adapter gets right as trained, if it has one."""
    rows = {row.name: row for row in group.rows}
    found = []
    for place, question in enumerate(group.asked):
        score = work.score(seed, group, rows[question.own]) if question.own else None
        found.append(score["1.0"][part][place] if score else 100.0)
    return found


def _relative(right: list[float], own: list[float]) -> float:
    """The mean of right / own in percent; what its own adapter never gets right says nothing, and is left out."""
    parts = [100 * value / whole for value, whole in zip(right, own, strict=True) if whole]
    return fmean(parts) if parts else 0.0


def _rounded(value: float) -> float:
    return round(value, 2)
