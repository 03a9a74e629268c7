"""Cross-entropy of a model on rows, mean over the tokens that count.

Shape suffixes: B  rows of a batch   L  length of the longest   V  vocabulary
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merging.adapter import LoraAdapter
from merging.fit.composed import ComposedModel
from merging.fit.rows import Rows
from merging.term import Term

Loss = Literal["answer", "all"]
_IGNORED = -100  # the label that cross_entropy skips


def held_out_loss(
    model: nn.Module,
    adapters: Mapping[str, LoraAdapter],
    terms: Sequence[Term],
    rows: Rows,
    *,
    loss: Loss = "answer",
    batch: int = 32,
) -> float:
    """The mean loss of a token on `rows` of the model with Σ_t w_t ΔW_t on it; the model is left as it was.

    Args:
        model: a causal language model of transformers.
        adapters: by name; those of the terms count.
        terms: the weights, by module or not, used as given (MergeSpec.create rounds them).
        loss: which tokens count.
        batch: rows at a time.

    Raises:
        AdapterError: where an adapter does not fit the model.
    """
    with ComposedModel(model, {term.adapter: adapters[term.adapter] for term in terms}) as composed:
        composed.weigh_terms(terms)
        return mean_loss(model, rows, loss, batch)


@torch.no_grad()
def mean_loss(model: Any, rows: Rows, loss: Loss, batch: int) -> float:
    """The mean loss of a token on `rows` of the model as it is."""
    by_length = sorted(range(len(rows)), key=lambda place: len(rows.ids[place]))  # little padding
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        ids_BL, labels_BL = padded(rows, by_length[start : start + batch], loss)
        tokens = int((labels_BL != _IGNORED).sum())
        total += tokens * float(batch_loss(model, ids_BL, labels_BL))
        count += tokens
    return total / count


def padded(rows: Rows, places: Sequence[int], loss: Loss) -> tuple[Tensor, Tensor]:
    """(B, L) token ids and labels of some rows, padded on the right, which causal attention needs no mask for."""
    length = max(len(rows.ids[place]) for place in places)
    ids_BL = torch.zeros(len(places), length, dtype=torch.long)
    labels_BL = torch.full_like(ids_BL, _IGNORED)
    for row, place in enumerate(places):
        ids, first = rows.ids[place], rows.answers[place] if loss == "answer" else 1
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        labels_BL[row, first : len(ids)] = ids_BL[row, first : len(ids)]
    return ids_BL, labels_BL


def batch_loss(model: Any, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """The mean loss of the labelled tokens of a batch, a float32 scalar on the model's device (float64 of a float64 model)."""
    counts_BL = labels_BL != _IGNORED
    first = int(counts_BL.any(dim=0).nonzero()[0])
    kept = ids_BL.shape[1] - first + 1  # only what predicts a label, and the end, needs logits
    logits_BLV = model(input_ids=ids_BL.to(model.device), use_cache=False, logits_to_keep=kept).logits[:, :-1]
    logits_V = logits_BLV[counts_BL[:, first:].to(logits_BLV.device)]
    wanted = labels_BL[:, first:][counts_BL[:, first:]].to(logits_BLV.device)
    return cross_entropy(logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)), wanted)
