"""What a simulation counts, and the figures that follow."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tally:
    """Of the whole fleet; `hits`, `misses`, `joined` and the times only of requests that count, the rest since `reset`.

    Attributes:
        joined: misses that found their composition being built.
        copied, read, merged: builds, by how: merged before and still in memory, or on a disk; or merged.
        sources: of what was merged, by where they were found.
        thread_seconds: of helper threads.
        first_tokens: seconds from each request's coming to its first token.
        for_builds, for_seats: seconds that requests waited, in all.
    """

    hits: int = 0
    misses: int = 0
    joined: int = 0
    copied: int = 0
    read: int = 0
    merged: int = 0
    sources: dict[str, int] = field(default_factory=lambda: {"device": 0, "host": 0, "disk": 0})
    thread_seconds: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    for_builds: float = 0.0
    for_seats: float = 0.0

    def sat_down(self, came: float, ready: float, begun: float, first_seconds: float) -> None:
        """A request that came, whose composition was ready, and that has a seat from `begun` on."""
        self.for_builds += ready - came
        self.for_seats += begun - ready
        self.first_tokens.append(begun - came + first_seconds)

    def reset(self) -> None:
        """From here on it counts."""
        self.copied = self.read = self.merged = 0
        self.sources = dict.fromkeys(self.sources, 0)
        self.thread_seconds = 0.0

    @property
    def builds(self) -> int:
        return self.copied + self.read + self.merged

    def rates(self, seconds: float, threads: int) -> dict[str, float]:
        """Of the fleet, by the second, and shares.

        Args:
            seconds: since `reset`.
            threads: helper threads of all replicas.
        """
        found = sum(self.sources.values())
        return {
            "hit_rate": self.hits / max(1, self.hits + self.misses),
            "joined_share": self.joined / max(1, self.misses),
            "builds_per_s": self.builds / seconds,
            "merges_per_s": self.merged / seconds,
            "copied_share": self.copied / max(1, self.builds),
            "read_share": self.read / max(1, self.builds),
            **{f"sources_{tier}_share": count / max(1, found) for tier, count in self.sources.items()},
            "threads_busy": self.thread_seconds / (seconds * threads),
        }

    def waits(self) -> dict[str, float]:
        """In milliseconds; once all who wait have got what they wait for."""
        p50, p99 = (float(value) for value in np.percentile(self.first_tokens, (50, 99)))
        return {
            "first_token_ms_p50": 1e3 * p50,
            "first_token_ms_p99": 1e3 * p99,
            "build_wait_ms_mean": 1e3 * self.for_builds / len(self.first_tokens),
            "seat_wait_ms_mean": 1e3 * self.for_seats / len(self.first_tokens),
        }
