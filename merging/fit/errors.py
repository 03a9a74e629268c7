"""What can go wrong in fitting, under the tree of merging/errors.py:

LoramixError
└── FitError   data, options or a model that weights cannot be learned with, or a fit that diverged
"""

from merging.errors import LoramixError


class FitError(LoramixError):
    """Weights cannot be learned: the message says why, and the remedy, in one line."""
