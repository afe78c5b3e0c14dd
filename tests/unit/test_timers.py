"""The table of deadlines, checked against a model that is a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbaton.protocol.timers import Timers


def test_deadlines_come_in_the_order_of_their_times() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", "deadline", 3.0)
    timers.set("b", "retry", 1.0)
    timers.set("a", "retry", 2.0)
    assert timers.next() == 1.0
    assert timers.pop_due(0.9) is None
    assert [timers.pop_due(2.0) for _ in range(3)] == [("b", "retry"), ("a", "retry"), None]
    assert timers.pop_due(3.0) == ("a", "deadline")
    assert timers.next() is None
    assert timers.pop_due(1e9) is None


def test_equal_times_come_in_the_order_they_were_set() -> None:
    timers: Timers[str] = Timers()
    for owner in "cab":
        timers.set(owner, "x", 1.0)
    assert [timers.pop_due(1.0) for _ in range(3)] == [("c", "x"), ("a", "x"), ("b", "x")]


def test_setting_again_replaces_and_cancelling_forgets() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", "x", 1.0)
    timers.set("a", "x", 5.0)
    assert timers.get("a", "x") == 5.0
    assert timers.pop_due(4.0) is None
    timers.set("a", "y", 2.0)
    timers.cancel("a", "x", "nothing")
    timers.cancel("nobody", "x")
    assert timers.get("a", "x") is None
    assert timers.pop_due(9.0) == ("a", "y")
    assert len(timers) == 0


def test_a_timer_that_is_replaced_for_ever_takes_no_memory() -> None:
    timers: Timers[str] = Timers()
    for i in range(10_000):
        timers.set("a", "retry", float(i))
    assert len(timers) == 1
    assert timers.entries <= 64 + 2
    assert timers.pop_due(1e9) == ("a", "retry")


def test_what_is_replaced_is_dropped_once_it_outweighs_what_is_live() -> None:
    """Sooner would cost the time of all timers for each that is set."""
    timers: Timers[int] = Timers()
    for owner in range(100):
        timers.set(owner, "retry", 1.0)
    entries = []
    for again in range(200):
        timers.set(again % 100, "retry", 2.0)
        entries.append(timers.entries)
    assert max(entries) == 64 + 2 * 100


Step = tuple[str, str, str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("set", "cancel", "pop")), st.sampled_from("abc"), st.sampled_from("xy"), st.integers(0, 9)
    )
)


@given(STEPS)
def test_timers_are_a_dictionary_with_an_order(steps: list[Step]) -> None:
    timers: Timers[str] = Timers()
    model: dict[tuple[str, str], tuple[int, int]] = {}
    for serial, (what, owner, name, at) in enumerate(steps):
        if what == "set":
            timers.set(owner, name, at)
            model[owner, name] = (at, serial)
        elif what == "cancel":
            timers.cancel(owner, name)
            model.pop((owner, name), None)
        else:
            due = min(((when, key) for key, when in model.items() if when[0] <= at), default=None)
            assert timers.pop_due(at) == (due[1] if due else None)
            if due:
                del model[due[1]]
        assert timers.next() == (min(when for when, _ in model.values()) if model else None)
        assert len(timers) == len(model)
        assert timers.get(owner, name) == (model[owner, name][0] if (owner, name) in model else None)
