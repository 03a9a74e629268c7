"""A tier of the adapter store: adapters by content digest, laid out in the memory of one arena."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from merging import LoraAdapter
from merging.adapter import Stack, StackedModules
from server.arena import Arena, aligned


@dataclass(eq=False)
class Entry:
    """An adapter whose factors lie in `memory`, and how many merges use it now."""

    adapter: LoraAdapter
    memory: Tensor
    users: int = 1


class Tier:
    """Adapters in an arena. Those without users leave, the longest unused first, when another needs the room."""

    def __init__(self, name: str, arena: Arena) -> None:
        self.name = name
        self.arena = arena
        self.entries: OrderedDict[str, Entry] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        return sum(len(entry.memory) for entry in self.entries.values())

    @property
    def users(self) -> int:
        return sum(entry.users for entry in self.entries.values())

    def use(self, digest: str) -> Entry:
        """An adapter that is here; it stays until its users are down by one again."""
        entry = self.entries[digest]
        entry.users += 1
        self.entries.move_to_end(digest)
        return entry

    def room_for(self, adapter: LoraAdapter) -> Entry | None:
        """Memory laid out like `adapter`, to be filled and then put among the entries; None if what is in use leaves no gap."""
        while (memory := self.arena.take(size_of(adapter))) is None:
            unused = next((digest for digest, entry in self.entries.items() if entry.users == 0), None)
            if unused is None:
                return None
            self.evict(unused)
        return Entry(_laid_over(memory, adapter), memory)

    def forget(self, digest: str) -> None:
        """Evict it, if it is here and nobody uses it."""
        if digest in self.entries and self.entries[digest].users == 0:
            self.evict(digest)

    def evict(self, digest: str) -> None:
        self.arena.give(self.entries.pop(digest).memory)


def factors(adapter: LoraAdapter) -> Iterator[Tensor]:
    """The tensors of all stacks, in the order in which they lie in a tier."""
    for stack in adapter.stacks:
        yield from (stack.a_LRI, stack.b_LRO)


def size_of(adapter: LoraAdapter) -> int:
    """Bytes that an adapter takes in a tier."""
    return sum(aligned(factor.nbytes) for factor in factors(adapter))


def _laid_over(memory: Tensor, like: LoraAdapter) -> LoraAdapter:
    """An adapter of the same modules, shapes and digest as `like` whose factors are views of `memory`."""
    views, start = [], 0
    for factor in factors(like):
        views.append(memory[start : start + factor.nbytes].view(factor.dtype).view(factor.shape))
        start += aligned(factor.nbytes)
    stacks = [
        Stack(stack.names, a_LRI, b_LRO, stack.scalings)
        for stack, a_LRI, b_LRO in zip(like.stacks, views[::2], views[1::2], strict=True)
    ]
    adapter = LoraAdapter(StackedModules(stacks), like.base_model)
    adapter.__dict__["digest"] = like.digest
    return adapter
