"""The registry's table: completeness, places, expiry and bounds, with time as an argument."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.discovery.registry import (
    MAX_GROUPS,
    MAX_RANKS,
    TTL_SECONDS,
    Registry,
    RegistryCoordinates,
    Route,
    Sizes,
    decode_registration,
    lock_of,
)
from kvbaton.errors import ConfigError, OverloadedError, RegistryError


def route(
    instance: str = "a", *, group: str = "g", tp: int = 0, tp_size: int = 1, pp: int = 0, pp_size: int = 1
) -> Route:
    return Route(
        instance=instance,
        group=group,
        address=f"tcp://127.0.0.1:{40000 + tp + 100 * pp}",
        layout_digest="d",
        http_port=30000,
        coordinates=RegistryCoordinates(tp=tp, pp=pp),
        sizes=Sizes(tp=tp_size, pp=pp_size),
    )


def test_a_group_is_served_when_every_coordinate_is_there():
    registry = Registry()
    registry.register(route("a", tp=0, tp_size=2), 0.0)
    registry.register(route("a", tp=0, tp_size=2), 0.1)  # the same rank twice does not make two
    with pytest.raises(RegistryError, match=r"group g has 1 of 2 ranks, missing dp0\.pp0\.cp0\.tp1"):
        registry.lookup(0.2)
    registry.register(route("b", tp=1, tp_size=2), 0.3)
    assert [rank.instance for rank in registry.lookup(0.4).ranks] == ["a", "b"]


def test_ranks_come_in_order_of_coordinates_however_they_registered():
    registry = Registry()
    for pp, tp in [(1, 1), (0, 1), (1, 0), (0, 0)]:
        registry.register(route(f"{pp}{tp}", tp=tp, tp_size=2, pp=pp, pp_size=2), 0.0)
    assert [rank.instance for rank in registry.lookup(0.0).ranks] == ["00", "01", "10", "11"]


def test_an_empty_table_says_so():
    with pytest.raises(RegistryError, match="no prefill rank is registered"):
        Registry().lookup(0.0)


def test_a_living_rank_keeps_its_place():
    registry = Registry(ttl_seconds=10)
    registry.register(route("old"), 0.0)
    registry.register(route("old"), 5.0)
    for other in (route("new"), msgspec.structs.replace(route("old"), address="tcp://127.0.0.1:1")):
        with pytest.raises(RegistryError, match=r"is held by instance old at tcp://127\.0\.0\.1:40000, which lives"):
            registry.register(other, 14.9)
    assert registry.lookup(14.9).ranks == (route("old"),)
    registry.register(route("new"), 15.0)
    with pytest.raises(RegistryError, match="is held by instance new"):  # it was only asleep
        registry.register(route("old"), 16.0)
    assert registry.lookup(16.0).ranks == (route("new"),)


def test_a_rank_that_withdraws_makes_room_at_once():
    registry = Registry()
    registry.register(route("old"), 0.0, lock=lock_of("key"))
    registry.unregister("old", 1.0, key="key")
    registry.register(route("new"), 1.0)
    assert registry.lookup(1.0).ranks == (route("new"),)


def test_entries_expire_unless_refreshed():
    registry = Registry(ttl_seconds=10)
    registry.register(route("a", tp=0, tp_size=2), 0.0)
    registry.register(route("b", tp=1, tp_size=2), 5.0)
    registry.register(route("a", tp=0, tp_size=2), 9.0)
    assert len(registry.lookup(14.9).ranks) == 2
    with pytest.raises(RegistryError, match=r"missing dp0\.pp0\.cp0\.tp1"):
        registry.lookup(15.0)
    with pytest.raises(RegistryError, match="no prefill rank is registered"):
        registry.lookup(19.0)
    assert len(registry) == 0


def test_a_group_with_other_sizes_takes_over_only_when_complete():
    registry = Registry()
    registry.register(route("old"), 0.0)
    registry.register(route("n0", tp=0, tp_size=2), 1.0)
    assert registry.lookup(1.0).ranks[0].instance == "old"
    registry.register(route("n1", tp=1, tp_size=2), 2.0)
    assert registry.lookup(2.0).sizes.tp == 2
    registry.register(route("old"), 3.0)  # the old one is still refreshed: that does not bring it back
    assert registry.lookup(3.0).sizes.tp == 2


def test_an_older_group_serves_again_when_the_newer_one_dies():
    registry = Registry(ttl_seconds=10)
    registry.register(route("old", group="one"), 0.0)
    registry.register(route("new", group="two"), 1.0)
    registry.register(route("old", group="one"), 8.0)
    assert registry.lookup(8.0).group == "two"
    assert registry.lookup(12.0).group == "one"


def test_unregistering_takes_effect_at_once():
    registry = Registry()
    registry.register(route("a"), 0.0, lock=lock_of("key"))
    assert registry.unregister("a", 0.0, key="key")
    assert not registry.unregister("a", 0.0, key="key")
    with pytest.raises(RegistryError):
        registry.lookup(0.0)


def test_groups_are_bounded_and_make_room_when_they_expire():
    registry = Registry()
    for index in range(MAX_GROUPS):
        registry.register(route(group=f"g{index}"), 0.0)
    with pytest.raises(OverloadedError):
        registry.register(route(group="more"), 1.0)
    registry.register(route(group="more"), TTL_SECONDS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (route(tp=2, tp_size=2), "coordinates.tp: 2 is outside sizes.tp 2"),
        (route(tp_size=MAX_RANKS, pp_size=2), f"a group has at most {MAX_RANKS}"),
    ],
)
def test_impossible_coordinates_are_refused(bad: Route, message: str):
    with pytest.raises(ConfigError, match=message):
        Registry().register(bad, 0.0)


LOCK = lock_of("key")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"{}", "route"),
        (b"[]", "object"),
        (b"{", "truncated"),
        (b"\xff", "not a registration"),
        (b'{"route":{},"lock":"x"}', "instance"),
        ({"lock": "open"}, "lock"),
        ({"lock": LOCK.upper()}, "lock"),
        ({"more": 1}, "more"),
        ({"address": "http://x:1"}, "address"),
        ({"http_port": 70000}, "http_port"),
        ({"instance": ""}, "instance"),
        ({"sizes": {"tp": 1e9}}, "sizes.tp"),
        ({"evil": 1}, "evil"),
    ],
)
def test_a_malformed_registration_names_the_field(payload: bytes | dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        decode_registration(payload if isinstance(payload, bytes) else registration(**payload))


def test_port_zero_is_no_address():
    bad = decode_registration(registration(address="tcp://x:0")).route
    with pytest.raises(ConfigError, match="address"):
        Registry().register(bad, 0.0)


def registration(**changed: object) -> bytes:
    """The JSON of one, with changed fields."""
    whole = {"route": msgspec.to_builtins(route()), "lock": LOCK}
    for name, value in changed.items():
        (whole if name in ("lock", "more") else whole["route"])[name] = value
    return msgspec.json.encode(whole)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # tp
            st.sampled_from([1, 2, 3]),  # tp_size
            st.sampled_from(["x", "y"]),  # group
            st.sampled_from("abcdef"),  # instance
            st.floats(0, 30),  # seconds later
        ),
        max_size=40,
    )
)
def test_a_topology_is_always_complete_live_and_in_order(steps):
    registry, now, fresh = Registry(ttl_seconds=10), 0.0, {}
    for tp, tp_size, group, instance, later in steps:
        now += later
        if tp < tp_size:
            try:
                registry.register(route(instance, group=group, tp=tp, tp_size=tp_size), now)
                fresh[group, tp_size, tp] = (instance, now)
            except RegistryError:
                pass
        try:
            topology = registry.lookup(now)
        except RegistryError:
            continue
        assert [rank.coordinates.tp for rank in topology.ranks] == list(range(topology.sizes.tp))
        for rank in topology.ranks:
            registered, at = fresh[topology.group, topology.sizes.tp, rank.coordinates.tp]
            assert rank.instance == registered
            assert now < at + 10
