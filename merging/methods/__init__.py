"""The merge methods, one a file, by name."""

from merging.methods import cat, core_ties, dare, iso, lego, linear, magnitude, svd, ties, tsv  # noqa: F401  (importing a method registers it)
from merging.methods.registry import METHODS, Method, Options

__all__ = ["METHODS", "Method", "Options"]
