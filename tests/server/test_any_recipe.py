"""Recipes of any form: read, and shown so that they are read back, or refused with an error that can be sent."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
from harness import MODULES, tiny_adapter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.json_values import json_values

from merging import METHODS, LoramixError, MergeSpec, RecipeError, Term, save_adapter
from server.catalog import Catalog
from server.errors import RecipeSyntaxError, RequestError, body_of, status_of
from server.grammar import parse_expression, parse_object, readable

same_every_time = settings(derandomize=True, database=None, deadline=None, max_examples=500)

PARTS = [*METHODS, "math", "code", "style", "-", "(", ")", "+", "*", ".", "0", "1", "16", "0.5", "e9", "e-9", " ", "\n",
         "\u2003", "é", "\0", "-4", "9" * 30, "9" * 5000, "\ud800", "'", "…"]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text(st.characters(), max_size=40)

names = st.sampled_from(["math", "code", "style", "nobody", "../x", "a\nb", "\ud800", ""]) | st.text(max_size=6)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64, 1e308, 5e-324, -0.0, 10_000, 9999.9999])
)
plain = json_values(st.none() | st.booleans() | numbers | st.text(max_size=8))
weights = (
    numbers
    | plain
    | st.dictionaries(st.sampled_from(["*", "*.q_proj", "[", "[!", "[z-a]", "model*", "\ud800"]), numbers, max_size=3)
)
OPTIONS = sorted({field.name for method in METHODS.values() for field in dataclasses.fields(method.options)} | {"no_option"})
objects = plain | st.fixed_dictionaries(
    {
        "adapters": st.lists(st.fixed_dictionaries({"name": names | plain}, optional={"weight": weights}) | plain, max_size=17)
        | plain
    },
    optional={
        "method": st.sampled_from([*METHODS, "nothing"]) | plain,
        "rank": numbers | plain,
        "options": st.dictionaries(st.sampled_from(OPTIONS), numbers | plain, max_size=3) | plain,
        "extra": plain,
    },
)


def sent(error: LoramixError) -> str:
    """The message as a client gets it: 4xx, printable, one fault, with a place under it where it is an expression's."""
    json.dumps(body_of(error), ensure_ascii=False).encode()
    assert 400 <= status_of(error) < 500
    first, *place = str(error).split("\n")
    assert first.isprintable()
    assert first
    assert len(str(error)) < 2000
    if isinstance(error, RecipeSyntaxError):
        shown, caret = place
        assert shown.isprintable()
        assert caret.strip() == "^"
        assert 2 <= caret.index("^") <= len(shown)
    else:
        assert not place
    return str(error)


@same_every_time
@given(texts)
@example("9" * 5000)
@example("lego-" + "9" * 5000 + "(math)")
@example("ties-0." + "9" * 5000 + "(math)")
@example("ties-" + "9" * 400 + ".5(math)")
@example("lego-" + "9" * 30 + "(math)")
@example("math*" + "9" * 5000)
@example("math+\ncode;")
@example("math+" * 10**5)
@example("lego(" * 10**5)
@example("\ud800(math)")
@example("x" * 10**6 + "(math)")
def test_any_text_is_read_and_shown_so_that_it_is_read_back_or_is_refused_with_one_fault(text: str) -> None:
    try:
        spec = parse_expression(text, "cat")
    except (RecipeError, RequestError) as error:
        sent(error)
        return
    assert parse_expression(readable(spec), "cat") == spec


@same_every_time
@given(objects)
def test_any_json_as_an_object_is_resolved_or_refused_with_one_fault(lora: Any) -> None:
    lora = json.loads(json.dumps(lora))
    try:
        spec = parse_object(lora, "cat")
    except (RecipeError, RequestError) as error:
        sent(error)
        return
    if isinstance(spec, MergeSpec) and not any(term.by_module for term in spec.terms):
        options = {spec.method.number: getattr(spec.options, spec.method.number)} if spec.method.number else {}
        if all(names_of(spec)) and spec.options == spec.method.options(**options):
            assert parse_expression(readable(spec), "cat") == spec


