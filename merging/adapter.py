"""A LoRA adapter in memory: per module a pair of factors and a scaling.

This module knows nothing of files (see peft_folder.py) and nothing of merging.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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


@dataclass(frozen=True)
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
        return max(module.rank for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides what the adapter does: names, shapes, dtypes, scalings, factors."""
        state = hashlib.sha256()
        for name in sorted(self.modules):
            module = self.modules[name]
            state.update(f"{name} {module.a.dtype} {module.shape} {module.rank} {module.scaling!r}\n".encode())
            for factor in (module.a, module.b):
                state.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return state.hexdigest()
