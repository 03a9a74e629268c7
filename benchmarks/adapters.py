"""Random adapters to measure with."""

import itertools

import torch

from merging import LoraAdapter, LoraModule
from server.shapes import ModelShape


def random_adapter(shape: ModelShape, rank: int, seed: int, device: torch.device, scaling: float = 1.0) -> LoraAdapter:
    """An adapter on all linear layers in bfloat16, small enough to leave a real model able to speak."""
    generator = torch.Generator(device).manual_seed(seed)
    modules = {}
    for layer, (name, (d_out, d_in)) in itertools.product(range(shape.layers), shape.linears.items()):
        a = torch.randn(rank, d_in, generator=generator, device=device).bfloat16() * d_in**-0.5
        b = torch.randn(d_out, rank, generator=generator, device=device).bfloat16() * 0.02
        modules[f"model.layers.{layer}.{name}"] = LoraModule(a, b, scaling)
    return LoraAdapter(modules)
