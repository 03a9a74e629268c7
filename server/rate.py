"""How often each client may have something merged: a token bucket a client."""

import math
import time
from collections.abc import Callable

from cachetools import TTLCache

from server.errors import RateLimitedError

_MINUTE = 60.0
_CLIENTS = 10_000  # buckets at a time; beyond, the one unused for longest is forgotten, which is as if it were full
_ROUNDING = 1e-6


class ColdMergeRate:
    """Token buckets of `per_minute` tokens, each full again after a minute.

    A bucket is kept as the time at which it will be full. One untouched for a minute is full, and so need not be kept.

    Args:
        per_minute: builds that each client may ask for in a minute, and at once.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._full_at: TTLCache[str, float] = TTLCache(_CLIENTS, _MINUTE, timer=clock)

    def take(self, client: str) -> None:
        """Take a token.

        Raises:
            RateLimitedError: where there is none, with the seconds until there is one.
        """
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + _MINUTE / self._per_minute
        missing = full_at - now - _MINUTE
        if missing > _ROUNDING:
            raise RateLimitedError(
                f"{self._per_minute} new compositions a minute are all that this server merges for one client; "
                f"ask for ones that you have used lately, or wait {missing:.1f} s",
                retry_after=max(1, math.ceil(missing - _ROUNDING)),
            )
        self._full_at[client] = full_at
