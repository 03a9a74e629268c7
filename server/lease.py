"""The lease: what a request holds of a merged adapter while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Built:
    """When a build had its slot and when it was done, in ns since the epoch; and its seconds by phase (see Resident)."""

    slot: int
    done: int
    seconds: Mapping[str, float]


@dataclass
class Lease:
    """The right to use a resident adapter until `release`; releasing twice does no harm.

    Attributes:
        name: what to call it in the engine.
        key: its content key.
        tier: where it came from: `device` (it was resident), `disk` (this request waited for it to come from the disk cache) or
            `merged` (this request waited for the merge).
        waited_ms: milliseconds this request waited for the build; 0 for `device`.
        end: called at the first release.
        built: the build that this request waited for; None for `device`.
    """

    name: str
    key: str
    tier: str
    waited_ms: float
    end: Callable[[], None]
    built: Built | None = None
    _released: bool = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            self.end()
