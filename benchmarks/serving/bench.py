"""What every part of the benchmark uses: two client processes, windows of time, and a place for figures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.client import Client, TrafficError
from benchmarks.serving.stage import Scale, Stage
from benchmarks.serving.trace import Trace, curve, spread, timeline
from benchmarks.serving.traffic import Prompts, Script
from server.process import ServerProcess

_SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Window:
    """A stretch of time in which streams ran, and what was asked beside them."""

    streams: Trace
    beside: Trace
    begin: float
    end: float

    @property
    def gaps(self) -> list[float]:
        return [gap for _, gap in self.streams.gaps(self.begin, self.end)]


@dataclass
class Bench:
    """One run.

    Attributes:
        seconds: for each part.
        figures: by name, as they come.
        series: to be plotted: name of a plot -> name of a line -> its points.
    """

    stage: Stage
    scale: Scale
    device: str
    seconds: float
    streams: Client
    beside: Client
    figures: dict[str, float] = field(default_factory=dict)
    series: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.stage.vocabulary, self.scale.prompt, 0)

    def ask(self, server: ServerProcess, models: Sequence[str]) -> None:
        """One token of each, in turn, so that all of them have been used. Raises TrafficError unless all is well."""
        requests = tuple(self.prompts.completion(model, 1) for model in models)
        self.beside.start(server.url, [Script(requests)])
        _check(self.beside.stop())

    def window(self, server: ServerProcess, streams: Sequence[Script], seconds: float, beside: Sequence[Script] = ()) -> Window:
        """Start streams, let them settle, and watch them for `seconds`, the other scripts starting with the window."""
        self.streams.start(server.url, streams)
        time.sleep(_SETTLE_SECONDS)
        begin = time.perf_counter()
        if beside:
            self.beside.start(server.url, beside)
        time.sleep(seconds)
        end = time.perf_counter()
        answers = self.beside.stop() if beside else Trace()
        seen = self.streams.stop()
        _check(seen)
        return Window(seen, answers, begin, end)

    def decodes(self, models: Sequence[str]) -> list[Script]:
        """The streams: long decodes, as long as the model's context allows."""
        return self.prompts.streams(models, self.scale.streams, self.scale.length - self.scale.prompt - 8)

    def gaps(self, suffix: str, *windows: Window) -> None:
        """The figures `gap_ms_…_<suffix>`, their curve and their course over time."""
        every = [gap for window in windows for gap in window.gaps]
        if not every:
            raise TrafficError(f"no stream of phase {suffix} brought two chunks; give it more time with --seconds-per-part")
        self.figures |= spread("gap_ms", every, suffix, worst=True)
        self.figures[f"client_late_ms_max_{suffix}"] = max(w.streams.latest_ms(w.begin, w.end) for w in windows)
        self.series.setdefault("gap_tail", {})[suffix] = curve(every)
        last = windows[-1]
        self.series.setdefault("gap_course", {})[suffix] = timeline(last.streams.gaps(last.begin, last.end), last.begin)


def _check(trace: Trace) -> None:
    if failed := trace.failed():
        raise TrafficError(f"the server answered {failed[0].status}: {failed[0].said}")
