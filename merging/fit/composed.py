"""A model with adapters beside its weights, each module's products kept apart from each other until they are weighted.

Shape suffixes: T  adapters   M  modules that any of them adapts   N  units of a module   I  inputs   O  outputs
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from merging.adapter import LoraAdapter, LoraModule
from merging.errors import AdapterError
from merging.fit.errors import FitError
from merging.fit.frozen import frozen
from merging.term import Term


class ComposedModel:
    """y = W x + Σ_t α_t c_t B_t A_t x in every linear layer that any adapter adapts; no dense ΔW is formed.

    A context manager: hooks are on the model inside the `with` block only, its parameters are frozen there and its modules
    in eval mode, and it is left as it was. A module costs two products for all adapters together: the A_t lie
    under one another, the N-wide activation is scaled by α c, the B_t lie side by side.

    Attributes:
        model: the model itself.
        adapters: T names, in the order given.
        modules: M names, in the model's order.
        present_TM: bool, which adapters adapt which modules.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraAdapter], *, checkpointing: bool = False) -> None:
        """Check that the adapters fit the model. Factors are brought to the device and dtype of each layer's weight.

        Args:
            model: a model of transformers, where checkpointing is asked for; any module otherwise.
            checkpointing: turn on the gradient checkpointing of transformers inside the `with` block.

        Raises:
            AdapterError: naming the adapter and the module that the model lacks, or has in another shape or kind.
            FitError: where the model cannot checkpoint.
        """
        if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
            raise FitError(f"{type(model).__name__} has no gradient checkpointing; go without")
        for name, adapter in adapters.items():
            _check(model, name, adapter)
        targets = set().union(*(adapter.modules for adapter in adapters.values()))
        self.model = model
        self.adapters = tuple(adapters)
        self.modules = tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name in targets)
        self.present_TM = torch.tensor([[name in adapter.modules for name in self.modules] for adapter in adapters.values()])
        self._checkpointing = checkpointing
        self._layers = [
            _Layer(model.get_submodule(name), [adapter.modules.get(name) for adapter in adapters.values()])
            for name in self.modules
        ]
        self._alikes = _alikes(self._layers)
        self._undo = ExitStack()

    @property
    def device(self) -> torch.device:
        """Where the first of the layers lies."""
        return self._layers[0].a_NI.device

    def weigh(self, alpha_TM: Tensor) -> None:
        """Set the weights, floats on any device; gradients reach them through every forward pass until they are set again."""
        for places, owner_TN in self._alikes:
            layers = [self._layers[place] for place in places]
            alpha_LN = alpha_TM[:, places].mT @ owner_TN.to(alpha_TM)
            for layer, alpha_N in zip(layers, alpha_LN.to(layers[0].a_NI.device).unbind(), strict=True):
                layer.alpha_N = alpha_N

    def weigh_terms(self, terms: Sequence[Term]) -> None:
        """Set the weights from terms; an adapter that none names has weight 0."""
        by_name = {term.adapter: term for term in terms}
        rows = [[by_name[t].at(m) if t in by_name else 0.0 for m in self.modules] for t in self.adapters]
        self.weigh(torch.tensor(rows))

    def __enter__(self) -> "ComposedModel":
        with ExitStack() as undo:
            undo.enter_context(frozen(self.model, self._checkpointing))
            for layer in self._layers:
                undo.callback(layer.module.register_forward_hook(layer).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()


class _Layer:
    """The hook of one linear layer: adds the weighted products of all adapters to its output.

    Attributes:
        scaling_T: c_t and rank_T: r_t of each adapter, 0 where it does not adapt the layer.
        alpha_N: α c of each unit.
    """

    alpha_N: Tensor

    def __init__(self, module: nn.Module, parts: Sequence[LoraModule | None]) -> None:
        assert isinstance(module, nn.Linear)
        self.module = module
        self.scaling_T = tuple(part.scaling if part else 0.0 for part in parts)
        self.rank_T = tuple(part.rank if part else 0 for part in parts)
        self.a_NI = torch.cat([part.a for part in parts if part]).to(module.weight)
        self.b_ON = torch.cat([part.b for part in parts if part], dim=1).to(module.weight)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # Weights are float32 beside bfloat16 activations: what is N wide is scaled in float32, and its gradient summed so.
        hidden_N = (linear(inputs[0], self.a_NI) * self.alpha_N).to(output.dtype)
        return output + linear(hidden_N, self.b_ON)


def _alikes(layers: Sequence[_Layer]) -> list[tuple[list[int], Tensor]]:
    """Places of the layers whose units have the same owners and scalings, each with those as (T, N) float64."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        groups.setdefault((layer.rank_T, layer.scaling_T, layer.a_NI.device), []).append(place)
    alikes = []
    for (rank_T, scaling_T, device), places in groups.items():
        rows = [torch.full((1, rank), scaling, dtype=torch.float64) for rank, scaling in zip(rank_T, scaling_T, strict=True)]
        alikes.append((places, torch.block_diag(*rows).to(device)))  # type: ignore[no-untyped-call]
    return alikes


def _check(model: nn.Module, name: str, adapter: LoraAdapter) -> None:
    """Raise AdapterError unless every module of the adapter is a linear layer of the model, of the same shape."""
    trained_on = adapter.base_model or "another base model"
    for path, part in adapter.modules.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(f"adapter {name!r}: this model has no module {path}; it was trained on {trained_on}") from None
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise AdapterError(f"adapter {name!r}: {path} is {kind} in this model; only linear layers are supported")
        if part.shape != (module.out_features, module.in_features):
            shape = (module.out_features, module.in_features)
            raise AdapterError(
                f"adapter {name!r}: {path} is {part.shape}, but {shape} in this model; it was trained on {trained_on}"
            )
