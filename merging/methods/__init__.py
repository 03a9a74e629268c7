"""The merge methods, one a file, by name."""

from merging.methods import cat, lego, linear, svd  # noqa: F401  (importing a method registers it)
from merging.methods.registry import METHODS, Method, Options

__all__ = ["METHODS", "Method", "Options"]
