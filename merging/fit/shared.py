"""Weights that modules share: what is learned, and the terms of a recipe that say the same.

Shape suffixes: T  adapters   M  modules   G  groups of modules that share a weight
"""

import re

import torch
from torch import Tensor

from merging.fit.composed import ComposedModel
from merging.fit.options import FitOptions, Share
from merging.term import REST, WEIGHT_DECIMALS, Term

_LAYER = re.compile(r"(.*?\.\d+)\.")


class SharedWeights:
    """The weights of a composed model, as far as they are learned apart.

    Attributes:
        value_TG: float32, with gradients: the weights, or with mode "softmax" their logits.
    """

    def __init__(self, composed: ComposedModel, options: FitOptions) -> None:
        """Weights at their start, on the model's device."""
        self._composed = composed
        self._softmax = options.mode == "softmax"
        patterns = [_pattern(module, options.share) for module in composed.modules]
        self._groups = list(dict.fromkeys(patterns))
        device = composed.device
        spread_GM = [[float(group == pattern) for pattern in patterns] for group in self._groups]
        self._spread_GM = torch.tensor(spread_GM, device=device)
        start = 0.0 if self._softmax else 1.0 if options.start is None else options.start
        self.value_TG = torch.full((len(composed.adapters), len(self._groups)), float(start), device=device, requires_grad=True)

    def alpha_TM(self) -> Tensor:
        """The weights of all modules, with gradients."""
        # A product with ones and zeros: gradients of picked columns would be summed in no certain order on a GPU.
        return self._alpha_TG() @ self._spread_GM

    @torch.no_grad()
    def terms(self) -> tuple[Term, ...]:
        """The weights, rounded as a recipe rounds them. Raises RecipeError where one is not finite, or beyond any use."""
        present_TG = (self._composed.present_TM.float() @ self._spread_GM.mT.cpu()).tolist()
        terms = []
        for name, alpha_G, present_G in zip(self._composed.adapters, self._alpha_TG().tolist(), present_TG, strict=True):
            weights = {group: alpha for group, alpha, there in zip(self._groups, alpha_G, present_G, strict=True) if there}
            alike = {round(weight, WEIGHT_DECIMALS) for weight in weights.values()}
            terms.append(Term.of(name, alike.pop() if len(alike) == 1 else weights).canonical())
        return tuple(terms)

    def _alpha_TG(self) -> Tensor:
        return self.value_TG.softmax(dim=0) if self._softmax else self.value_TG


def _pattern(module: str, share: Share) -> str:
    """The pattern of the modules that share the weight of this one, shell style as in Term."""
    layer = _LAYER.match(module)
    if share == "adapter":
        return REST
    return f"{layer[1]}.*" if share == "layer" and layer else module
