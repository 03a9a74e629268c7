"""Values of JSON for hypothesis."""

from typing import Any

from hypothesis import strategies as st


def json_values(leaves: st.SearchStrategy[Any], depth: int = 3) -> st.SearchStrategy[Any]:
    """Such leaves, and lists and objects of them, nested up to `depth`.

    Not `st.recursive`, which in a long run may find that its own function does not use its argument, and warns of it.
    """
    if depth == 0:
        return leaves
    inner = json_values(leaves, depth - 1)
    return leaves | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
