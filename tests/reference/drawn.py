"""Hypothesis strategies: recipes, and sets of random adapters with weights of both signs."""

from hypothesis import strategies as st
from reference.adapters import random_adapter

from merging import METHODS, LoraAdapter

# Multiples of 1e-4, so that rounding leaves them alone, and far enough from 0 that the term counts.
weights = st.integers(-30000, 30000).filter(lambda n: abs(n) >= 100).map(lambda n: n / 10000)
names = st.text("abcdefgh-._0123", min_size=1, max_size=8)
methods = st.sampled_from(sorted(METHODS))


@st.composite
def adapters(draw: st.DrawFn, rank: int | None = None) -> LoraAdapter:
    return random_adapter(
        draw(st.integers(0, 10**6)),
        rank or draw(st.integers(1, 6)),
        alpha=draw(st.sampled_from([0.5, 1, 8, 16, 64])),
        rslora=draw(st.booleans()),
    )


@st.composite
def terms(draw: st.DrawFn, *, least: int = 1, most: int = 4, rank: int | None = None) -> list[tuple[LoraAdapter, float]]:
    count = draw(st.integers(least, most))
    return [(draw(adapters(rank)), draw(weights)) for _ in range(count)]
