"""Learn the weights of cat: LoRA Soups (Prabhakar et al., COLING 2025), as its authors mean it."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import nn

from merging.adapter import LoraAdapter
from merging.errors import RecipeError
from merging.fit.composed import ComposedModel
from merging.fit.errors import FitError
from merging.fit.loss import batch_loss, mean_loss, padded
from merging.fit.options import FitOptions
from merging.fit.rows import Rows
from merging.fit.shared import SharedWeights
from merging.term import Term

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Epoch:
    """The state after an epoch; before the first, `trained` is None.

    Attributes:
        step: steps made so far.
        trained: mean loss of the epoch's steps. held_out: loss on the held-out rows, at rounded weights.
    """

    step: int
    trained: float | None
    held_out: float


@dataclass(frozen=True)
class Fit:
    """What was learned.

    Attributes:
        terms: for MergeSpec.create("cat", terms); rounded to 1e-4. Uniform weights where nothing better was learned.
        uniform: of the weights 1 and 1/T for all of the T adapters, that of the lower held-out loss.
        loss_before: held-out loss at `uniform`.
        loss_after: held-out loss at `terms`.
        improved: whether what was learned is better than uniform weights on the held-out rows.
        steps: steps made.
        history: by epoch, the start first.
    """

    terms: tuple[Term, ...]
    uniform: float
    loss_before: float
    loss_after: float
    improved: bool
    steps: int
    history: tuple[Epoch, ...]


def fit(
    model: nn.Module,
    adapters: Mapping[str, LoraAdapter],
    train: Rows,
    held_out: Rows,
    options: FitOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Fit:
    """Learn α of ΔW^m = Σ_t α_t^m ΔW_t^m by Adam, base and adapters frozen; the weights of the lowest held-out loss are kept.

    Equal input gives equal weights on one device. The model is left as it was.

    Args:
        model: a causal language model of transformers, on its device, in its dtype.
        adapters: by name, as terms will name them; on any device.
        progress: told (steps made, steps at most, loss) after each step.

    Raises:
        AdapterError: where an adapter does not fit the model.
        FitError: where the loss or a weight stops being finite, or every weight ends at 0.
    """
    options = options or FitOptions()
    with ComposedModel(model, adapters, checkpointing=options.checkpointing) as composed, _repeatable():

        @cache
        def judged(terms: tuple[Term, ...]) -> float:
            composed.weigh_terms(terms)
            return _finite(
                mean_loss(model, held_out, options.loss, options.batch),
                "on the held-out rows; use a lower lr, or weaker adapters",
            )

        weights = SharedWeights(composed, options)
        best = weights.terms()
        history = [Epoch(0, None, judged(best))]
        since_best = 0
        for step, trained in _epochs(composed, weights, train, options, progress):
            terms = _terms(weights, step, options)
            history.append(Epoch(step, trained, judged(terms)))
            since_best = 0 if judged(terms) < judged(best) else since_best + 1
            best = min(best, terms, key=judged)
            if since_best == options.patience:
                break
        uniforms = [tuple(Term(name, w).canonical() for name in adapters) for w in (1.0, 1 / len(adapters))]
        uniform = min(uniforms, key=judged)
        before, after = judged(uniform), judged(best)
    if after < before and not any(term.weight or term.by_module for term in best):
        raise FitError(f"the base model alone is best on the held-out rows (loss {after:.4g}); nothing is to be composed")
    return Fit(
        terms=best if after < before else uniform,
        uniform=uniform[0].weight,
        loss_before=before,
        loss_after=min(before, after),
        improved=after < before,
        steps=history[-1].step,
        history=tuple(history),
    )


def _epochs(
    composed: ComposedModel, weights: SharedWeights, train: Rows, options: FitOptions, progress: Progress | None
) -> Iterator[tuple[int, float]]:
    """Steps made and mean loss, after each epoch."""
    # Batches are drawn at random, not by length: rows of one length are mostly rows of one skill.
    order = random.Random(options.seed)
    steps = options.epochs * math.ceil(len(train) / options.batch)
    optimizer = torch.optim.Adam([weights.value_TG])
    step = 0
    for _ in range(options.epochs):
        shuffled = order.sample(range(len(train)), len(train))
        losses = []
        for start in range(0, len(train), options.batch):
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / steps)
            composed.weigh(weights.alpha_TM())
            loss = batch_loss(composed.model, *padded(train, shuffled[start : start + options.batch], options.loss))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            losses.append(_finite(loss.item(), f"at step {step}; use a lower lr than {options.lr:g}"))
            if progress is not None:
                progress(step, steps, losses[-1])
        yield step, fmean(losses)


def _terms(weights: SharedWeights, step: int, options: FitOptions) -> tuple[Term, ...]:
    try:
        return weights.terms()
    except RecipeError as error:
        raise FitError(f"the fit diverged: after {step} steps {error}; use a lower lr than {options.lr:g}") from error


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise FitError(f"the fit diverged: loss {loss:g} {where}")
    return loss


@contextmanager
def _repeatable() -> Iterator[None]:
    """Kernels that sum in a certain order; attention's backward pass on a GPU is one that otherwise does not."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a launch for each new tensor, and nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        memory.fill_uninitialized_memory = filled
