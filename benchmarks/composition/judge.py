"""Exact match of a model that wears a merged adapter.

Greedy decoding gives the expected answer exactly if at each of its tokens, the end token included, the expected one is the
likeliest after those before it. So one forward pass over prompt and expected answer judges an item, and nothing is decoded.
(The one difference: an answer of the same characters in other tokens than the tokenizer's counts as wrong.)

Shape suffixes: R  rows   L  tokens of a row   K  tokens of expected answers   D  hidden size
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from batches import IGNORED, Pair, Rows, encode, pad
from skills import Example, Form
from torch import Tensor

from benchmarks.composition.work import StudyError
from merging import LoraAdapter

_ROWS = 512  # at a time


@dataclass(frozen=True)
class Items:
    """Rows to judge together, and which of them are whose.

    Attributes:
        places: by part ("validation" or "test"), the rows of each question.
    """

    rows: Rows
    places: Mapping[str, Sequence[slice]]


class Judge:
    """A model of transformers whose linear weights are the base's plus an adapter's ΔW, added densely."""

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self._base: dict[str, Tensor] = {}

    def wear(self, adapter: LoraAdapter | None, scale: float = 1.0) -> None:
        """W = W_base + scale · ΔW, rounded to the model's dtype once; without an adapter, W_base."""
        modules = adapter.modules if adapter else {}
        for name in self._base.keys() - modules.keys():
            self.model.get_submodule(name).weight.copy_(self._base[name])
        for name, module in modules.items():
            weight = self.model.get_submodule(name).weight
            base = self._base.setdefault(name, weight.clone())
            torch.addmm(base, module.b.to(base), module.a.to(base), alpha=scale * module.scaling, out=weight)

    def percent(self, items: Items) -> dict[str, list[float]]:
        """Right answers of each question, by part."""
        right_R = self.right(items.rows).cpu()
        return {part: [100 * right_R[rows].double().mean().item() for rows in places] for part, places in items.places.items()}

    @torch.inference_mode()
    def right(self, rows: Rows) -> Tensor:
        """(R,) bool: whether greedy decoding of each prompt gives the labelled answer."""
        parts = zip(rows.ids_RL.split(_ROWS), rows.labels_RL.split(_ROWS), strict=True)
        return torch.cat([self._right(ids_RL, labels_RL) for ids_RL, labels_RL in parts])

    def _right(self, ids_RL: Tensor, labels_RL: Tensor) -> Tensor:
        expected_RL = labels_RL[:, 1:]
        counted_RL = expected_RL != IGNORED
        # Padding stands on the right, where causal attention does not look.
        hidden_KD = self.model.model(input_ids=ids_RL, use_cache=False).last_hidden_state[:, :-1][counted_RL]
        right_RL = torch.ones_like(counted_RL)
        right_RL[counted_RL] = self.model.lm_head(hidden_KD).argmax(dim=-1) == expected_RL[counted_RL]
        return right_RL.all(dim=1)


def lay_out(parts: Mapping[str, Sequence[list[Pair]]], pad_id: int, device: torch.device) -> Items:
    """One batch of all questions' encoded items, by part."""
    pairs: list[Pair] = []
    places: dict[str, list[slice]] = {}
    for part, questions in parts.items():
        for question in questions:
            places.setdefault(part, []).append(slice(len(pairs), len(pairs) + len(question)))
            pairs += question
    longest = max(len(ids) for ids, _ in pairs)
    return Items(pad(pairs, -(-longest // 8) * 8, pad_id).to(device), places)


def encoded(tokenizer: Any, examples: Sequence[Example], form: Form, count: int, length: int) -> list[Pair]:
    """The first `count` examples of at most `length` tokens, all of their answers expected. Raises StudyError without any."""
    pairs = encode(tokenizer, [(example, form) for example in examples], "answer")
    fitting = [pair for pair in pairs if len(pair[0]) <= length][:count]
    if not fitting:
        raise StudyError(f"no held-out item such as {examples[0].prompt!r} has at most {length} tokens")
    return fitting
