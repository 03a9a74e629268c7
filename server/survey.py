"""What the server has to know of an adapter: all of it is read and checked once, and only this is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from merging import AdapterError, LoraModule
from merging.adapter import bits
from merging.peft_folder import CONFIG, WEIGHTS, read_adapter

LARGEST_ENTRY = 1000.0
"""Of ΔW. Trained ones stay below 1, and up to here no weights that are allowed make float32 or bfloat16 overflow.

An overflow would not stay with whoever asked for it: vLLM's attention on the CPU (0.32) reads blocks of the key-value cache to
their end, so that one that has held NaN gives NaN to whoever gets it next.
"""


@dataclass(frozen=True)
class Survey:
    """A checked adapter without its factors.

    Attributes:
        digest: of its content. nbytes: of its factors.
        base_model: the name of the base model that it says it was trained on, if it says.
        ranks: by module. shapes: (d_out, d_in) by module.
    """

    digest: str
    nbytes: int
    base_model: str | None
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


def survey(folder: Path) -> Survey:
    """Check the PEFT folder, whole. `loramix serve` asks before the model is loaded and again once it is; it is read once.

    Raises:
        AdapterError: see read_adapter; where ΔW is so large that the model would overflow.
    """
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError):  # reading it says what is wrong
        return survey_anew(folder)
    return _survey(folder, tuple((file.st_mtime_ns, file.st_size) for file in stats))


def survey_anew(folder: Path) -> Survey:
    """As `survey`, of what lies there now: times of files can be set back.

    Raises:
        AdapterError: see survey.
    """
    return _survey.__wrapped__(folder, ())


@cache
def _survey(folder: Path, _files: tuple[tuple[int, int], ...]) -> Survey:
    adapter = read_adapter(folder)
    modules = adapter.modules
    for name, module in modules.items():
        if (bound := _largest_entry(module)) > LARGEST_ENTRY:
            raise AdapterError(
                f"adapter {folder}: ΔW of {name} may have entries of up to {bound:.4g}, over {LARGEST_ENTRY:g}, with which the "
                "model would overflow; train or export the adapter again"
            )
    return Survey(
        adapter.digest,
        sum(module.a.nbytes + module.b.nbytes for module in modules.values()),
        adapter.base_model,
        {name: module.rank for name, module in modules.items()},
        {name: module.shape for name, module in modules.items()},
    )


def _largest_entry(module: LoraModule) -> float:
    """No entry of ΔW is larger: a bound that takes one look at each factor."""
    return abs(module.scaling) * module.rank * _largest(module.a) * _largest(module.b)


def _largest(factor: Tensor) -> float:
    """The largest absolute value: finite numbers without their sign are in the order of their bits."""
    own = bits(factor)
    largest = np.bitwise_and(own, np.iinfo(own.dtype).max).max()
    return float(torch.from_numpy(np.array(largest)).view(factor.dtype))
