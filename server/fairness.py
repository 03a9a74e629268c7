"""Fair shares of the engine's slots: whose merged adapter gives way to whose build, who is next in line, who is refused.

Every slot that is taken counts one for whoever uses it, or 1/n for each of n users. What somebody **holds** is the sum. An
entry is as safe as its lightest user, the one that holds the least: its weight. An entry without users weighs more than any.

- A build may take the slot of what nobody leases: of the heaviest entry, and of equals the one unused for longest. It takes
  none that is lighter than its own client with the new slot counted: that client has more than the others, and waits
  until something of its own ends. Should nothing of its own be running, it takes the heaviest all the same: then it
  has no slot yet, or shares all that it has.
- A slot goes to the lightest build in line, and among equals to the first.
- A line that is too long loses the last of its heaviest builds.

So who shares nothing never loses an entry to somebody who holds as much or more, whatever that one asks for; and for one
client alone all this is the least recently used entry, and a line in order. Pure functions, O(slots) each.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

MAX_USERS = 16
"""Users of one entry that can be counted."""
WHOLE = math.lcm(*range(1, MAX_USERS + 1))
"""One slot in the unit of shares, in which 1/n is a whole number: equal holdings must compare as equal."""


@dataclass(frozen=True)
class Slot:
    """A slot that is taken.

    Attributes:
        users: clients that it counts for, MAX_USERS at most.
        running: clients whose lease or build in it will end.
        idle: whether it may be given away: built, and leased by nobody.
    """

    users: frozenset[str]
    running: frozenset[str]
    idle: bool


def holdings(entries: Iterable[Collection[str]]) -> Counter[str]:
    """What each client holds, given the users of each entry; in units of 1/WHOLE slot."""
    held: Counter[str] = Counter()
    for users in entries:
        for user in users:
            held[user] += WHOLE // len(users)
    return held


def weight_of(users: Collection[str], held: Counter[str]) -> float:
    """What the lightest of `users` holds."""
    return min((held[user] for user in users), default=math.inf)


def victim(slots: Sequence[Slot], users: Collection[str]) -> int | None:
    """The place in `slots` (longest unused first) of what gives way to a build for `users`; None where that has to wait."""
    idle = [place for place, slot in enumerate(slots) if slot.idle]
    if not idle:
        return None
    held = holdings([*(slot.users for slot in slots), users])
    heaviest = max(idle, key=lambda place: weight_of(slots[place].users, held))  # of equals, the first
    if weight_of(slots[heaviest].users, held) >= weight_of(users, held):
        return heaviest
    has_running = all(any(user in slot.running for slot in slots) for user in users)
    return None if has_running else heaviest


def in_turn(slots: Sequence[Slot], line: Sequence[Collection[str]]) -> list[int]:
    """The places of `line`, builds by their users, in the order in which slots are offered to them."""
    held = holdings(slot.users for slot in slots)
    return sorted(range(len(line)), key=lambda place: weight_of(line[place], held))


def refused(slots: Sequence[Slot], line: Sequence[Collection[str]]) -> int:
    """The place of the build that leaves a line that is too long: the last one of whoever has most slots and builds in line."""
    held = holdings([*(slot.users for slot in slots), *line])
    return max(range(len(line)), key=lambda place: (weight_of(line[place], held), place))
