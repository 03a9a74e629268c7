"""Arena: one block of memory, allocated once, of which ranges are lent and taken back."""

from bisect import bisect

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; ranges, and the tensors in them, start at multiples of it


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Lends ranges of one block of memory: first fit, neighbours joined when they come back.

    While serving nothing is allocated, pinned or freed: any of that would stop the whole device for a while.

    Args:
        nbytes: size of the block.
        pinned: whether the block, in host memory, is pinned, so that copies from it need no thread to wait for them.

    Raises:
        MemoryError: where the block cannot be pinned.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        self.nbytes = nbytes
        self._block = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if pinned:  # in place: memory that torch pins itself is rounded up to a power of two
            status = int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), nbytes, 0))  # type: ignore[no-untyped-call]
            if status != 0:
                raise MemoryError(f"{nbytes} bytes of host memory cannot be pinned (CUDA error {status})")
        self._free = [(0, nbytes)]  # (start, end), in order, none touching the next

    def take(self, nbytes: int) -> Tensor | None:
        """A range of at least `nbytes` bytes, uint8, or None where no gap is wide enough."""
        size = aligned(nbytes)
        for place, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[place : place + 1] = [(start + size, end)] if end - start > size else []
                return self._block[start : start + size]
        return None

    def give(self, memory: Tensor) -> None:
        """Take back a range that was lent."""
        start = int(memory.storage_offset())
        end = start + len(memory)
        place = bisect(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place > 0 and self._free[place - 1][1] == start:
            place -= 1
            start = self._free.pop(place)[0]
        self._free.insert(place, (start, end))
