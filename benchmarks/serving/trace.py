"""What clients saw, and the figures that follow from it. Times are seconds of one monotonic clock of the machine."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Answer:
    """One request as its client saw it.

    Attributes:
        label: of the request.
        sent: when it was sent.
        status: HTTP status; 0 where the connection broke.
        cache: header `x-loramix-cache`; empty from other servers.
        merge_ms: header `x-loramix-merge-ms`.
        ticks: when chunks of its body arrived that brought tokens.
        tokens: how many tokens each chunk brought.
        done: when the body had ended; None where it was cut off.
        said: the start of the body, where the status is not 200.
    """

    label: str
    sent: float
    status: int = 0
    cache: str = ""
    merge_ms: float | None = None
    ticks: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: float | None = None
    said: str = ""


@dataclass
class Trace:
    """All answers of a client process, and by how much its own event loop was late: (when, seconds) about every ms."""

    answers: list[Answer] = field(default_factory=list)
    late: list[tuple[float, float]] = field(default_factory=list)

    def failed(self) -> list[Answer]:
        """Answers that ended with anything but 200; those cut off are not among them."""
        return [answer for answer in self.answers if answer.status != 200 and answer.said]

    def gaps(self, begin: float, end: float) -> list[tuple[float, float]]:
        """(end of the gap, milliseconds) between successive chunks of an answer, where both lie in the window."""
        return sorted(
            (after, 1e3 * (after - before))
            for answer in self.answers
            for before, after in zip(answer.ticks, answer.ticks[1:], strict=False)
            if before >= begin and after <= end
        )

    def token_rate(self, begin: float, end: float) -> float:
        """Tokens a second that arrived in the window, all clients together."""
        count = sum(
            tokens
            for answer in self.answers
            for tick, tokens in zip(answer.ticks, answer.tokens, strict=True)
            if begin <= tick < end
        )
        return count / (end - begin)

    def first_tokens(self, label: str) -> list[float]:
        """Milliseconds from sending to the first chunk, of the answers with that label."""
        return [1e3 * (a.ticks[0] - a.sent) for a in self.answers if a.label == label and a.status == 200 and a.ticks]

    def merged(self) -> list[float]:
        """Milliseconds that each request which had to be merged waited for it, as the gateway says."""
        return [a.merge_ms for a in self.answers if a.status == 200 and a.cache == "merged" and a.merge_ms is not None]

    def latest_ms(self, begin: float, end: float) -> float:
        """By how many milliseconds the client itself was late at most: what it adds to a gap."""
        return 1e3 * max((late for when, late in self.late if begin <= when <= end), default=0.0)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed (no interpolation: it was really seen)."""
    ordered = sorted(values)
    rank = share * len(ordered)
    return ordered[max(0, -int(-rank // 1) - 1)]


def spread(name: str, values: Sequence[float], suffix: str, *, worst: bool = False) -> dict[str, float]:
    """Figures `<name>_p50_<suffix>` and `_p99_`, and `_max_` where the worst counts; none where there are no values."""
    if not values:
        return {}
    figures = {f"{name}_p50_{suffix}": statistics.median(values), f"{name}_p99_{suffix}": quantile(values, 0.99)}
    return figures | ({f"{name}_max_{suffix}": max(values)} if worst else {})


def curve(values: Iterable[float]) -> list[tuple[float, float]]:
    """(share of values above, value) at shares from 1 down to a thousandth and at the maximum: a tail to plot."""
    ordered = sorted(values, reverse=True)
    shares = [10 ** (-step / 20) for step in range(61)]
    places = sorted({0, *(min(len(ordered) - 1, int(share * len(ordered))) for share in shares)})
    return [((place + 1) / len(ordered), round(ordered[place], 3)) for place in places] if ordered else []


def timeline(gaps: Sequence[tuple[float, float]], begin: float, step: float = 0.1) -> list[float]:
    """The longest gap that ended in each `step` seconds; 0 where none did."""
    bins: list[float] = []
    for when, gap in gaps:
        place = int((when - begin) / step)
        bins.extend([0.0] * (place + 1 - len(bins)))
        bins[place] = max(bins[place], round(gap, 3))
    return bins
