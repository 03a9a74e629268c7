"""The unit pool: all adapters of a merge, as units grouped by module shape.

A unit is row i of A with column i of B (LoRA-LEGO's minimal semantic unit): ΔW of a module is the sum of its
units' outer products, each times its coefficient (weight · scaling). Modules that the same adapters adapt in one
shape form a block, so that every large step is one batched operation a block; blocks of equal ranks form a pool,
whose small N × N problems are solved in one batch.

Shape suffixes, here and in all of merging:
    L  modules of the pool or block (layers, mostly)   I  inputs (d_in)     K  merged units
    N  units of a module, all adapters                 O  outputs (d_out)   R  units of one adapter
    T  adapters present
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from merging.adapter import LoraAdapter
from merging.errors import RecipeError
from merging.products import UnitRows, rows_of
from merging.term import Term


@dataclass(frozen=True)
class UnitBlock:
    """Modules of one shape and the factors of every adapter that adapts them.

    Attributes:
        modules: L names.
        adapters: places of the T adapters in the merge's order.
        a: the rows of T tensors a_LRI as the adapters store them; b: those of T tensors b_LRO.
        coefficient_LT: weight · scaling of each adapter in each module, float64 on the CPU.
    """

    modules: tuple[str, ...]
    adapters: tuple[int, ...]
    a: UnitRows
    b: UnitRows
    coefficient_LT: Tensor

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(a_LRI.shape[1] for a_LRI in self.a.parts)

    @property
    def device(self) -> torch.device:
        return self.a.parts[0].device


@dataclass(frozen=True)
class Pool:
    """Blocks whose adapters have the same ranks, and what methods may know of their units.

    L counts the modules of all blocks, one block after another.
    """

    blocks: tuple[UnitBlock, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each adapter present, in the merge's order; their sum is N."""
        return self.blocks[0].ranks

    @property
    def modules(self) -> list[str]:
        """L names."""
        return [name for block in self.blocks for name in block.modules]

    @property
    def units(self) -> int:
        return sum(self.ranks)

    @property
    def owners(self) -> list[slice]:
        """The units of each adapter present."""
        ends = [sum(self.ranks[: place + 1]) for place in range(len(self.ranks))]
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @cached_property
    def coefficient_LN(self) -> Tensor:
        """weight · scaling of each unit; float64 on the factors' device."""
        coefficient_LT = torch.cat([block.coefficient_LT for block in self.blocks])
        return coefficient_LT.repeat_interleave(torch.tensor(self.ranks), dim=1).to(self.blocks[0].device, non_blocking=True)

    @property
    def gram_a_LNN(self) -> Tensor:
        """A Aᵀ of the raw units, accumulated in float32, as float64."""
        return self._measured_a[0]

    @property
    def gram_b_LNN(self) -> Tensor:
        """Bᵀ B of the raw units, accumulated in float32, as float64."""
        return self._measured_b[0]

    @property
    def peak_a_LN(self) -> Tensor:
        """The largest magnitude in each row of A; float64."""
        return self._measured_a[1]

    @property
    def peak_b_LN(self) -> Tensor:
        """The largest magnitude in each column of B; float64."""
        return self._measured_b[1]

    @cached_property
    def fine_grams(self) -> tuple[Tensor, Tensor, float]:
        """A Aᵀ, Bᵀ B and their relative error, for roots of them; accumulated in float64 on the CPU."""
        if self.blocks[0].device.type == "cuda":
            return self.gram_a_LNN, self.gram_b_LNN, torch.finfo(torch.float32).eps
        grams_a, grams_b = [[side.gram(fine=True)[0] for side in sides] for sides in self._sides]
        return torch.cat(grams_a), torch.cat(grams_b), torch.finfo(torch.float64).eps

    @cached_property
    def sign_a_LN(self) -> Tensor:
        """The sign of the entry of largest magnitude in each row of A; float64, 0 for a row of zeros."""
        return torch.cat([torch.cat([_peak_sign(x_LRD) for x_LRD in block.a.parts], dim=1) for block in self.blocks])

    @cached_property
    def _measured_a(self) -> tuple[Tensor, Tensor]:
        grams, peaks = zip(*(rows.gram(fine=False) for rows in self._sides[0]), strict=True)
        return torch.cat(grams), torch.cat(peaks)

    @cached_property
    def _measured_b(self) -> tuple[Tensor, Tensor]:
        grams, peaks = zip(*(rows.gram(fine=False) for rows in self._sides[1]), strict=True)
        return torch.cat(grams), torch.cat(peaks)

    @property
    def _sides(self) -> tuple[list[UnitRows], list[UnitRows]]:
        return [block.a for block in self.blocks], [block.b for block in self.blocks]


