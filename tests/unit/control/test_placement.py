"""On which data-parallel rank a room is: both halves ask one rule, and the registry where the rule does not say."""

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_registry_http import SECRET, Sleeps, port_in

from kvbaton.discovery.client import FIRST_ASK_SECONDS, LONGEST_ASK_SECONDS, RegistryClient
from kvbaton.discovery.placement import MAX_PLACED, PLACED_SECONDS, LoadBalance, Placements, checked_rank, known_rank
from kvbaton.discovery.registry import Registry, RegistryCoordinates, Route, Sizes
from kvbaton.discovery.server import registry_app
from kvbaton.errors import AuthenticationError, ConfigError, RegistryError
from kvbaton.serving.testing.http import run, serving


def filled(balance: LoadBalance, *, dp: int = 2, tp: int = 2) -> Registry:
    registry = Registry()
    for rank in range(dp):
        for shard in range(tp):
            route = Route(
                instance=f"{rank}{shard}",
                group="g",
                address=f"tcp://127.0.0.1:{41000 + 10 * rank + shard}",
                layout_digest="d",
                http_port=30000,
                coordinates=RegistryCoordinates(dp=rank, tp=shard),
                sizes=Sizes(dp=dp, tp=tp),
                load_balance=balance,
            )
            registry.register(route, 0.0)
    return registry


def addresses(rank: int) -> tuple[str, ...]:
    return tuple(f"tcp://127.0.0.1:{41000 + 10 * rank + shard}" for shard in range(2))


@given(room=st.integers(1, (1 << 63) - 1), size=st.integers(1, 64), named=st.none() | st.integers(0, 63))
def test_a_named_rank_comes_first_then_the_only_one_then_the_room_modulo_the_size(
    room: int, size: int, named: int | None
) -> None:
    for balance in ("follow_bootstrap_room", "round_robin", "total_requests"):
        if named is not None and named >= size:
            with pytest.raises(ConfigError, match=rf"^disagg_prefill_dp_rank: {named} is none of the {size} "):
                known_rank(room, size=size, balance=balance, named=named)
            continue
        known = known_rank(room, size=size, balance=balance, named=named)
        if named is not None:
            assert known == named
        elif size == 1:
            assert known == 0
        else:
            assert known == (room % size if balance == "follow_bootstrap_room" else None)


def test_a_rank_that_does_not_exist_is_refused_by_the_name_of_its_field() -> None:
    assert checked_rank(1, 2, "field") == 1
    with pytest.raises(ConfigError, match=r"^field: 2 is none of the 2 data-parallel ranks there; pass 0 to 1"):
        checked_rank(2, 2, "field")


def test_a_room_is_remembered_for_a_while_and_the_last_word_holds() -> None:
    placements = Placements()
    placements.place(7, 0, 0.0)
    placements.place(7, 1, 1.0)
    assert placements.find(7, 2.0) == 1
    assert placements.find(8, 2.0) is None
    assert placements.find(7, 1.0 + PLACED_SECONDS) is None
    placements.place(9, 1, 1.0 + PLACED_SECONDS)
    assert len(placements) == 1  # what is too old has made room


def test_the_rooms_that_are_remembered_are_bounded_oldest_first() -> None:
    placements = Placements()
    for room in range(MAX_PLACED + 1):
        placements.place(room, 1, 0.0)
    assert len(placements) == MAX_PLACED
    assert placements.find(0, 0.0) is None
    assert placements.find(1, 0.0) == 1


def test_decode_finds_the_ranks_of_one_data_parallel_rank() -> None:
    async def test() -> None:
        app = registry_app(filled("follow_bootstrap_room"), clock=lambda: 0.0)
        async with serving(app) as url, RegistryClient(sleep=Sleeps()) as client:
            port = port_in(url)
            assert await client.sources("127.0.0.1", port, 6) == addresses(0)
            assert await client.sources("127.0.0.1", port, 7) == addresses(1)
            assert await client.sources("127.0.0.1", port, 7, named=0) == addresses(0)
            with pytest.raises(ConfigError, match=r"^disagg_prefill_dp_rank: 2 is none of the 2"):
                await client.sources("127.0.0.1", port, 7, named=2)

    run(test())


def test_where_prefill_chooses_decode_asks_until_the_request_has_come_there() -> None:
    async def test() -> None:
        placements, sleeps = Placements(), Sleeps()

        async def comes_late(seconds: float) -> None:
            await sleeps(seconds)
            if len(sleeps.taken) == 3:
                placements.place(6, 1, 0.0)

        app = registry_app(filled("round_robin"), placements, clock=lambda: 0.0)
        async with serving(app) as url, RegistryClient(sleep=comes_late) as client:
            assert await client.sources("127.0.0.1", port_in(url), 6) == addresses(1)
            assert sleeps.taken == [FIRST_ASK_SECONDS * (1 << ask) for ask in range(3)]

    run(test())


def test_a_room_that_never_comes_is_an_error_that_names_it() -> None:
    async def test() -> None:
        now, sleeps = [0.0], Sleeps()

        async def passes(seconds: float) -> None:
            now[0] += seconds
            await sleeps(seconds)

        app = registry_app(filled("total_requests"), clock=lambda: 0.0)
        async with serving(app) as url, RegistryClient(sleep=passes, clock=lambda: now[0]) as client:
            with pytest.raises(RegistryError, match="has not seen this room within 3 s") as failed:
                await client.sources("127.0.0.1", port_in(url), 6, patience_seconds=3.0)
            assert (failed.value.room, failed.value.peer) == (6, f"127.0.0.1:{port_in(url)}")
            assert max(sleeps.taken) == LONGEST_ASK_SECONDS
            assert 3.0 - LONGEST_ASK_SECONDS < sum(sleeps.taken) <= 3.0

    run(test())


def test_a_rank_that_the_group_does_not_have_is_refused() -> None:
    async def test() -> None:
        placements = Placements()
        placements.place(6, 5, 0.0)
        app = registry_app(filled("round_robin"), placements, clock=lambda: 0.0)
        async with serving(app) as url, RegistryClient(sleep=Sleeps()) as client:
            with pytest.raises(ConfigError, match=r"^dp_rank: 5 is none of the 2"):
                await client.sources("127.0.0.1", port_in(url), 6)

    run(test())


def test_who_has_a_room_is_told_to_those_who_know_the_secret() -> None:
    async def test() -> None:
        placements = Placements()
        placements.place(6, 1, 0.0)
        app = registry_app(filled("round_robin"), placements, secret=SECRET, clock=lambda: 0.0)
        async with serving(app) as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/dp_rank?room=6") as response:
                assert response.status == 401
            async with RegistryClient(secret=SECRET, sleep=Sleeps()) as client:
                assert await client.sources("127.0.0.1", port_in(url), 6) == addresses(1)
            async with RegistryClient(secret="another secret, just as long", sleep=Sleeps()) as client:
                with pytest.raises(AuthenticationError):
                    await client.sources("127.0.0.1", port_in(url), 6)

    run(test())


@pytest.mark.parametrize("query", ["", "?room=", "?room=x", "?room=-1", f"?room={'9' * 21}", "?room=%C2%B2"])
def test_a_question_without_a_room_is_refused(query: str) -> None:
    async def test() -> None:
        async with (
            serving(registry_app(Registry())) as url,
            aiohttp.ClientSession() as session,
            session.get(f"{url}/dp_rank{query}") as response,
        ):
            assert response.status == 400
            assert msgspec.json.decode(await response.read())["error"]["message"].startswith("room: ")

    run(test())
