"""Who has a slot of the engine, who waits for one, and who gives way; by the rules of server/fairness.py.

Runs on one event loop and awaits nothing between looking at its state and changing it, so it needs no locks.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from server.catalog import Recipe
from server.engine import Resident
from server.errors import OverloadedError
from server.fairness import MAX_USERS, Slot, in_turn, refused, victim
from server.metrics import Metrics

KEPT_SECONDS = 60.0
"""How long after its last lease an entry still counts for a client. Longer protects pauses, shorter lends what is idle."""


@dataclass(eq=False)
class Entry:
    """A recipe that is being built, or resident.

    Attributes:
        had_slot, was_done: when its build had a slot, and when it had ended, in ns since the epoch.
        leases: how many each client has.
        last_used: by the clients that used it last, MAX_USERS at most, the latest at the end.
        pinned: whether it stays though nobody leases it.
    """

    recipe: Recipe
    build: asyncio.Task[None] = field(init=False)
    resident: Resident | None = None
    had_slot: int = 0
    was_done: int = 0
    leases: Counter[str] = field(default_factory=Counter)
    last_used: OrderedDict[str, float] = field(default_factory=OrderedDict)
    pinned: bool = False

    def lease(self, client: str, change: int, now: float) -> None:
        """Count a lease that begins (1) or ends (-1)."""
        self.leases[client] += change
        if not self.leases[client]:
            del self.leases[client]
        self.last_used[client] = now
        self.last_used.move_to_end(client)
        if len(self.last_used) > MAX_USERS:
            self.last_used.popitem(last=False)

    def users(self, now: float) -> frozenset[str]:
        return frozenset(
            client for client, used in self.last_used.items() if client in self.leases or now - used < KEPT_SECONDS
        )


@dataclass(frozen=True)
class _Turn:
    """A build in line, and the slot that it will be given."""

    entry: Entry
    slot: asyncio.Future[Resident | None]


class Slots:
    """The engine's slots.

    Args:
        count: how many there are.
        longest_line: builds that wait for one at most.
        metrics: where the line's length is shown.
        on_evict: told of each entry that gives way, while it still says what was resident.
        clock: seconds, monotonic.

    Attributes:
        count: of all slots. clock: as given.
    """

    def __init__(
        self,
        count: int,
        longest_line: int,
        metrics: Metrics,
        on_evict: Callable[[Entry], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = count
        self.clock = clock
        self._free: list[Resident | None] = [None] * count  # empty slots, and those of what gives way to the next build
        self._longest_line = longest_line
        self._metrics = metrics
        self._on_evict = on_evict
        self._taken: OrderedDict[Entry, None] = OrderedDict()  # by end of the last lease; dropped builds until they let go
        self._line: list[_Turn] = []
        self._news = asyncio.Event()

    @property
    def taken(self) -> Collection[Entry]:
        """Those that have a slot; dropped builds, and what is being evicted, until the slot is free."""
        return self._taken.keys()

    async def changed(self) -> None:
        """Returns once a lease has ended or a slot has come back."""
        await self._news.wait()

    async def take(self, entry: Entry) -> Resident | None:
        """Reserve a slot for `entry`: None for an empty one, or what has to leave its slot.

        Raises:
            OverloadedError: when the line is too long for it.
        """
        turn = _Turn(entry, asyncio.get_running_loop().create_future())
        self._line.append(turn)
        self.hand_out()
        if len(self._line) > self._longest_line:
            self._shorten()
        try:
            return await turn.slot
        except asyncio.CancelledError:
            self.hand_out()  # nothing waits behind one who has left
            if not turn.slot.cancelled() and turn.slot.exception() is None:  # its turn came just before
                self.put_back(entry, turn.slot.result())
            raise

    def put_back(self, entry: Entry, left: Resident | None) -> None:
        """Return the slot of an entry that will not be resident; `left` is what is still in it."""
        del self._taken[entry]
        self._free.append(left)
        self.hand_out()
        self._tell()

    def lease(self, entry: Entry, client: str) -> None:
        """Begin a lease."""
        entry.lease(client, 1, self.clock())

    def release(self, entry: Entry, client: str) -> None:
        """End a lease; from now on others have been unused for longer."""
        entry.lease(client, -1, self.clock())
        if entry in self._taken:
            self._taken.move_to_end(entry)
        self._tell()

    def hand_out(self) -> None:
        """Give slots to those in line, as far as there are any for them."""
        self._line = [turn for turn in self._line if not turn.slot.cancelled()]
        while self._line and self._hand_out_one():
            pass
        self._metrics.line.set(len(self._line))

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _hand_out_one(self) -> bool:
        entries, slots = list(self._taken), self._slots()
        if not self._free and not any(slot.idle for slot in slots):
            return False
        users = self._users_in_line()
        asked: set[frozenset[str]] = set()  # the rules say the same to all builds of the same users
        for place in in_turn(slots, users):
            if self._free:
                self._give(place, self._free.pop())
                return True
            if users[place] in asked:
                continue
            asked.add(users[place])
            chosen = victim(slots, users[place])
            if chosen is not None:
                self._give(place, self._evict(entries[chosen]))
                return True
        return False

    def _give(self, place: int, slot: Resident | None) -> None:
        turn = self._line.pop(place)
        self._taken[turn.entry] = None
        turn.slot.set_result(slot)

    def _evict(self, entry: Entry) -> Resident | None:
        self._on_evict(entry)
        del self._taken[entry]
        return entry.resident

    def _shorten(self) -> None:
        turn = self._line.pop(refused(self._slots(), self._users_in_line()))
        turn.slot.set_exception(OverloadedError(f"{self._longest_line} merges wait for a slot already; try again shortly"))
        self._metrics.line.set(len(self._line))

    def _users_in_line(self) -> list[frozenset[str]]:
        return [turn.entry.users(self.clock()) for turn in self._line]

    def _slots(self) -> list[Slot]:
        now = self.clock()
        return [_slot(entry, entry.users(now)) for entry in self._taken]


def _slot(entry: Entry, users: frozenset[str]) -> Slot:
    running = frozenset(entry.leases) or (users if entry.resident is None else frozenset())  # a dropped build was theirs
    return Slot(users, running, idle=entry.resident is not None and not entry.leases and not entry.pinned)
