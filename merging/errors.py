"""What can go wrong in merging, as one tree:

    LoramixError
    ├── AdapterError   an adapter's folder or tensors cannot be used
    ├── RecipeError    what was asked of the adapters cannot be done
    ├── OutputError    a result cannot be written
    └── FitError       weights cannot be learned (merging/fit)

Every message names the offending value and what to do about it, in one line.
"""

from collections.abc import Collection
from difflib import get_close_matches
from reprlib import Repr

_SHOWN = 120  # characters of a value that a message repeats
_COMPARED = 1000  # names that one is compared with; it takes up to 0.03 ms each

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _SHOWN


class LoramixError(Exception):
    """Base of every error that loramix raises on purpose."""


class AdapterError(LoramixError):
    """An adapter cannot be used: the message says which one, why, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RecipeError(LoramixError):
    """A recipe cannot be merged.

    `param` names the part of the recipe at fault (`method`, `adapters`, `weight`, `rank`, `options`),
    so that a client can point at it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class OutputError(LoramixError):
    """A file or folder cannot be written: the message says which one, why, and the remedy."""


def one_line(text: str) -> str:
    """`text` with all that cannot be printed escaped: names in a file or a request hold line breaks and half characters too."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """The repr of a value that somebody gave, cut short where it is long or deep."""
    return _repr.repr(value)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known ones, or all of them if few; nothing if too many."""
    close = get_close_matches(name, known, n=3, cutoff=0.5) if len(known) <= _COMPARED else []
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(sorted(known))}" if 0 < len(known) <= 12 else ""
