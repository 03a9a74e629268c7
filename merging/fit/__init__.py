"""Learn a recipe on data: the weights of cat by gradient descent, the options of any method by a small search.

from merging.fit import FitOptions, fit, read_rows

rows, truncated = read_rows("mix.jsonl", tokenizer, most_tokens=2048)
train, held_out = rows.split(0.2, seed=0)
learned = fit(model, {"math": math, "code": code}, train, held_out, FitOptions(share="layer"))
learned.terms  # for MergeSpec.create("cat", …)

The model is any causal language model of transformers; this package does not import transformers.
"""

from merging.fit.composed import ComposedModel
from merging.fit.errors import FitError
from merging.fit.fit import Epoch, Fit, fit
from merging.fit.loss import Loss, held_out_loss
from merging.fit.options import FitOptions
from merging.fit.rows import Rows, read_rows
from merging.fit.search import Search, Try, search

__all__ = [
    "ComposedModel", "Epoch", "Fit", "FitError", "FitOptions", "Loss", "Rows", "Search", "Try",
    "fit", "held_out_loss", "read_rows", "search",
]  # fmt: skip
