"""The catalog: an adapter's name exists once all of it has been checked, and recipes resolve to content."""

from pathlib import Path

import pytest
import torch
from harness import MODULES, tiny_adapter

from merging import AdapterError, LoraAdapter, LoraModule, RecipeError, load_adapter, merge, save_adapter
from server.catalog import Catalog, Recipe
from server.errors import UnknownModelError
from server.grammar import parse_expression


def resolve(catalog: Catalog, expression: str) -> Recipe:
    return catalog.resolve(parse_expression(expression, "cat"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("math+code", "code+math"),
        ("math*0.7+code", "code + math*0.70004"),
        ("math+code+style*0", "math+code"),
        ("lego(math+code)", "lego(code*1+math)"),
    ],
)
def test_the_same_meaning_has_the_same_key_and_name(catalog: Catalog, one: str, other: str) -> None:
    assert resolve(catalog, one).key == resolve(catalog, other).key
    assert resolve(catalog, one).name == resolve(catalog, other).name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("math", "code"),
        ("math+code", "math+code*0.9"),
        ("cat(math+code)", "lego(math+code)"),
        ("lego-4(math+code)", "lego-3(math+code)"),
    ],
)
def test_another_meaning_has_another_key_and_name(catalog: Catalog, one: str, other: str) -> None:
    first, second = resolve(catalog, one), resolve(catalog, other)
    assert first.key != second.key
    assert first.name != second.name


def test_a_recipes_name_in_the_engine_is_readable_and_carries_its_key(catalog: Catalog) -> None:
    recipe = resolve(catalog, "lego-4(math*0.7+code*-1)")
    assert recipe.name == f"lego-4(code*-1+math*0.7)@{recipe.key[:12]}"


def test_changed_content_under_the_same_name_is_another_key(catalog: Catalog, tmp_path: Path) -> None:
    before = resolve(catalog, "math").key
    save_adapter(tiny_adapter(4, seed=99), tmp_path / "again" / "math")
    other = Catalog(MODULES, 8, "bfloat16", frozenset())
    other.add("math", tmp_path / "again" / "math")
    assert resolve(other, "math").key != before


def test_another_output_dtype_is_another_key(catalog: Catalog, tmp_path: Path) -> None:
    other = Catalog(MODULES, 8, "float16", frozenset())
    other.add("math", tmp_path / "math")
    assert resolve(other, "math").key != resolve(catalog, "math").key


def test_an_unknown_adapter_is_named_with_the_nearest_known_ones(catalog: Catalog) -> None:
    with pytest.raises(UnknownModelError, match=r"'maths' here; did you mean 'math'\?"):
        resolve(catalog, "code+maths")


@pytest.mark.parametrize("recipe", ["math+code", "lego-3(math+code*0.5)", "style"])
def test_a_recipe_knows_what_it_will_take_up(catalog: Catalog, recipe: str) -> None:
    spec = parse_expression(recipe, "cat")
    adapters = {name: load_adapter(entry.source.path) for name, entry in catalog.entries.items()}
    assert catalog.resolve(spec).nbytes == merge(adapters, spec).nbytes
    assert all(source.nbytes == adapters[source.name].nbytes for source in catalog.resolve(spec).sources)


def test_a_rank_over_the_limit_is_refused_with_both_remedies(catalog: Catalog) -> None:
    with pytest.raises(RecipeError) as raised:
        resolve(catalog, "cat(math*0.5+code+style)")
    assert "rank 10, over this server's 8" in str(raised.value)
    assert "svd-8(code+math*0.5+style)" in str(raised.value)
    assert "--max-lora-rank 10" in str(raised.value)
    resolve(catalog, "svd-8(code+math*0.5+style)")  # the remedy works


@pytest.mark.parametrize("name", ["a/b", "a b", "a(b)", "", "a@b", "a+b"])
def test_a_name_that_recipes_cannot_write_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="letters, digits"):
        catalog.add(name, tmp_path / "math")


@pytest.mark.parametrize("name", ["math", "tiny"])
def test_a_taken_name_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="is taken"):
        catalog.add(name, tmp_path / "code")


def module(d_out: int, d_in: int, rank: int = 2) -> LoraModule:
    return LoraModule(torch.ones(rank, d_in), torch.ones(d_out, rank))


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"other.layers.0.q_proj": module(12, 8)}, "would have no effect"),
        ({"model.layers.0.q_proj": module(12, 8), "lm_head": module(12, 8)}, "lm_head and 0 more"),
        ({"model.layers.0.q_proj": module(12, 9)}, r"is \(12, 9\), but \(12, 8\) in this model"),
        ({"model.layers.0.q_proj": module(12, 8, rank=9)}, "--max-lora-rank 9"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    catalog: Catalog, tmp_path: Path, modules: dict[str, LoraModule], reason: str
) -> None:
    save_adapter(LoraAdapter(modules, "another"), tmp_path / "bad")
    with pytest.raises(AdapterError, match=reason) as raised:
        catalog.add("bad", tmp_path / "bad")
    assert str(tmp_path / "bad") in str(raised.value)
    assert "bad" not in catalog.entries
