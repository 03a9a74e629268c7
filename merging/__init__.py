"""Merge LoRA adapters: any number, of any ranks, by any registered method, on any torch device.

from merging import MergeSpec, Term, load_adapter, merge, save_adapter

adapters = {name: load_adapter(f"adapters/{name}") for name in ("math", "code")}
spec = MergeSpec.create("lego", [Term("math", 0.7), Term("code")], {"rank": 16})
save_adapter(merge(adapters, spec), "merged")
"""

from merging.adapter import DTYPES, LoraAdapter, LoraModule
from merging.errors import AdapterError, LoramixError, RecipeError
from merging.merge import check_rank, merge, merge_into, merged_ranks, ranks
from merging.methods import METHODS
from merging.peft_folder import load_adapter, save_adapter
from merging.room import Room, Rooms
from merging.spec import MergeSpec
from merging.term import Term

__all__ = [
    "DTYPES", "METHODS", "AdapterError", "LoraAdapter", "LoraModule", "LoramixError", "MergeSpec", "RecipeError",
    "Room", "Rooms", "Term", "check_rank", "load_adapter", "merge", "merge_into", "merged_ranks", "ranks",
    "save_adapter",
]  # fmt: skip
