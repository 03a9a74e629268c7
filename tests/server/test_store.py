"""The adapter store: what is held is what lies on disk, in bounded memory, whoever else wants it at the same time."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from harness import tiny_adapter

from merging import AdapterError, LoraAdapter, RecipeError, load_adapter, save_adapter
from server import reader
from server.arena import Arena
from server.reader import SourceFile
from server.store import AdapterStore, Held
from server.tier import Tier, size_of

CPU = torch.device("cpu")
SIZE = size_of(tiny_adapter(4, 0))  # of one of the equal adapters
MakeStore = Callable[..., AdapterStore]


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceFile]:
    """Eight adapters of one size: a to h."""
    files = []
    for seed, name in enumerate("abcdefgh"):
        save_adapter(tiny_adapter(4, seed), tmp_path / name)
        files.append(SourceFile(name, str(tmp_path / name), load_adapter(tmp_path / name).digest))
    return files


def one_tier(adapters: float) -> AdapterStore:
    """As on a CPU, with room for so many adapters."""
    return AdapterStore(CPU, int(adapters * SIZE), 0)


def two_tiers(device: float, host: float) -> AdapterStore:
    """As on a GPU, but for where the memory is."""
    store = one_tier(host)
    store._near = Tier("device", Arena(int(device * SIZE), CPU))
    return store


def tiers_of(store: AdapterStore, sources: list[SourceFile]) -> dict[str, int]:
    with store.acquire(sources) as held:
        check(held, sources)
        return held.tiers


def check(held: Held, sources: list[SourceFile]) -> None:
    """That each adapter held has the content that its source names, by a digest made anew."""
    assert list(held.adapters) == [source.name for source in sources]
    for source in sources:
        adapter = held.adapters[source.name]
        assert adapter.digest == source.digest  # goes along
        assert LoraAdapter(dict(adapter.modules), adapter.base_model).digest == source.digest  # and is true


def nothing_is_in_use(store: AdapterStore) -> bool:
    return store._near.users == store._host.users == 0


def test_a_source_is_on_disk_first_and_near_from_then_on(sources: list[SourceFile]) -> None:
    store = two_tiers(device=2, host=4)
    assert store.used_bytes() == {"host": 0, "device": 0}
    assert tiers_of(store, sources[:2]) == {"disk": 2}
    assert tiers_of(store, sources[:2]) == {"device": 2}
    assert tiers_of(store, sources[1:3]) == {"device": 1, "disk": 1}
    assert tiers_of(store, sources[:1]) == {"host": 1}
    assert store.used_bytes() == {"host": 3 * SIZE, "device": 2 * SIZE}
    assert nothing_is_in_use(store)


def test_on_a_cpu_host_memory_is_where_merges_read(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    assert tiers_of(store, sources[:2]) == {"disk": 2}
    assert tiers_of(store, sources[:2]) == {"host": 2}
    assert store.used_bytes() == {"host": 2 * SIZE}


def test_all_factors_of_an_adapter_lie_in_one_range(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    with store.acquire(sources[:2]) as held:
        for adapter in held.adapters.values():
            starts = [factor.data_ptr() for stack in adapter.stacks for factor in (stack.a_LRI, stack.b_LRO)]
            assert max(starts) - min(starts) < SIZE
            assert all((start - min(starts)) % 256 == 0 for start in starts)
            assert all(stack.a_LRI.is_contiguous() and stack.b_LRO.is_contiguous() for stack in adapter.stacks)


def test_the_longest_unused_leaves_first(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    a, b, c = sources[:3]
    for source in (a, b, a, c):
        tiers_of(store, [source])
    assert tiers_of(store, [a]) == {"host": 1}
    assert tiers_of(store, [c]) == {"host": 1}
    assert tiers_of(store, [b]) == {"disk": 1}


def test_what_is_held_stays_and_others_wait_for_it(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    with ThreadPoolExecutor(1) as threads:
        with store.acquire(sources[:2]) as held:
            waiting = threads.submit(tiers_of, store, sources[2:4])
            time.sleep(0.05)
            assert not waiting.done()
            check(held, sources[:2])
        assert waiting.result(timeout=10) == {"disk": 2}


def test_a_merge_that_lacks_nothing_does_not_wait_for_one_that_does(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    with ThreadPoolExecutor(2) as threads, store.acquire(sources[:2]):
        waiting = threads.submit(tiers_of, store, sources[2:4])
        time.sleep(0.05)
        assert threads.submit(tiers_of, store, sources[:2]).result(timeout=10) == {"host": 2}
        assert not waiting.done()
    assert waiting.result() == {"disk": 2}


@pytest.mark.parametrize("store", [one_tier(4), two_tiers(4, 5), two_tiers(4, 0.5)], ids=["cpu", "gpu", "tiny host"])
def test_under_random_demand_every_merge_reads_the_right_bytes_and_none_waits_for_ever(
    store: AdapterStore, sources: list[SourceFile]
) -> None:
    def client(seed: int) -> None:
        random_ = random.Random(seed)
        for _ in range(25):
            wanted = random_.sample(sources, random_.randint(1, 4))
            with store.acquire(wanted) as held:
                check(held, wanted)
                time.sleep(random_.choice((0, 0, 0.002)))
                check(held, wanted)

    with ThreadPoolExecutor(6) as threads:
        for result in [threads.submit(client, seed) for seed in range(6)]:
            result.result(timeout=60)
    assert nothing_is_in_use(store)


def test_gaps_too_narrow_for_what_fits_in_all_are_joined(sources: list[SourceFile], tmp_path: Path) -> None:
    save_adapter(tiny_adapter(10, 50), tmp_path / "large")
    adapter = load_adapter(tmp_path / "large")
    large = SourceFile("large", str(tmp_path / "large"), adapter.digest)
    store = AdapterStore(CPU, SIZE + size_of(adapter), 0)
    assert SIZE < size_of(adapter) < 3 * SIZE
    for source in sources[:2]:  # the second lies in the middle, with too little room on either side
        tiers_of(store, [source])
    assert tiers_of(store, [sources[1], large]) == {"host": 1, "disk": 1}
    assert nothing_is_in_use(store)


@pytest.mark.parametrize(("store", "option"), [(one_tier(2), "host"), (two_tiers(2, 9), "gpu")])
def test_sources_that_never_fit_together_are_refused_with_sizes_and_remedy(
    store: AdapterStore, option: str, sources: list[SourceFile]
) -> None:
    with pytest.raises(RecipeError, match=rf"a \(.* GiB\), b .*, c .* --adapter-{option}-gib"), store.acquire(sources[:3]):
        pass
    assert nothing_is_in_use(store)
    assert sum(tiers_of(store, sources[:2]).values()) == 2


def test_host_memory_too_small_for_an_adapter_is_passed_by(sources: list[SourceFile]) -> None:
    store = two_tiers(device=1, host=0.5)
    assert tiers_of(store, sources[:1]) == {"disk": 1}
    assert tiers_of(store, sources[:1]) == {"device": 1}
    assert store.used_bytes() == {"host": 0, "device": SIZE}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Event, list[str]]]:
    """Readings from disk wait for the event; the list says which folders were read."""
    go_on, read = Event(), list[str]()

    def load(folder: str) -> LoraAdapter:
        read.append(Path(folder).name)
        assert go_on.wait(10)
        return load_adapter(folder)

    monkeypatch.setattr(reader, "read_adapter", load)
    yield go_on, read
    go_on.set()


def test_two_merges_that_want_the_same_source_share_one_reading(
    sources: list[SourceFile], gate: tuple[Event, list[str]]
) -> None:
    go_on, read = gate
    store = one_tier(4)
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(tiers_of, store, wanted) for wanted in (sources[:1], sources[:2])]
        time.sleep(0.05)
        go_on.set()
        assert [result.result(timeout=10) for result in results] == [{"disk": 1}, {"disk": 2}]
    assert sorted(read) == ["a", "b"]


def test_while_one_reads_from_disk_others_come_and_go(sources: list[SourceFile], gate: tuple[Event, list[str]]) -> None:
    go_on, _ = gate
    store = two_tiers(device=1, host=4)
    go_on.set()
    for source in sources[:2]:
        tiers_of(store, [source])
    go_on.clear()
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(tiers_of, store, sources[2:3])
        time.sleep(0.05)
        assert threads.submit(tiers_of, store, sources[:1]).result(timeout=10) == {"host": 1}
        assert not reading.done()
        go_on.set()
        assert reading.result(timeout=10) == {"disk": 1}


def test_a_broken_source_fails_its_users_and_costs_the_others_nothing(sources: list[SourceFile]) -> None:
    store = two_tiers(device=2, host=2)
    broken = Path(sources[1].folder) / "adapter_model.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    with pytest.raises(AdapterError, match="b"), store.acquire(sources[:2]):
        pass
    assert nothing_is_in_use(store)
    assert tiers_of(store, sources[2:4]) == {"disk": 2}
    broken.write_bytes(content)
    assert tiers_of(store, sources[:2]) == {"disk": 2}


def test_what_a_merge_raises_ends_its_use(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    with pytest.raises(ZeroDivisionError), store.acquire(sources[:2]):
        _ = 1 / 0
    assert nothing_is_in_use(store)


def test_one_content_under_two_names_is_held_once(sources: list[SourceFile]) -> None:
    store = one_tier(1)
    twin = sources[0]._replace(name="twin")
    assert tiers_of(store, [sources[0], twin]) == {"disk": 1}
    assert nothing_is_in_use(store)


def test_what_is_forgotten_takes_no_room_in_any_tier_and_is_read_again(sources: list[SourceFile]) -> None:
    store = two_tiers(device=4, host=4)
    tiers_of(store, sources[:3])
    store.forget([sources[0].digest, sources[2].digest, "of none"])
    assert store.used_bytes() == {"host": SIZE, "device": SIZE}
    assert tiers_of(store, sources[:2]) == {"disk": 1, "device": 1}


def test_what_is_in_use_is_not_forgotten(sources: list[SourceFile]) -> None:
    store = one_tier(2)
    with store.acquire(sources[:1]) as held:
        store.forget([sources[0].digest])
        check(held, sources[:1])
    assert tiers_of(store, sources[:1]) == {"host": 1}
    assert nothing_is_in_use(store)


def test_forgetting_waits_for_no_disk_and_for_no_merge(sources: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread does it."""
    store, begun, go_on = one_tier(2), Event(), Event()
    tiers_of(store, sources[:1])
    read = reader.read_adapter

    def slowly(folder: str) -> LoraAdapter:
        begun.set()
        assert go_on.wait(10)
        return read(folder)

    monkeypatch.setattr(reader, "read_adapter", slowly)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(tiers_of, store, sources[1:2])
        assert begun.wait(10)
        store.forget([sources[0].digest])
        assert store.used_bytes() == {"host": 0}
        go_on.set()
        reading.result(timeout=10)
