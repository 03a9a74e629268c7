"""A model that stands still while weights beside it are learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def frozen(model: Any, checkpointing: bool) -> Iterator[None]:
    """No parameter takes gradients and no module drops anything out, until the block ends; then all is as before.

    Args:
        model: a module; with `checkpointing`, one of transformers.
        checkpointing: keep the inputs of the layers only, and compute the rest again going backward.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = {module: module.training for module in model.modules()}
    switched = checkpointing and not model.is_gradient_checkpointing
    try:
        model.requires_grad_(False).eval()
        if switched:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if checkpointing:
            _train_checkpointed(model)
        yield
    finally:
        if switched:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # switched on with it
        for module, was in training.items():
            module.training = was
        for parameter in learning:
            parameter.requires_grad_(True)


def _train_checkpointed(model: nn.Module) -> None:
    """transformers checkpoints layers in training mode only; the modules inside them, which drop out, stay in eval mode."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
