"""The unit pool: all adapters of a merge, as units stacked by module shape.

A unit is row i of A with column i of B (LoRA-LEGO's minimal semantic unit): ΔW of a module is the sum of its
units' outer products, each times its coefficient (weight · scaling). Modules whose shapes and adapters' ranks
agree form one block, so that every later step is one batched operation a block.

Shape suffixes, here and in all of merging:
    L  modules of the block (layers, mostly)    I  inputs (d_in)     K  merged units
    N  units of a module, all adapters          O  outputs (d_out)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merging.adapter import LoraAdapter
from merging.errors import RecipeError


@dataclass(frozen=True)
class UnitBlock:
    """Modules of one shape with the units of every adapter that adapts them.

    Attributes:
        modules: L names.
        ranks: rank of each adapter present, in the merge's order; their sum is N.
        a_LNI, b_LON: the factors as stored, in the adapters' dtype.
        coefficient_LN: weight · scaling of each unit, float64 on the CPU.
    """

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    a_LNI: Tensor
    b_LON: Tensor
    coefficient_LN: Tensor

    @property
    def units(self) -> int:
        return self.a_LNI.shape[1]

    @cached_property
    def gram_a_LNN(self) -> Tensor:
        """A Aᵀ of the raw units, accumulated in float32, as float64."""
        a_LNI = self.a_LNI.float()
        return (a_LNI @ a_LNI.mT).double()

    @cached_property
    def gram_b_LNN(self) -> Tensor:
        """Bᵀ B of the raw units, accumulated in float32, as float64."""
        b_LON = self.b_LON.float()
        return (b_LON.mT @ b_LON).double()

    @cached_property
    def peak_a_LN(self) -> Tensor:
        """The entry of largest magnitude in each row of A, with its sign; float64."""
        index = self.a_LNI.abs().argmax(dim=2, keepdim=True)
        return self.a_LNI.gather(2, index).squeeze(2).double()

    @cached_property
    def peak_b_LN(self) -> Tensor:
        """The largest magnitude in each column of B; float64."""
        return self.b_LON.abs().amax(dim=1).double()

    @cached_property
    def coefficients(self) -> Tensor:
        """coefficient_LN on the factors' device."""
        return self.coefficient_LN.to(self.a_LNI.device)


def stack_units(adapters: Sequence[LoraAdapter], weights: Sequence[float], device: torch.device) -> list[UnitBlock]:
    """Stack the units of `adapters` on `device`, one block for each set of modules that agree in shape and ranks.

    An adapter that does not adapt a module contributes no units to it: its ΔW there is zero.

    Raises:
        RecipeError: where two adapters disagree about the shape of a module (they have different base models).
    """
    groups: dict[tuple[tuple[int, int], tuple[int, ...]], list[str]] = {}
    for name in sorted(set().union(*(adapter.modules for adapter in adapters))):
        present = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        shapes = {module.shape for module in present}
        if len(shapes) > 1:
            raise RecipeError(
                f"adapters disagree about the shape of {name}: {sorted(shapes)}; they have different base models", "adapters"
            )
        ranks = tuple(a.modules[name].rank if name in a.modules else 0 for a in adapters)
        groups.setdefault((shapes.pop(), ranks), []).append(name)
    return [_stack(names, ranks, adapters, weights, device) for (_, ranks), names in groups.items()]


def _stack(
    names: Sequence[str], ranks: Sequence[int], adapters: Sequence[LoraAdapter], weights: Sequence[float], device: torch.device
) -> UnitBlock:
    present = [(adapter, weight) for adapter, weight, rank in zip(adapters, weights, ranks, strict=True) if rank]
    dtypes = {adapter.modules[name].a.dtype for adapter, _ in present for name in names}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    a_LNI = torch.cat([torch.stack([a.modules[n].a.to(device, dtype) for n in names]) for a, _ in present], dim=1)
    b_LON = torch.cat([torch.stack([a.modules[n].b.to(device, dtype) for n in names]) for a, _ in present], dim=2)
    coefficient_LN = torch.tensor(
        [[w * a.modules[n].scaling for a, w in present for _ in range(a.modules[n].rank)] for n in names], dtype=torch.float64
    )
    return UnitBlock(tuple(names), tuple(rank for rank in ranks if rank), a_LNI, b_LON, coefficient_LN)