def names_of(spec: MergeSpec) -> list[bool]:
    """Whether an expression can write each of its names."""
    return [
        term.adapter.replace("-", "").replace(".", "").replace("_", "").isalnum() and term.adapter.isascii()
        for term in spec.terms
    ]


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 2**63, 2**64, 1e400, float("nan"), 0, -1, "1", [1], None, True, {"a": 1}]
)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_method_takes_or_refuses_any_value(catalog: Catalog, option: str, value: Any) -> None:
    for method in METHODS:
        lora = {"adapters": [{"name": "math"}, {"name": "code"}], "method": method, "options": {option: value}}
        try:
            recipe = catalog.resolve(parse_object(lora, "cat"))
        except (RecipeError, RequestError) as error:
            sent(error)
            continue
        given_options = dataclasses.asdict(recipe.spec.options).values()
        assert all(not isinstance(value, int) or abs(value) < 2**63 for value in given_options)  # can be sent to a worker
        assert recipe.name


@same_every_time
@given(patterns=st.dictionaries(st.text("[]!-*?az.\\^\ud800\n", max_size=12), st.floats(-2, 2), min_size=1, max_size=3))
def test_any_pattern_of_modules_is_resolved_or_refused(catalog_once: Catalog, patterns: Mapping[str, float]) -> None:
    try:
        catalog_once.resolve(parse_object({"adapters": [{"name": "math", "weight": dict(patterns)}]}, "cat"))
    except (RecipeError, RequestError) as error:
        sent(error)


@pytest.fixture(scope="module")
def catalog_once(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    for seed, name in enumerate(("math", "code")):
        folder = tmp_path_factory.mktemp(name) / name
        save_adapter(tiny_adapter(4, seed), folder)
        catalog.add(name, folder)
    return catalog


NESTED = {depth: json.loads('{"a":' * depth + "1" + "}" * depth) for depth in (10, 100, 300, 900)}


@pytest.mark.parametrize("lora", NESTED.values(), ids=NESTED)
def test_an_object_nested_deeply_is_refused_in_a_short_line(catalog: Catalog, lora: Any) -> None:
    for body in (lora, {"adapters": lora}, {"adapters": [{"name": lora}]}, {"adapters": [{"name": "math"}], "options": lora},
                 {"adapters": [{"name": "math"}], "method": "lego", "options": {"norm": lora}}):  # fmt: skip
        with pytest.raises((RecipeError, RequestError)) as raised:
            parse_object(body, "cat")
        assert len(sent(raised.value)) < 1000


whole_numbers = st.integers(-100_000_000, 100_000_000).filter(bool)
recipes = st.dictionaries(st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True), whole_numbers, min_size=1, max_size=16)
spaces = st.sampled_from(["", " ", "  ", "\t", "\n"])


@same_every_time
@given(recipes, st.sampled_from(sorted(METHODS)), st.data())
def test_equal_meaning_in_any_writing_is_the_equal_spec_and_key(
    recipe: dict[str, int], method: str, data: st.DataObject
) -> None:
    """Weights are multiples of 1e-4 up to the largest allowed; written with other digits, order, spaces, or as an object."""
    spec = MergeSpec.create(method, [Term(name, weight / 10_000) for name, weight in recipe.items()])
    digests = {name: f"digest of {name}" for name in recipe}
    shuffled = data.draw(st.permutations(sorted(recipe)))
    nudge = data.draw(st.floats(-4e-5, 4e-5))
    space = data.draw(spaces)
    weights = {name: min(max(recipe[name] / 10_000 + nudge, -1e4), 1e4) for name in shuffled}
    written = f"{space}+{space}".join(f"{name}{space}*{space}{weight:.9f}" for name, weight in weights.items())
    writings = [f"{space}{method}{space}({written}{space}){space}", readable(spec)]
    defaults = dataclasses.asdict(METHODS[method].options())
    lora = {"method": method, "adapters": [{"name": n, "weight": w} for n, w in weights.items()], "options": defaults}
    for other in (*(parse_expression(text, "cat") for text in writings), parse_object(json.loads(json.dumps(lora)), "svd")):
        assert other == spec
        assert other.key(digests, "bfloat16") == spec.key(digests, "bfloat16")
