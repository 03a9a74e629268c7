"""The unit pool: all adapters of a merge, as units, for modules that the same adapters adapt in the same ranks.

A unit is row i of A with column i of B (LoRA-LEGO's minimal semantic unit): ΔW of a module is the sum of its
units' outer products, each times its coefficient (weight · scaling). Every large step is one batched operation for all
modules of one shape (on a GPU, for all modules), and the small N × N problems of all modules are solved in one batch.

Shape suffixes, here and in all of merging:
    L  modules of the pool (layers, mostly)   I  inputs (d_in)     K  merged units
    N  units of a module, all adapters        O  outputs (d_out)   R  units of one adapter
    T  adapters present                       D  I or O
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from merging.adapter import LoraAdapter
from merging.layout import PoolLayout, lay_out
from merging.room import Target
from merging.sides import Rows, Side, TorchSide
from merging.term import Term


@dataclass(frozen=True)
class Pool:
    """The units of some modules, and what methods may know of them.

    Attributes:
        modules: L names.
        adapters: places of the T adapters in the merge's order; ranks: of each, their sum is N.
        coefficient_LT: weight · scaling of each adapter in each module; float64 on the factors' device.
        a: the rows of the A factors; b: the columns of the B factors, as rows.
    """

    modules: tuple[str, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    coefficient_LT: Tensor
    a: Side
    b: Side

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
        return self.coefficient_LT.index_select(1, owner_of_unit(self.ranks, self.coefficient_LT.device))

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
        if self.coefficient_LT.is_cuda:
            return self.gram_a_LNN, self.gram_b_LNN, torch.finfo(torch.float32).eps
        return self.a.gram(fine=True)[0], self.b.gram(fine=True)[0], torch.finfo(torch.float64).eps

    @cached_property
    def sign_a_LN(self) -> Tensor:
        """The sign of the entry of largest magnitude in each row of A (the first of them); float64, 0 for a row of zeros."""
        return self.a.peak_sign()

    @cached_property
    def _measured_a(self) -> tuple[Tensor, Tensor]:
        return self.a.gram(fine=False)

    @cached_property
    def _measured_b(self) -> tuple[Tensor, Tensor]:
        return self.b.gram(fine=False)


@cache  # a constant: a CUDA graph reads it where it lies
def owner_of_unit(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) int32: the adapter of each unit."""
    return torch.repeat_interleave(torch.tensor(ranks)).int().to(device)


def pool_units(adapters: Sequence[LoraAdapter], terms: Sequence[Term], device: torch.device) -> list[Pool]:
    """Pool the units of `adapters`, weighted by `terms`, on `device`.

    An adapter that does not adapt a module, or has weight 0 there, contributes no units to it.

    Raises:
        RecipeError: where two adapters disagree about the shape of a module (they have different base models).
    """
    adapters = brought(adapters, device)
    return [pool_of(layout, adapters, terms) for layout in lay_out(adapters, terms, device)]


def brought(adapters: Sequence[LoraAdapter], device: torch.device) -> list[LoraAdapter]:
    """The adapters on the device, as what merges there wants them; those that are so already as they are."""
    adapters = [adapter.to(device) for adapter in adapters]
    if device.type == "cuda":
        from merging.cuda_tables import uniform  # Triton is there with CUDA only

        return uniform(adapters)
    return adapters


def pool_of(
    layout: PoolLayout,
    adapters: Sequence[LoraAdapter],
    terms: Sequence[Term],
    targets: tuple[Target | None, Target | None] = (None, None),
) -> Pool:
    """One pool of a merge, where its adapters are, with room for the merged A and B if anything is to be written."""
    device = adapters[0].stacks[0].a_LRI.device
    if device.type == "cuda":
        from merging.cuda_plan import pool_on_gpu  # Triton is there with CUDA only

        return pool_on_gpu(layout, adapters, terms)
    a_parts, b_parts = [], []
    for block in layout.blocks:
        stacks = [(adapters[m.place].stacks[m.stack], m.rows) for m in block.members]
        a_parts.append(tuple(Rows(stack.a_LRI, rows) for stack, rows in stacks))
        b_parts.append(tuple(Rows(stack.b_LRO, rows) for stack, rows in stacks))
    columns = [scalings(layout, adapters[p], t) * weights(layout, terms[p]) for t, p in enumerate(layout.adapters)]
    coefficient_LT = torch.from_numpy(np.stack(columns, axis=1))
    sides = [TorchSide(tuple(parts), target) for parts, target in zip((a_parts, b_parts), targets, strict=True)]
    return Pool(layout.modules, layout.adapters, layout.ranks, coefficient_LT, *sides)


def scalings(layout: PoolLayout, adapter: LoraAdapter, t: int) -> np.ndarray:
    """(L,) float64: the scaling of the layout's adapter number `t` in each module."""
    stacks = [(adapter.stacks[block.members[t].stack], block.members[t].rows) for block in layout.blocks]
    return np.array([stack.scalings[row] for stack, rows in stacks for row in rows])


def weights(layout: PoolLayout, term: Term) -> np.ndarray | float:
    """(L,) float64: a term's weight in each module; one number where it is the same in all."""
    return np.array([term.at(name) for name in layout.modules]) if term.by_module else term.weight
