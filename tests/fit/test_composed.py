"""ComposedModel against dense merges: the same logits, the same gradients, and nothing left behind."""

import pytest
import torch
from reference.adapters import random_adapter
from reference.peft_model import logits, tiny_llama, with_deltas
from torch import nn
from torch.func import functional_call

from merging import AdapterError, LoraAdapter, LoraModule, Term
from merging.fit import ComposedModel, FitError

UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(24).reshape(2, 12) % 40


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(base):
    """Of other ranks, scalings and modules; `a` adapts the head too, and `b` has ranks of its own in each module."""
    shapes = {n: (m.out_features, m.in_features) for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    mixed = {name: 1 + place % 3 for place, name in enumerate(shapes)}
    return {
        "a": random_adapter(1, 4, alpha=2, shapes=shapes),
        "b": random_adapter(2, mixed, alpha=1, rslora=True, shapes=shapes, without=[UP, "lm_head"]),
        "c": random_adapter(3, 2, alpha=1, shapes=shapes, without=[name for name in shapes if "q_proj" not in name]),
    }


def dense(adapters, terms):
    """ΔW of every module, float64."""
    deltas = {}
    for term in terms:
        for name, part in adapters[term.adapter].modules.items():
            deltas[name] = deltas.get(name, 0) + term.at(name) * part.delta()
    return deltas


@pytest.mark.parametrize(
    "terms",
    [
        [Term("a"), Term("b"), Term("c")],
        [Term("a", 0.7), Term.of("b", {"*.q_proj": -0.4, "*": 0.3}), Term("c", 0)],
        [Term.of("a", {"model.layers.1.*": 0, "lm_head": 2}), Term("c", -1)],
    ],
)
def test_logits_are_those_of_the_dense_merge(base, adapters, terms):
    with ComposedModel(base, adapters) as composed:
        composed.weigh_terms(terms)
        found = logits(base)
    wanted = logits(with_deltas(base, dense(adapters, terms)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - logits(base)).abs().max() > 0.1


def test_layers_of_bfloat16_keep_the_weights_in_float32(base, adapters):
    half = tiny_llama().bfloat16()
    with ComposedModel(half, adapters) as composed:
        alpha = torch.full((3, len(composed.modules)), 1.001, requires_grad=True)
        composed.weigh(alpha)
        out = half(input_ids=TOKENS).logits
        out.sum().backward()
    assert (out.dtype, alpha.grad.dtype) == (torch.bfloat16, torch.float32)
    wanted = logits(with_deltas(base, dense(adapters, [Term("a"), Term("b"), Term("c")])))
    assert torch.linalg.norm(out.float() - wanted) < 0.05 * torch.linalg.norm(wanted)


def composed_loss(model, adapters, alpha, checkpointing=False):
    with ComposedModel(model, adapters, checkpointing=checkpointing) as composed:
        composed.weigh(alpha)
        loss = model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[..., 3].mean()
        return loss, torch.autograd.grad(loss, alpha)[0]


def test_gradients_are_those_through_the_dense_weights(base, adapters):
    model = tiny_llama().double()
    modules = ComposedModel(model, adapters).modules
    alpha = torch.randn(3, len(modules), generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss, found = composed_loss(model, adapters, alpha)

    weights = dict(model.named_parameters())
    for place, module in enumerate(modules):
        parts = [adapter.modules.get(module) for adapter in adapters.values()]
        delta = sum(alpha[t, place] * part.delta() for t, part in enumerate(parts) if part is not None)
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + delta
    out = functional_call(model, weights, kwargs={"input_ids": TOKENS, "use_cache": False}, tie_weights=False).logits
    wanted = out.log_softmax(-1)[..., 3].mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, alpha)[0])
    assert found.abs().max() > 1e-3


def test_gradients_are_finite_differences(base, adapters):
    model = tiny_llama().double()
    modules = ComposedModel(model, adapters).modules
    alpha = torch.ones(3, len(modules), dtype=torch.float64, requires_grad=True)
    _, found = composed_loss(model, adapters, alpha)
    for t, place in ((0, 0), (1, 5), (2, modules.index("model.layers.1.self_attn.q_proj"))):
        around = []
        for step in (1e-3, -1e-3):
            moved = alpha.detach().clone()
            moved[t, place] += step
            around.append(composed_loss(model, adapters, moved.requires_grad_(True))[0].item())
        assert found[t, place].item() == pytest.approx((around[0] - around[1]) / 2e-3, rel=5e-3)  # norms are float32 in Llama


def test_an_absent_module_has_no_part(base, adapters):
    composed = ComposedModel(base, adapters)
    alpha = torch.ones(3, len(composed.modules), requires_grad=True)
    _, gradient = composed_loss(base, adapters, alpha)
    assert (gradient[~composed.present_TM] == 0).all()
    assert (gradient[composed.present_TM] != 0).all()
    assert composed.present_TM.sum(dim=1).tolist() == [len(adapter.modules) for adapter in adapters.values()]


def test_checkpointing_gives_the_same_gradients_and_keeps_less(base, adapters):
    alpha = torch.ones(3, len(ComposedModel(base, adapters).modules), requires_grad=True)
    kept = {}
    found = {}
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            found[checkpointing] = composed_loss(base, adapters, alpha, checkpointing)
        kept[checkpointing] = sum(sizes)
    torch.testing.assert_close(found[True], found[False])
    assert kept[True] < kept[False] / 2


def state_of(model):
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        model.is_gradient_checkpointing,
        logits(model).tolist(),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(adapters, checkpointing, fails):
    model = tiny_llama()
    model.model.layers[0].mlp.train()
    model.model.layers[1].requires_grad_(False)
    before = state_of(model)

    def use():
        with ComposedModel(model, adapters, checkpointing=checkpointing) as composed:
            composed.weigh_terms([Term("a")])
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(module.training for module in model.modules() if isinstance(module, nn.Linear))
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert state_of(model) == before


def part(d_out, d_in):
    return LoraModule(torch.ones(2, d_in), torch.ones(d_out, 2))


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({"model.layers.7.mlp.up_proj": part(24, 16)}, r"'bad': this model has no module model\.layers\.7\.mlp\.up_proj"),
        ({UP: part(24, 17)}, rf"'bad': {UP} is \(24, 17\), but \(24, 16\) in this model; it was trained on other"),
        ({"model.embed_tokens": part(40, 16)}, r"'bad': model\.embed_tokens is Embedding .* only linear layers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_with_the_module(base, adapters, modules, says):
    with pytest.raises(AdapterError, match=says):
        ComposedModel(base, {**adapters, "bad": LoraAdapter(modules, "other")})


def test_a_model_that_cannot_checkpoint_is_named():
    layer = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FitError, match="Sequential has no gradient checkpointing; go without"):
        ComposedModel(layer, {"a": LoraAdapter({"0": part(4, 4)})}, checkpointing=True)
