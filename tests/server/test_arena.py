"""The arena: ranges that never overlap, and one whole block again once all have come back."""

import random

import pytest
import torch

from server.arena import ALIGNMENT, Arena


def arena(units: int) -> Arena:
    return Arena(units * ALIGNMENT, torch.device("cpu"))


def test_ranges_are_aligned_and_at_least_as_large_as_asked_for() -> None:
    block = arena(4)
    one, other = block.take(1), block.take(ALIGNMENT + 1)
    assert one is not None
    assert other is not None
    assert (len(one), len(other)) == (ALIGNMENT, 2 * ALIGNMENT)
    assert (one.storage_offset(), other.storage_offset()) == (0, ALIGNMENT)
    assert block.take(2 * ALIGNMENT) is None


def test_the_first_gap_that_is_wide_enough_is_taken() -> None:
    block = arena(6)
    parts = [block.take(size * ALIGNMENT) for size in (1, 1, 2, 1, 1)]
    for part in (parts[0], parts[2]):
        assert part is not None
        block.give(part)
    again = block.take(2 * ALIGNMENT)
    assert again is not None
    assert again.storage_offset() == 2 * ALIGNMENT


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lent_and_given_back_nothing_overlaps_and_nothing_is_lost(seed: int) -> None:
    units, random_ = 40, random.Random(seed)
    block, lent = arena(units), list[torch.Tensor]()
    for mark in range(200):
        if lent and random_.random() < 0.5:
            memory = lent.pop(random_.randrange(len(lent)))
            assert len(set(memory.tolist())) == 1, "written by another"
            block.give(memory)
        elif (taken := block.take(random_.randint(1, 8 * ALIGNMENT))) is not None:
            lent.append(taken.fill_(mark))
        gaps = _gaps(lent, units * ALIGNMENT)
        assert (block.take(max(gaps) + ALIGNMENT)) is None
        widest = block.take(max(gaps)) if max(gaps) else None
        assert (widest is not None) == (max(gaps) > 0), "neighbours were not joined"
        if widest is not None:
            block.give(widest)
    for memory in lent:
        block.give(memory)
    assert block.take(units * ALIGNMENT) is not None


def _gaps(lent: list[torch.Tensor], nbytes: int) -> list[int]:
    """The widths between the ranges, independently of the arena's books."""
    bounds = sorted((int(memory.storage_offset()), int(memory.storage_offset()) + len(memory)) for memory in lent)
    ends = [0, *(end for _, end in bounds)]
    starts = [*(start for start, _ in bounds), nbytes]
    return [start - end for end, start in zip(ends, starts, strict=True)]
