"""An adapter's digest: everything that decides what it does, and nothing else."""

import torch
from reference.adapters import ONE, random_adapter

from merging import LoraAdapter, LoraModule

NAME = next(iter(ONE))


def one(a=None, b=None, scaling=2.0, name=NAME):
    base = random_adapter(1, 3, shapes=ONE).modules[NAME]
    return LoraAdapter({name: LoraModule(base.a if a is None else a, base.b if b is None else b, scaling)})


def nudged(tensor):
    """One entry changed by its last bit."""
    changed = tensor.clone()
    changed[-1, -1] = torch.nextafter(changed[-1, -1], torch.tensor(torch.inf))
    return changed


def test_equal_content_has_an_equal_digest():
    assert one().digest == one().digest
    assert len(one().digest) == 64


def test_the_base_model_and_the_order_of_the_modules_do_not_count():
    adapter = random_adapter(1, 3)
    backwards = LoraAdapter(dict(reversed(list(adapter.modules.items()))), base_model="other")
    assert backwards.digest == adapter.digest


def test_how_the_factors_lie_in_memory_does_not_count():
    module = one().modules[NAME]
    assert one(a=module.a.T.contiguous().T, b=module.b.T.contiguous().T).digest == one().digest


def test_a_transposed_column_can_be_digested():
    """torch calls (O, 1) with strides (1, O) contiguous, yet will not view it as bytes: rank 1, where B is kept as Bᵀ."""
    row_a, row_b = torch.randn(1, 12), torch.randn(1, 14)
    assert one(a=row_a, b=row_b.T).digest == one(a=row_a, b=row_b.reshape(14, 1)).digest


def test_every_part_of_the_content_counts():
    module = one().modules[NAME]
    changed = [
        one(),
        one(a=nudged(module.a)),
        one(b=nudged(module.b)),
        one(a=-module.a, b=-module.b),
        one(scaling=1.0),
        one(scaling=-2.0),
        one(name="model.layers.1.self_attn.q_proj"),
        one(a=module.a.half(), b=module.b.half()),
        one(a=module.a.bfloat16(), b=module.b.bfloat16()),
        one(a=module.a.flip(0), b=module.b.flip(1)),
        LoraAdapter({**one().modules, "other": module}),
    ]
    assert len({adapter.digest for adapter in changed}) == len(changed)


def test_the_same_bytes_in_another_shape_or_dtype_are_another_content():
    zeros = [
        one(a=torch.zeros(3, 4), b=torch.zeros(4, 3)),
        one(a=torch.zeros(4, 3), b=torch.zeros(3, 4)),
        one(a=torch.zeros(2, 6), b=torch.zeros(6, 2)),
        one(a=torch.zeros(3, 4, dtype=torch.float16), b=torch.zeros(4, 3, dtype=torch.float16)),
        one(a=torch.zeros(3, 4, dtype=torch.bfloat16), b=torch.zeros(4, 3, dtype=torch.bfloat16)),
    ]
    assert len({adapter.digest for adapter in zeros}) == len(zeros)


def test_factors_that_still_require_gradients_can_be_digested():
    module = one().modules[NAME]
    assert one(a=module.a.clone().requires_grad_()).digest == one().digest
