"""Weights of cat that are learned from rows, as LoRA Soups does, or drawn."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from batches import IGNORED, Pair, encode
from skills import Skill

from benchmarks.composition.data import Data
from benchmarks.composition.groups import Group, Row
from benchmarks.composition.study import Sizes, lora
from merging import LoraAdapter, Term
from merging.fit import Fit, FitOptions, Rows, fit
from merging.fit.options import Mode

# Few steps, so large ones: 18 of them, decaying, move a weight by up to 0.9.
_LR, _EPOCHS, _BATCH = 0.1, 3, 32
_DRAWN = 512  # examples of each skill, from which rows are taken


def drawn(adapters: Mapping[str, LoraAdapter], seed: int) -> list[Term]:
    """Per module, the softmax over adapters of standard normal logits: where the authors' code starts."""
    modules = sorted(set().union(*(adapter.modules for adapter in adapters.values())))
    generator = torch.Generator().manual_seed(seed)
    weight_MT = torch.randn(len(modules), len(adapters), generator=generator).softmax(dim=1)
    by_module = [dict(zip(modules, column_M, strict=True)) for column_M in weight_MT.mT.tolist()]
    return [
        Term(name, 1.0, tuple((module, weights[module]) for module in adapter.modules))
        for weights, (name, adapter) in zip(by_module, adapters.items(), strict=True)
    ]


def learned(
    model: Any, tokenizer: Any, adapters: Mapping[str, LoraAdapter], group: Group, row: Row, data: Data, sizes: Sizes, seed: int
) -> Fit:
    """Learn on the skills' own data in equal parts, or on as much of the target's training data."""
    skills = [Skill(q.task, (q.task,), lora(), q.form) for q in group.asked] if row.weights == "target" else group.own
    pick, train, held_out = random.Random(seed), Rows([], []), Rows([], [])
    for skill in skills:
        pairs = _pairs(tokenizer, skill, data, sizes.length, pick)
        most_train, most_held_out = (-(-count // len(skills)) for count in sizes.fit_rows)
        _add(held_out, pairs[:most_held_out])
        _add(train, pairs[most_held_out:][:most_train])
    mode: Mode = "softmax" if row.weights == "softmax" else "free"
    options = FitOptions(mode=mode, lr=_LR, epochs=_EPOCHS, batch=_BATCH, seed=seed, patience=_EPOCHS)
    return fit(model, adapters, train, held_out, options)


def _pairs(tokenizer: Any, skill: Skill, data: Data, length: int, pick: random.Random) -> list[Pair]:
    """Some of a skill's training examples in its form, in random order, those that are too long left out."""
    examples = [example for task in skill.tasks for example in data.train(task)]
    some = pick.sample(examples, min(_DRAWN, len(examples)))
    return [pair for pair in encode(tokenizer, [(e, skill.form) for e in some], "answer") if len(pair[0]) <= length]


def _add(rows: Rows, pairs: Sequence[Pair]) -> None:
    for ids, labels in pairs:
        rows.ids.append(ids)
        rows.answers.append(next(place for place, label in enumerate(labels) if label != IGNORED))
