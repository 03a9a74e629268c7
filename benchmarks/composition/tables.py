"""A record's tables, in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TITLES = {
    "skills": "Skill composition: exact match on the target, percent",
    "tasks": "Multi-task merging: exact match relative to each task's own adapter, percent",
}


def tables(record: Mapping[str, Any]) -> str:
    """For each study, rows by pair or set: mean ± deviation over seeds at the tuned scale, then what the scale decides."""
    figures, parts = record["figures"], []
    for study, title in _TITLES.items():
        names = [key.removeprefix(f"{study}.") for key in record["series"] if key.startswith(f"{study}.")]
        rows = list(dict.fromkeys(row for name in names for row in record["series"][f"{study}.{name}"]))
        shown = [row for row in rows if any(f"{study}.{name}.{row}.mean" in figures for name in names)]

        def tuned(key: str) -> str:
            deviation = f" ± {figures[f'{key}.std']:.1f}" if f"{key}.std" in figures else ""
            return f"{figures[f'{key}.mean']:.1f}{deviation}"

        def spread(key: str) -> str:
            return f"{figures[f'{key}.lowest']:.0f} – {figures[f'{key}.highest']:.0f} ({figures[f'{key}.scale']:g})"

        parts += [f"## {title}", _table(study, names, shown, figures, tuned)]
        parts += ["The worst and the best scale (the median of those chosen):", _table(study, names, shown, figures, spread)]
    return "\n\n".join(parts)


def _table(
    study: str, names: Sequence[str], rows: Sequence[str], figures: Mapping[str, float], cell: Callable[[str], str]
) -> str:
    lines = [["row", *names], ["---"] * (1 + len(names))]
    for row in rows:
        keys = [f"{study}.{name}.{row}" for name in names]
        lines.append([row, *(cell(key) if f"{key}.mean" in figures else "–" for key in keys)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
