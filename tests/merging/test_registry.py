"""The decorator that registers methods turns away what could not be called later."""

from dataclasses import dataclass

import pytest

from merging.methods.registry import METHODS, Options, method


@dataclass(frozen=True)
class SomeOptions(Options):
    density: float = 0.5
    rank: int | None = None


def rank(ranks, options):
    return sum(ranks)


@pytest.fixture(autouse=True)
def _registry_left_as_it_was(monkeypatch):
    monkeypatch.setattr("merging.methods.registry.METHODS", METHODS.copy())


PROBE = METHODS["cat"].assemble  # what is registered already has the right signature


def register(name="probe", function=PROBE, **given):
    return method(name, version=1, options=SomeOptions, rank=rank, **given)(function)


def known(name):
    from merging.methods import registry

    return registry.METHODS.get(name)


def test_a_method_is_registered_under_its_name_and_left_callable():
    assert register(number="density") is PROBE
    entry = known("probe")
    assert (entry.name, entry.version, entry.number, entry.options) == ("probe", 1, "density", SomeOptions)
    assert entry.assemble is PROBE
    assert entry.rank([1, 2], None) == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda options: None,
        lambda pool: None,
        lambda options, pool: None,
        lambda pool, options, extra: None,
        lambda block, options, extra: None,
        lambda units, options: None,
        lambda *pool: None,
    ],
)
def test_another_signature_is_turned_away(function):
    with pytest.raises(TypeError, match=r"probe: the function must take \(\w+, options\)"):
        register(function=function)
    assert known("probe") is None


def test_a_number_that_is_none_of_the_options_is_turned_away():
    with pytest.raises(TypeError, match="number='densty' is none of its options"):
        register(number="densty")
    assert known("probe") is None


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(TypeError, match="cat is registered already"):
        register("cat")


def test_whole_numbers_become_floats_where_an_option_is_a_float():
    """So 1 and 1.0 are one option, and one key."""
    register()
    parsed = known("probe").parse_options({"density": 1})
    assert parsed == SomeOptions(density=1.0)
    assert isinstance(parsed.density, float)
