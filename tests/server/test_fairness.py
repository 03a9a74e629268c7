"""Fair shares: what may give way to whom, who is next, who leaves a line that is too long."""

from hypothesis import given
from hypothesis import strategies as st

from server.fairness import MAX_USERS, WHOLE, Slot, holdings, in_turn, refused, victim, weight_of

CLIENTS = st.sampled_from("abcde")
USERS = st.frozensets(CLIENTS, min_size=1, max_size=3)


def slot(users: str, running: str = "") -> Slot:
    """A slot that counts for each letter of `users`; idle where nobody's is running."""
    return Slot(frozenset(users), frozenset(running), idle=not running)


def slots_of(users: st.SearchStrategy[frozenset[str]]) -> st.SearchStrategy[list[Slot]]:
    """Slots that are idle, or in which something of some of their users is running."""

    def running(who: frozenset[str]) -> st.SearchStrategy[frozenset[str]]:
        return st.frozensets(st.sampled_from(sorted(who))) if who else st.just(frozenset())

    one = users.flatmap(lambda who: running(who).map(lambda busy: Slot(who, busy, idle=not busy)))
    return st.lists(one, max_size=12)


SLOTS = slots_of(st.frozensets(CLIENTS, max_size=3))
UNSHARED = slots_of(CLIENTS.map(lambda client: frozenset({client})))


def test_a_slot_counts_for_its_users_in_equal_parts() -> None:
    held = holdings([frozenset("ab"), frozenset("a"), frozenset("abc")])
    assert held == {"a": WHOLE + WHOLE // 2 + WHOLE // 3, "b": WHOLE // 2 + WHOLE // 3, "c": WHOLE // 3}
    assert all(WHOLE % users == 0 for users in range(1, MAX_USERS + 1))


def test_the_longest_unused_of_the_heaviest_client_gives_way() -> None:
    slots = [slot("a"), slot("b"), slot("b"), slot("c"), slot("b")]
    assert victim(slots, frozenset("d")) == 1
    assert victim(slots, frozenset("b")) == 1


def test_what_nobody_has_used_lately_gives_way_first() -> None:
    assert victim([slot("a"), slot("b"), slot(""), slot("a")], frozenset("b")) == 2


def test_who_has_most_waits_for_its_own_instead_of_taking_from_others() -> None:
    slots = [slot("a"), slot("f", running="f"), slot("f", running="f"), slot("b")]
    assert victim(slots, frozenset("f")) is None
    assert victim(slots, frozenset("a")) == 0
    assert victim([*slots, slot("f")], frozenset("f")) == 4


def test_whoever_has_nothing_running_never_waits_for_what_is_idle() -> None:
    shared = [slot("abcd"), slot("abcd")]
    assert victim(shared, frozenset("e")) == 0  # where everybody's share is less than one slot
    assert victim([slot("ab")], frozenset("a")) == 0


def test_an_entry_is_as_safe_as_its_lightest_user_so_that_joining_in_takes_nothing_from_it() -> None:
    slots = [slot("af"), slot("b"), slot("f"), slot("f"), slot("b")]
    assert victim(slots, frozenset("f")) == 2


@given(SLOTS, USERS)
def test_only_what_is_idle_gives_way(slots: list[Slot], users: frozenset[str]) -> None:
    place = victim(slots, users)
    assert place is None or slots[place].idle


@given(UNSHARED, CLIENTS)
def test_nobody_loses_an_entry_to_one_who_holds_as_much_or_more(slots: list[Slot], client: str) -> None:
    place = victim(slots, frozenset({client}))
    if place is not None:
        (owner,) = slots[place].users
        counts = {name: sum(name in slot.users for slot in slots) for name in "abcde"}
        assert owner == client or counts[owner] > counts[client]


@given(UNSHARED, CLIENTS)
def test_one_client_is_served_by_least_recently_used(slots: list[Slot], client: str) -> None:
    alone = [Slot(frozenset({client}), frozenset({client}) if slot.running else frozenset(), slot.idle) for slot in slots]
    idle = [place for place, slot in enumerate(alone) if slot.idle]
    assert victim(alone, frozenset({client})) == (idle[0] if idle else None)


@given(SLOTS, USERS)
def test_a_build_waits_only_for_something_that_ends(slots: list[Slot], users: frozenset[str]) -> None:
    if victim(slots, users) is None:
        running = frozenset().union(*(slot.running for slot in slots))
        assert all(not slot.idle for slot in slots) or users <= running


@given(SLOTS, USERS)
def test_of_equals_the_longest_unused_gives_way(slots: list[Slot], users: frozenset[str]) -> None:
    place = victim(slots, users)
    if place is not None:
        held = holdings([*(slot.users for slot in slots), users])
        weights = [weight_of(slot.users, held) if slot.idle else -1 for slot in slots]
        assert weights[place] == max(weights)
        assert place == weights.index(max(weights))


@given(SLOTS, st.lists(USERS, max_size=8))
def test_the_line_is_served_lightest_first_and_in_order_among_equals(slots: list[Slot], line: list[frozenset[str]]) -> None:
    order = in_turn(slots, line)
    held = holdings(slot.users for slot in slots)
    assert order == sorted(range(len(line)), key=lambda place: (weight_of(line[place], held), place))


@given(st.lists(CLIENTS, min_size=1, max_size=8))
def test_a_line_that_is_too_long_loses_the_last_of_whoever_waits_most(line: list[str]) -> None:
    place = refused([], [frozenset({client}) for client in line])
    most = max(map(line.count, line))
    assert line.count(line[place]) == most
    assert line[place] not in line[place + 1 :]


@given(st.lists(CLIENTS, min_size=4, max_size=60), st.integers(2, 8))
def test_a_client_keeps_its_fair_share_whatever_the_others_ask_for(requests: list[str], count: int) -> None:
    """Everybody asks for ever new recipes, one after the other: nobody falls below slots / clients, rounded down."""
    slots: list[Slot] = []
    fair = count // 5
    reached = dict.fromkeys("abcde", False)
    for client in requests:
        if len(slots) == count:
            place = victim(slots, frozenset({client}))
            assert place is not None
            del slots[place]
        slots.append(slot(client))
        for name in reached:
            held = sum(name in slot.users for slot in slots)
            assert held >= fair or not reached[name]
            reached[name] |= held >= fair
