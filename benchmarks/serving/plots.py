"""The plots of a record: gaps of running streams, times to the first token, and what settings cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import pictures

# Phases in the order they ran, with what they are called and how they look.
_PHASES = {
    "quiet": ("no arrivals", "tab:gray"),
    "traffic": ("requests for a resident composition", "tab:green"),
    "storm": ("new compositions", "tab:blue"),
    "storm_host": ("new compositions, sources in host memory", "tab:cyan"),
    "vllm_quiet": ("vLLM, no arrivals", "tab:brown"),
    "vllm_load": ("vLLM loading from disk", "tab:red"),
}
_TTFT = ("cold", "warm", "plain")


def draw(record: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>-gaps.png`, `-first-token.png` and `-settings.png`, as far as the record has their figures.

    Raises:
        OutputError: without matplotlib.
    """
    plots = {"gaps": _gaps, "first-token": _first_token, "settings": _settings}
    return pictures.draw(record, plots, record["hardware"], 10, stem)


def _gaps(figure: Any, record: Mapping[str, Any]) -> bool:
    """Left: the longest gap of any stream in each tenth of a second. Right: the share of gaps that are longer."""
    from matplotlib.ticker import LogLocator, NullFormatter

    course, tail = record["series"].get("gap_course", {}), record["series"].get("gap_tail", {})
    if not course:
        return False
    left, right = figure.subplots(1, 2)
    for phase, (label, colour) in _PHASES.items():
        if phase not in course:
            continue
        seconds = [0.1 * step for step, gap in enumerate(course[phase]) if gap]
        left.plot(seconds, [gap for gap in course[phase] if gap], ".-", ms=3, lw=0.7, color=colour, label=label)
        right.plot([gap for _, gap in tail[phase]], [share for share, _ in tail[phase]], lw=1.2, color=colour)
    left.set(xlabel="seconds in the phase", ylabel="longest gap between tokens, ms", yscale="log")
    right.set(xlabel="gap between tokens, ms", ylabel="share of gaps that are longer", xscale="log", yscale="log")
    medians = [max(gap for share, gap in tail[phase] if share >= 0.5) for phase in course]
    right.set_xlim(left=0.5 * min(medians))  # what matters is the tail
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(labelsize=7)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return True


def _first_token(figure: Any, record: Mapping[str, Any]) -> bool:
    """Every request's time to its first token, the median marked."""
    times = {name: values for name, values in record["series"].get("ttft", {}).items() if values}
    panels = figure.subplots(1, 2, sharey=True)
    for panel, suffix, title in zip(panels, ("", "_idle"), ("beside running streams", "an idle server"), strict=True):
        shown = [kind for kind in _TTFT if kind + suffix in times]
        if shown:
            panel.boxplot([times[kind + suffix] for kind in shown], tick_labels=shown, widths=0.5, whis=(1, 99), sym=".")
        panel.set_title(title, fontsize=9)
    panels[0].set(ylabel="time to the first token, ms", ylim=(0, None))
    return bool(times)


def _settings(figure: Any, record: Mapping[str, Any]) -> bool:
    """Left: token time by LoRA setting. Right: tokens a second by rank limit and method."""
    figures = record["figures"]
    prices = {name.removeprefix("token_ms_"): value for name, value in figures.items() if name.startswith("token_ms_")}
    rates = {
        name.removeprefix("tokens_per_s_"): value for name, value in figures.items() if name.startswith("tokens_per_s_rank")
    }
    left, right = figure.subplots(1, 2)
    for panel, bars, label in ((left, prices, "ms a token"), (right, rates, "tokens a second, all streams")):
        places = range(len(bars))
        panel.barh(list(places), list(bars.values()), color="tab:blue")
        panel.set_yticks(list(places), [name.replace("_", ", ") for name in bars], fontsize=7)
        for place, value in zip(places, bars.values(), strict=True):
            panel.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.margins(x=0.12)
    return bool(prices or rates)


def _starting(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures whose names start so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in figures.items() if name.startswith(prefix)}
