"""A worker's states, and the legs that end when it is lost."""

import asyncio

import pytest

from kvbaton.errors import PeerLostError
from kvbaton.serving.router.worker import State, Worker
from kvbaton.serving.testing.http import run


def ready() -> Worker:
    worker = Worker("decode", "http://d")
    worker.become(State.READY)
    return worker


async def begun(worker: Worker) -> asyncio.Task[None]:
    """A task that waits for ever inside a leg."""
    inside = asyncio.Event()

    async def depend() -> None:
        async with worker.leg():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(depend())
    await inside.wait()
    return task


@pytest.mark.parametrize("state", [State.SILENT, State.GONE])
def test_whoever_waits_for_a_worker_that_is_lost_is_told_at_once(state):
    async def test() -> None:
        worker = ready()
        tasks = [await begun(worker) for _ in range(3)]
        assert worker.legs == 3
        worker.become(state, "it does not answer")
        for task in tasks:
            with pytest.raises(PeerLostError, match="it does not answer") as caught:
                await task
            assert caught.value.peer == "decode http://d"
            assert not task.cancelling()
        assert worker.legs == 0

    run(test())


@pytest.mark.parametrize("state", [state for state in State if not state.is_lost])
def test_every_other_state_lets_what_is_in_flight_go_on(state):
    async def test() -> None:
        worker = ready()
        task = await begun(worker)
        worker.become(state, "why")
        await asyncio.sleep(0)
        assert worker.legs == 1
        assert worker.usable == (state is State.READY)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert worker.legs == 0

    run(test())


def test_a_leg_says_why_it_ended_although_its_worker_came_back_meanwhile():
    async def test() -> None:
        worker = ready()
        task = await begun(worker)
        worker.become(State.SILENT, "it froze")
        worker.become(State.READY)
        with pytest.raises(PeerLostError, match="it froze"):
            await task

    run(test())


def test_nobody_begins_with_a_worker_that_is_lost():
    async def test() -> None:
        worker = ready()
        worker.become(State.GONE, "refused")
        with pytest.raises(PeerLostError, match="refused"):
            async with worker.leg():
                raise AssertionError("unreachable")

    run(test())


def test_a_client_that_goes_away_in_the_same_moment_stays_gone():
    """The cancellation of whoever waits is not the leg's, and is not turned into an error."""

    async def test() -> None:
        worker = ready()
        task = await begun(worker)
        worker.become(State.GONE, "refused")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test())


def test_what_has_ended_by_itself_is_not_lost_afterwards():
    async def test() -> None:
        worker = ready()
        async with worker.leg():
            pass
        worker.become(State.GONE, "refused")
        await asyncio.sleep(0)  # nothing cancels us

    run(test())
