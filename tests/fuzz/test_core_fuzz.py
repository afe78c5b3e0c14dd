"""Liars against both state machines: nothing raises, every table stays within its bound, honest rooms are served."""

from __future__ import annotations

from random import Random

from fuzz.siege import Siege
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

RANDOMS = st.randoms(use_true_random=False)
FUZZ = settings.get_profile("fuzz")


class Siegecraft(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.siege = Siege()

    @rule(random=RANDOMS, count=st.integers(1, 12))
    def lie(self, random: Random, count: int) -> None:
        self.siege.lie(random, count)

    @rule(payload=st.binary(max_size=60))
    def noise(self, payload: bytes) -> None:
        self.siege.raw(payload)

    @rule(random=RANDOMS)
    def serve(self, random: Random) -> None:
        self.siege.serve_a_room(random)

    @rule(random=RANDOMS)
    def ask_the_liar(self, random: Random) -> None:
        self.siege.ask_the_liar(random)

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.5, 6.0, 11.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.siege.pass_time(seconds)

    @invariant()
    def within_bounds(self) -> None:
        self.siege.check()

    def teardown(self) -> None:
        self.siege.end()


TestSiege = Siegecraft.TestCase
TestSiege.settings = settings(FUZZ, stateful_step_count=20)


@given(st.integers(0, 1 << 32))
@settings(FUZZ, max_examples=FUZZ.max_examples)
def test_a_long_siege(seed: int) -> None:
    """Many lies of one seed: deeper than a shrinkable example goes."""
    siege, random = Siege(), Random(seed)
    for _ in range(12):
        siege.lie(random, 25)
        siege.check()
        choice = random.randint(0, 4)
        if choice == 0:
            siege.pass_time(random.choice([0.3, 3.0, 12.0]))
        elif choice == 1:
            siege.ask_the_liar(random)
        else:
            siege.serve_a_room(random)
    siege.end()
