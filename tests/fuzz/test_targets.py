"""Each target on its seeds, on changes of them, and on any bytes."""

import random

import pytest
from hypothesis import given, strategies as st

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS

EACH = pytest.mark.parametrize("name", TARGETS)


@EACH
def test_seeds(name: str):
    target = TARGETS[name]
    assert target.seeds
    for seed in target.seeds:
        target.run(seed)


@EACH
@given(data=st.binary(max_size=100))
def test_any_bytes(name: str, data: bytes):
    TARGETS[name].run(data)


@EACH
@given(number=st.integers(0, 2**32 - 1))
def test_changed_seeds(name: str, number: int):
    rng = random.Random(number)
    seed = rng.choice(TARGETS[name].seeds)
    cut = rng.randint(0, len(seed))
    TARGETS[name].run(mutate(seed, rng) or seed[:cut] + rng.randbytes(3) + seed[cut:])
