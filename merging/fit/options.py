"""How weights are learned."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from merging.errors import nearest
from merging.fit.errors import FitError
from merging.fit.loss import Loss

Mode = Literal["free", "softmax"]
Share = Literal["module", "layer", "adapter"]


@dataclass(frozen=True)
class FitOptions:
    """How weights are learned; checks itself.

    Attributes:
        mode: "free" learns each weight as it is; "softmax" learns logits, and the weights of all adapters sum to 1 wherever
            any of them adapts. An adapter without a module is a zero ΔW there, and keeps its part of that sum.
        share: one weight of an adapter for each "module", each "layer", or one for the whole "adapter".
        start: where free weights start, 1 unless given. Softmax starts uniform, at one over the number of adapters.
        lr: of Adam, decayed to zero in a straight line. epochs: at most. batch: rows a step.
        loss: on the tokens of the "answer", or of "all".
        seed: of the order of the rows.
        patience: epochs without a lower held-out loss after which learning stops.
        checkpointing: keep only each layer's input and compute the rest again going backward: less memory, more time.
    """

    mode: Mode = "free"
    share: Share = "module"
    start: float | None = None
    lr: float = 0.05
    epochs: int = 5
    batch: int = 8
    loss: Loss = "answer"
    seed: int = 0
    patience: int = 2
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("share", Share), ("loss", Loss)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise FitError(f"unknown {name} {value!r}{nearest(str(value), known)}")
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise FitError(f"{name} {getattr(self, name)}; use 1 or more")
        if not 0 <= self.lr < math.inf:
            raise FitError(f"lr {self.lr}; use 0.01 to 0.1, say")
        if self.start is not None and self.mode == "softmax":
            raise FitError(f"start {self.start} with mode softmax, which starts uniform; leave it out")
