"""Learning weights: the toy's right ones are found, and nothing worse than uniform weights is kept."""

import math

import pytest
import torch
from reference.peft_model import logits, with_deltas

from merging import LoraAdapter, LoraModule, Term
from merging.fit import FitError, FitOptions, Rows, fit, held_out_loss

ENOUGH = {"lr": 0.05, "epochs": 10, "patience": 4, "batch": 16}
CASES = {
    "one for the adapter": ({"share": "adapter"}, 0.05),
    "one a layer": ({"share": "layer"}, 0.1),
    "softmax": ({"share": "adapter", "mode": "softmax", "lr": 0.2}, 0.1),
    "softmax, one a layer": ({"share": "layer", "mode": "softmax", "lr": 0.2}, 0.15),
    "from one half": ({"share": "adapter", "start": 0.5}, 0.05),
}


def mean(term, adapter):
    return sum(term.at(module) for module in adapter.modules) / len(adapter.modules)


@pytest.fixture(scope="module")
def parts(toy):
    return toy.rows.split(0.25, seed=0)


@pytest.mark.parametrize("case", CASES)
def test_the_good_adapter_is_kept_and_the_bad_one_left_out(toy, parts, case):
    settings, tolerance = CASES[case]
    found = fit(toy.model, toy.adapters, *parts, FitOptions(**{**ENOUGH, **settings}))
    good, bad = found.terms
    for module in toy.adapters["good"].modules:
        assert good.at(module) == pytest.approx(1, abs=tolerance)
        assert bad.at(module) == pytest.approx(0, abs=tolerance)
    right = held_out_loss(toy.model, toy.adapters, [Term("good")], parts[1])
    assert found.improved
    assert found.loss_after == pytest.approx(right, abs=0.01)
    assert found.loss_before > right + 0.1


def test_weights_of_single_modules_are_found_within_their_noise(toy, parts):
    found = fit(toy.model, toy.adapters, *parts, FitOptions(**ENOUGH))
    good, bad = found.terms
    assert mean(good, toy.adapters["good"]) == pytest.approx(1, abs=0.05)
    assert mean(bad, toy.adapters["bad"]) == pytest.approx(0, abs=0.1)
    assert len(good.by_module) == len(toy.adapters["good"].modules)
    assert found.loss_after < held_out_loss(toy.model, toy.adapters, [Term("good")], parts[1]) + 0.01


def test_the_losses_are_those_of_the_terms_and_of_the_better_uniform_weights(toy, parts):
    train, held_out = parts
    found = fit(toy.model, toy.adapters, train, held_out, FitOptions(epochs=1))
    uniform = {
        w: held_out_loss(toy.model, toy.adapters, [Term(name, w) for name in toy.adapters], held_out) for w in (1.0, 0.5)
    }
    assert found.loss_before == pytest.approx(min(uniform.values()), abs=1e-5)
    assert uniform[found.uniform] == min(uniform.values())
    assert found.loss_after == pytest.approx(held_out_loss(toy.model, toy.adapters, found.terms, held_out), abs=1e-5)
    assert all(term == term.canonical() for term in found.terms)


@pytest.mark.parametrize("mode", ["free", "softmax"])
def test_without_gain_the_weights_are_uniform_and_it_says_so(toy, parts, mode):
    found = fit(toy.model, toy.adapters, *parts, FitOptions(lr=0, mode=mode, share="layer"))
    assert not found.improved
    assert found.terms == (Term("good", found.uniform), Term("bad", found.uniform))
    assert found.loss_after == found.loss_before
    assert len(found.history) == 1 + FitOptions.patience


def test_it_learns_no_longer_than_patience_allows_and_keeps_the_best_epoch(toy, parts):
    found = fit(toy.model, toy.adapters, *parts, FitOptions(share="adapter", lr=0.3, epochs=20, patience=1, batch=32))
    losses = [epoch.held_out for epoch in found.history]
    assert len(losses) < 21
    assert losses[-1] >= min(losses) == losses[-2] == found.loss_after
    assert [epoch.step for epoch in found.history] == [6 * epoch for epoch in range(len(losses))]


def test_the_seed_decides(toy, parts):
    def learned(seed):
        return fit(toy.model, toy.adapters, *parts, FitOptions(lr=0.1, epochs=1, seed=seed))

    assert learned(1) == learned(1)
    assert learned(1).terms != learned(2).terms


