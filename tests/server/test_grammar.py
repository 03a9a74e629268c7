"""The recipe language: what it means, and where it points when it means nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging import METHODS, MergeSpec, RecipeError, Term
from server.catalog import Catalog
from server.errors import RecipeSyntaxError, RequestError
from server.grammar import parse_expression, parse_object, readable

NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,12}", fullmatch=True)
WEIGHTS = st.integers(-30000, 30000).filter(bool).map(lambda n: n / 10000)
TERMS = st.lists(st.builds(Term, NAMES, WEIGHTS), min_size=1, max_size=16, unique_by=lambda term: term.adapter)


def spec(method: str, *terms: tuple[str, float], **options: object) -> MergeSpec:
    return MergeSpec.create(method, [Term(*term) for term in terms], options)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("math+code", spec("cat", ("math", 1), ("code", 1))),
        ("math", spec("cat", ("math", 1))),
        ("cat(math*0.7+code*0.3)", spec("cat", ("math", 0.7), ("code", 0.3))),
        ("lego-16(math+code+style)", spec("lego", ("math", 1), ("code", 1), ("style", 1), rank=16)),
        ("svd-32(a+b*-0.5)", spec("svd", ("a", 1), ("b", -0.5), rank=32)),
        (" lego ( a * .5 + b-1.0_x * 2. ) ", spec("lego", ("a", 0.5), ("b-1.0_x", 2))),
        ("a*1e-1+b*2E0", spec("cat", ("a", 0.1), ("b", 2))),
        ("lego-16+cat", spec("cat", ("lego-16", 1), ("cat", 1))),
    ],
)
def test_an_expression_means(text: str, meaning: MergeSpec) -> None:
    assert parse_expression(text, "cat") == meaning


def test_a_sum_alone_is_merged_by_the_default_method() -> None:
    assert parse_expression("a+b", "lego").method is METHODS["lego"]


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("", "an adapter's name", 0),
        ("+a", "an adapter's name", 0),
        ("a b", "'+' or the end", 2),
        ("a++b", "an adapter's name", 2),
        ("a*+b", "a weight", 2),
        ("cat(a*nan)", "a weight", 6),
        ("a*1_000", "'+' or the end", 3),
        ("cat(a", "expected ')'", 5),
        ("cat(a))", "the end", 6),
        ("cat()", "an adapter's name", 4),
        ("cat(lego(a)+b)", "expected ')'", 8),
        ("lgeo-4(a+b)", "did you mean 'lego'", 0),
        ("a+b,c", "'+' or the end", 3),
        ("a+ü", "an adapter's name", 2),
    ],
)
def test_a_malformed_expression_is_shown_with_a_caret_under_the_place(text: str, message: str, caret: int) -> None:
    with pytest.raises(RecipeSyntaxError) as raised:
        parse_expression(text, "cat")
    first, shown, pointer = str(raised.value).split("\n")
    assert message in first
    assert shown == f"  {text}"
    assert pointer.index("^") - 2 == caret
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("text", "message", "param"),
    [
        ("cat-3(a)", "cat takes no number", "model"),
        ("lego-0(a)", "rank 0", "rank"),
        ("svd-1.5(a+b)", "rank=1.5 of svd should be a whole number", "rank"),
        ("a+b+a", "'a' stands twice", "adapters"),
        ("a*0+b*0.00001", "every weight is 0", "weight"),
        ("a*1e999", "not a finite number", "weight"),
        ("+".join(f"a{i}" for i in range(17)), "17 adapters", "adapters"),
    ],
)
def test_an_expression_that_cannot_be_merged_is_refused(text: str, message: str, param: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")) as raised:
        parse_expression(text, "cat")
    assert raised.value.param == param


@given(TERMS, st.sampled_from(["cat", "linear", "lego", "svd"]))
def test_what_is_written_is_read_back(terms: list[Term], method: str) -> None:
    written = MergeSpec.create(method, terms)
    assert parse_expression(readable(written), "cat") == written


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_with_a_recipe_error(text: str) -> None:
    try:
        parsed = parse_expression(text, "cat")
    except RecipeError:
        return
    assert all(math.isfinite(term.weight) for term in parsed.terms)


def test_an_object_says_the_same_as_an_expression() -> None:
    lora = {"method": "lego", "adapters": [{"name": "a", "weight": 0.7}, {"name": "b"}], "rank": 16}
    assert parse_object(lora, "cat") == parse_expression("lego-16(b+a*0.7)", "cat")


def test_an_object_may_weigh_by_module(catalog: Catalog) -> None:
    by_module = {"method": "cat", "adapters": [{"name": "math", "weight": {"*.q_proj": 0.5, "*": 0}}, {"name": "code"}]}
    spec = parse_object(by_module, "cat")
    assert spec.terms[1].at("model.layers.0.q_proj") == 0.5
    assert spec.terms[1].at("model.layers.0.down_proj") == 0
    assert readable(spec) == "cat(code+math*…)"
    plain = parse_object({"adapters": [{"name": "math", "weight": 0.5}, {"name": "code"}]}, "cat")
    assert catalog.resolve(spec).key != catalog.resolve(plain).key
    with pytest.raises(RecipeError, match=r"'\*\.k_proj' matches no module of 'math'"):
        catalog.resolve(parse_object({"adapters": [{"name": "math", "weight": {"*.k_proj": 2}}]}, "cat"))


def test_an_object_may_leave_the_method_to_the_server() -> None:
    assert parse_object({"adapters": [{"name": "a"}]}, "svd").method is METHODS["svd"]


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ([], "lora"),
        ("cat(a)", "lora"),
        ({}, "lora.adapters"),
        ({"adapters": [{"name": "a", "wieght": 2}]}, "lora.adapters.0.wieght"),
        ({"adapters": [{"name": "a", "weight": "2"}]}, "lora.adapters.0.weight.float"),
        ({"adapters": [{"name": 3}]}, "lora.adapters.0.name"),
        ({"adapters": [{"name": "a"}], "rank": "8"}, "lora.rank"),
        ({"adapters": [{"name": "a"}], "method": "lego", "rank": 8, "options": {"rank": 4}}, "lora.rank"),
        ({"adapters": [{"name": "a"}], "extra": 1}, "lora.extra"),
    ],
)
def test_a_wrong_object_is_refused_by_the_name_of_its_field(lora: object, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_object(lora, "cat")
    assert raised.value.param == param
    assert param in str(raised.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"adapters": []}, "0 adapters"),
        ({"adapters": [{"name": "a"}], "method": "legoo"}, "did you mean 'lego'"),
        ({"adapters": [{"name": "a"}], "method": "lego", "options": {"nrm": "2"}}, "did you mean 'norm'"),
        ({"adapters": [{"name": "a"}], "method": "lego", "options": {"norm": "3"}}, "one of 'inf', '2'"),
        ({"adapters": [{"name": "a"}], "method": "lego", "options": {"canonical": 1}}, "true or false"),
        ({"adapters": [{"name": "a"}], "method": "lego", "rank": True}, "valid integer"),
        ({"adapters": [{"name": "a"}], "rank": 4}, "cat has no option 'rank'"),
        ({"adapters": [{"name": "a", "weight": math.nan}]}, "not a finite number"),
        ({"adapters": [{"name": "a", "weight": math.inf}]}, "not a finite number"),
    ],
)
def test_an_object_that_cannot_be_merged_is_refused(lora: object, message: str) -> None:
    with pytest.raises((RecipeError, RequestError), match=message):
        parse_object(lora, "cat")