def _peak_sign(x_LRD: Tensor) -> Tensor:
    return x_LRD.gather(2, x_LRD.abs().argmax(dim=2, keepdim=True)).squeeze(2).sign().double()


def pool_units(adapters: Sequence[LoraAdapter], terms: Sequence[Term], device: torch.device) -> list[Pool]:
    """Pool the units of `adapters`, weighted by `terms`, on `device`.

    An adapter that does not adapt a module, or has weight 0 there, contributes no units to it.

    Raises:
        RecipeError: where two adapters disagree about the shape of a module (they have different base models).
    """
    adapters = [adapter.to(device) for adapter in adapters]
    pools: dict[tuple[int, ...], list[UnitBlock]] = {}
    for group in _groups(tuple(_counted(adapter, term) for adapter, term in zip(adapters, terms, strict=True))):
        block = _block(group, adapters, terms)
        pools.setdefault(block.ranks, []).append(block)
    return [Pool(tuple(blocks)) for blocks in pools.values()]


@dataclass(frozen=True)
class _Group:
    """Modules that lie in the same stacks: for each adapter present its place, its stack, and their rows there (None: all)."""

    names: tuple[str, ...]
    members: tuple[tuple[int, int, tuple[int, ...] | None], ...]


def _counted(adapter: LoraAdapter, term: Term) -> tuple[tuple[str, ...], ...]:
    """The names of each stack's modules, with "" for those where the adapter has weight 0."""
    if not term.by_module:
        return tuple(stack.names for stack in adapter.stacks)
    return tuple(tuple(name if term.at(name) else "" for name in stack.names) for stack in adapter.stacks)


@lru_cache(maxsize=64)  # a server merges the same few layouts again and again, and this is most of a merge's work on the host
def _groups(names: tuple[tuple[tuple[str, ...], ...], ...]) -> tuple[_Group, ...]:
    places = [
        {name: (number, row) for number, stack in enumerate(stacks) for row, name in enumerate(stack) if name}
        for stacks in names
    ]
    by_stacks: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(set().union(*places)):
        by_stacks.setdefault(tuple(place[name][0] if name in place else -1 for place in places), []).append(name)
    groups = []
    for stacks, members in by_stacks.items():
        rows = [
            tuple(place[name][1] for name in members) if stack >= 0 else () for place, stack in zip(places, stacks, strict=True)
        ]
        present = [t for t, stack in enumerate(stacks) if stack >= 0]
        whole = {t: rows[t] == tuple(range(len(names[t][stacks[t]]))) for t in present}
        groups.append(_Group(tuple(members), tuple((t, stacks[t], None if whole[t] else rows[t]) for t in present)))
    return tuple(groups)


def _block(group: _Group, adapters: Sequence[LoraAdapter], terms: Sequence[Term]) -> UnitBlock:
    a, b, coefficients = [], [], []
    for place, number, rows in group.members:
        stack, term = adapters[place].stacks[number], terms[place]
        index = None if rows is None else list(rows)
        a.append(stack.a_LRI if index is None else stack.a_LRI[index])
        b.append(stack.b_LRO if index is None else stack.b_LRO[index])
        scaling_L = torch.tensor(stack.scalings if rows is None else [stack.scalings[row] for row in rows], dtype=torch.float64)
        weight_L = torch.tensor([term.at(name) for name in group.names], dtype=torch.float64) if term.by_module else term.weight
        coefficients.append(scaling_L * weight_L)
    shapes = {(b_LRO.shape[2], a_LRI.shape[2]) for a_LRI, b_LRO in zip(a, b, strict=True)}
    if len(shapes) > 1:
        raise RecipeError(
            f"adapters disagree about the shape of {group.names[0]}: {sorted(shapes)}; they have different base models",
            "adapters",
        )
    present = tuple(place for place, _, _ in group.members)
    return UnitBlock(group.names, present, rows_of(a), rows_of(b), torch.stack(coefficients, dim=1))