def test_a_missing_module_has_no_weight_and_the_others_keep_theirs(toy, parts):
    few = {name: part for name, part in toy.adapters["bad"].modules.items() if "q_proj" in name}
    adapters = {"good": toy.adapters["good"], "bad": LoraAdapter(few)}
    for share, patterns in (("module", list(few)), ("layer", ["model.layers.0.*", "model.layers.1.*"])):
        bad = fit(toy.model, adapters, *parts, FitOptions(share=share, epochs=1)).terms[1]
        assert [pattern for pattern, _ in bad.by_module] == patterns


def test_the_model_and_its_loss_are_as_before(toy, parts):
    before = logits(toy.model)
    fit(toy.model, toy.adapters, *parts, FitOptions(epochs=1))
    assert torch.equal(logits(toy.model), before)
    assert all(parameter.requires_grad for parameter in toy.model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("loss", ["answer", "all"])
def test_the_loss_is_that_of_transformers_whatever_the_batch(toy, loss):
    rows = Rows([ids[: 5 + place % 7] for place, ids in enumerate(toy.rows.ids[:10])], [2 + place % 3 for place in range(10)])
    merged = with_deltas(toy.model, {name: 0.5 * part.delta() for name, part in toy.adapters["bad"].modules.items()})
    total, count = 0.0, 0
    for ids, answer in zip(rows.ids, rows.answers, strict=True):
        tokens = torch.tensor([ids])
        labels = tokens.clone()
        labels[:, : answer if loss == "answer" else 1] = -100
        counted = int((labels != -100).sum())
        total += counted * merged(input_ids=tokens, labels=labels).loss.item()
        count += counted
    for batch in (1, 3, 32):
        found = held_out_loss(toy.model, toy.adapters, [Term("bad", 0.5)], rows, loss=loss, batch=batch)
        assert found == pytest.approx(total / count, rel=1e-5)


def test_all_tokens_can_be_learned_from(toy, parts):
    answer, everything = (
        fit(toy.model, toy.adapters, *parts, FitOptions(lr=0.1, epochs=1, loss=loss)) for loss in ("answer", "all")
    )
    assert answer.terms != everything.terms
    assert everything.loss_before > answer.loss_before  # prompts are random tokens


def test_progress_is_told_step_by_step(toy, parts):
    told = []
    fit(toy.model, toy.adapters, *parts, FitOptions(epochs=2, batch=64), progress=lambda *now: told.append(now))
    assert [(step, most) for step, most, _ in told] == [(step, 6) for step in range(1, 7)]
    assert all(math.isfinite(loss) for _, _, loss in told)


def test_a_fit_that_diverges_stops_with_the_step_and_a_remedy(toy, parts):
    with pytest.raises(FitError, match=r"diverged.* step.*; use a lower lr than 1e\+06"):
        fit(toy.model, toy.adapters, *parts, FitOptions(lr=1e6))
    torch.manual_seed(0)
    assert torch.isfinite(logits(toy.model)).all()


def test_adapters_that_are_best_left_out_are_not_composed(toy, parts):
    reverse = {name: LoraModule(part.a, part.b, -part.scaling) for name, part in toy.adapters["good"].modules.items()}
    options = FitOptions(start=0, lr=0)
    with pytest.raises(FitError, match="base model alone is best on the held-out rows"):
        fit(toy.model, {"worse": LoraAdapter(reverse)}, *parts, options)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "softmx"}, "unknown mode 'softmx'; did you mean 'softmax'"),
        ({"share": "block"}, "unknown share 'block'"),
        ({"loss": "prompt"}, "unknown loss 'prompt'; known: all, answer"),
        ({"epochs": 0}, "epochs 0; use 1 or more"),
        ({"batch": -1}, "batch -1"),
        ({"patience": 0}, "patience 0"),
        ({"lr": math.nan}, "lr nan; use"),
        ({"lr": -0.1}, "lr -0.1; use"),
        ({"mode": "softmax", "start": 1.0}, "start 1.0 with mode softmax"),
    ],
)
def test_options_that_cannot_be_are_refused(settings, says):
    with pytest.raises(FitError, match=says):
        FitOptions(**settings)
