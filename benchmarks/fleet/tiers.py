"""Where adapters lie, merged ones and sources alike: memories of a replica, its own disk, and a folder that all share.

An object is a number: a source adapter, or a merged one behind all sources. All are of one size, so a capacity is a count.
"""

from collections import OrderedDict
from dataclasses import dataclass, field


class Lru:
    """At most `capacity` objects; the one unused for longest leaves."""

    __slots__ = ("_objects", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._objects: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, item: int) -> bool:
        return item in self._objects

    def __len__(self) -> int:
        return len(self._objects)

    def use(self, item: int) -> bool:
        """Whether it is here; it has been used now."""
        if item not in self._objects:
            return False
        self._objects.move_to_end(item)
        return True

    def put(self, item: int) -> None:
        """Take in an object that has been used now."""
        if self.capacity:
            self._objects[item] = None
            self._objects.move_to_end(item)
            if len(self._objects) > self.capacity:
                self._objects.popitem(last=False)


@dataclass
class Moved:
    """Objects that were moved, by where they were found and where they were written."""

    device: int = 0
    host: int = 0
    own_disk: int = 0
    folder: int = 0
    written_own: int = 0
    written_folder: int = 0


@dataclass
class Storage:
    """What one replica can read from.

    Attributes:
        device, host: the adapter store's two memories.
        own: its own disk, which keeps what was read from the folder, or what was merged; capacity 0 where it has none.
        folder: merged adapters in the folder that all replicas share; capacity 0 where they do not. All sources lie there.
        sources: numbers of sources are below it.
        moved: what was moved; shared by all replicas.
    """

    device: Lru
    host: Lru
    own: Lru
    folder: Lru
    sources: int
    moved: Moved = field(default_factory=Moved)

    def in_memory(self, item: int) -> bool:
        return item in self.device or item in self.host

    def on_disk(self, item: int) -> bool:
        """Whether a merged adapter is on a disk."""
        return item in self.own or item in self.folder

    def take(self, item: int) -> str:
        """Bring an object to the device; where it was found: `device`, `host` or `disk`."""
        if self.device.use(item):
            self.moved.device += 1
            return "device"
        self.device.put(item)
        if self.host.use(item):
            self.moved.host += 1
            return "host"
        self.host.put(item)
        if self.own.use(item):
            self.moved.own_disk += 1
            return "disk"
        self.moved.folder += 1
        if item >= self.sources:
            self.folder.use(item)
        self._keep(item)
        return "disk"

    def keep_merged(self, item: int) -> None:
        """Write a merged adapter wherever there is a disk cache."""
        self._keep(item)
        if self.folder.capacity:
            self.moved.written_folder += 1
            self.folder.put(item)

    def _keep(self, item: int) -> None:
        if self.own.capacity:
            self.moved.written_own += 1
            self.own.put(item)
