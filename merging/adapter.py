"""A LoRA adapter in memory: per module a pair of factors and a scaling.

Factors of equal shape lie stacked in one tensor, so that moving or merging an adapter takes a few operations
rather than two a module. This module knows nothing of files (see peft_folder.py) and nothing of merging.

Shape suffixes: L  modules of the stack   R  rank   I  inputs (d_in)   O  outputs (d_out)
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}  # what numpy, which has no bfloat16, takes entries of so many bytes for

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The factors of one module: ΔW = scaling · B A.

    Attributes:
        a: (rank, d_in), bfloat16, float16 or float32.
        b: (d_out, rank), the same dtype.
        scaling: alpha / rank, or alpha / √rank for rsLoRA; 1 where it is folded into the factors.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight that the module adapts."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """The dense ΔW, (d_out, d_in), float64 on the factors' device; for tests and reports."""
        return self.scaling * (self.b.double() @ self.a.double())


@dataclass(frozen=True, slots=True)
class Stack:
    """Modules of one shape, rank and dtype, stacked in the order of `names`; units are rows on both sides."""

    names: tuple[str, ...]
    a_LRI: Tensor
    b_LRO: Tensor
    scalings: tuple[float, ...]

    def to(self, device: torch.device | str) -> "Stack":
        return Stack(self.names, self.a_LRI.to(device), self.b_LRO.to(device), self.scalings)


class StackedModules(Mapping[str, LoraModule]):
    """The modules of some stacks, by name in sorted order; each is made when it is asked for."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = tuple(stacks)

    @cached_property
    def _places(self) -> dict[str, tuple[Stack, int]]:
        places = {name: (stack, row) for stack in self.stacks for row, name in enumerate(stack.names)}
        return {name: places[name] for name in sorted(places)}

    def __getitem__(self, name: str) -> LoraModule:
        stack, row = self._places[name]
        return LoraModule(stack.a_LRI[row], stack.b_LRO[row].mT, stack.scalings[row])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A checked adapter.

    Attributes:
        modules: factors by module name as the base model has it (`model.layers.0.self_attn.q_proj`).
        base_model: the name of the base model that the adapter says it was trained on, if it says.
    """

    modules: Mapping[str, LoraModule]
    base_model: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(stack.a_LRI.shape[1] for stack in self.stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(stack.a_LRI.nbytes + stack.b_LRO.nbytes for stack in self.stacks)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The modules, stacked by shape, rank and dtype; a copy, unless they lie stacked already."""
        return self.modules.stacks if isinstance(self.modules, StackedModules) else _stacked(self.modules)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides what the adapter does: names, shapes, dtypes, scalings, factors."""
        state = hashlib.sha256()
        for name in sorted(self.modules):
            module = self.modules[name]
            state.update(f"{name} {module.a.dtype} {module.shape} {module.rank} {module.scaling!r}\n".encode())
            for factor in (module.a, module.b):
                state.update(factor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return state.hexdigest()

    def to(self, device: torch.device | str) -> "LoraAdapter":
        """The same adapter on `device`, its modules stacked; the digest goes along if it is known."""
        if isinstance(self.modules, StackedModules) and all(s.a_LRI.device == torch.device(device) for s in self.stacks):
            return self
        moved = LoraAdapter(StackedModules([stack.to(device) for stack in self.stacks]), self.base_model)
        if "digest" in self.__dict__:
            moved.__dict__["digest"] = self.digest
        return moved


def bits(tensor: Tensor) -> np.ndarray:
    """The entries of a tensor on the CPU as signed integers, where they lie.

    Adapters are looked through and copied in hundreds of small pieces. torch would share each out among all cores and wait for
    the slowest; on cores that are busy serving that takes a thousand times as long as numpy on one core.
    """
    return tensor.detach().view(_BITS[tensor.itemsize]).numpy()


def _stacked(modules: Mapping[str, LoraModule]) -> tuple[Stack, ...]:
    groups: dict[tuple[tuple[int, int], int, torch.dtype], list[str]] = {}
    for name in sorted(modules):
        groups.setdefault((modules[name].shape, modules[name].rank, modules[name].a.dtype), []).append(name)
    return tuple(
        Stack(
            tuple(names),
            _stack([modules[name].a for name in names]),
            _stack([modules[name].b.mT for name in names]),
            tuple(modules[name].scaling for name in names),
        )
        for names in groups.values()
    )


def _stack(factors: Sequence[Tensor]) -> Tensor:
    if factors[0].device.type != "cpu":
        return torch.stack(list(factors))
    stack = torch.empty(len(factors), *factors[0].shape, dtype=factors[0].dtype)
    np.stack([bits(factor) for factor in factors], out=bits(stack))
    return stack
