"""What all message links must do: a suite of tests to subclass.

::

    class TestMine(LinksConformance):
        def listen(self, address: str = "") -> Links: ...     # address: one that was closed before, to be taken again

Needs pytest.
"""
# ruff: noqa: S101 - assertions are what a test says

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest

from kvbaton.control.base import MAX_MESSAGE_BYTES, Arrived, Changed, LinkChange, LinkId, Links
from kvbaton.errors import ConfigError
from kvbaton.testing.link_log import DEADLINE_SECONDS, Log, until


def joined(thread: threading.Thread) -> None:
    """Join a thread that must end."""
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


class LinksConformance(ABC):
    """The suite."""

    bad_addresses: Sequence[str] = ("", "nonsense")

    @abstractmethod
    def listen(self, address: str = "") -> Links:
        """New links, at a free address or at the one given."""

    @pytest.fixture
    def end(self) -> Iterator[Callable[..., Log]]:
        """Makes ends under observation: ``end(address="")``; closes them afterwards."""
        with ExitStack() as stack:
            yield lambda address="": Log(stack.enter_context(self.listen(address)))

    @staticmethod
    def connected(here: Log, there: Log) -> LinkId:
        """A link from ``here`` to ``there`` that is up."""
        link = here.links.dial(there.links.address)
        until(lambda: here.changes(link)[-1:] == [LinkChange.UP], here, there)
        return link

    def test_messages_travel_both_ways_in_order(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        sent = [b"%d" % number for number in range(300)]
        assert all(here.links.send(link, payload) for payload in sent)
        until(lambda: len(there.payloads()) == 300, here, there)
        assert there.payloads() == sent
        back = there.last_link()
        assert all(there.links.send(back, payload) for payload in sent)
        until(lambda: len(here.payloads(link)) == 300, here, there)
        assert here.payloads(link) == sent
        assert here.changes(link) == [LinkChange.UP]
        assert not [item for item in there.items if isinstance(item, Changed)]

    def test_messages_sent_together_arrive_in_order(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        large = bytes(MAX_MESSAGE_BYTES // 2 + 1)
        sent = [b"%d" % number for number in range(300)] + [large, large, b"after"]
        assert here.links.send(link, *sent)
        until(lambda: len(there.payloads()) == len(sent), here, there)
        assert there.payloads() == sent
        assert not here.links.send(link, b"fits", bytes(MAX_MESSAGE_BYTES + 1), b"so does this")
        until(lambda: there.payloads()[-2:] == [b"fits", b"so does this"], here, there)

    def test_several_links_keep_apart(self, end: Callable[..., Log]) -> None:
        hub, spokes = end(), [end() for _ in range(4)]
        links = [self.connected(spoke, hub) for spoke in spokes]
        for number, (spoke, link) in enumerate(zip(spokes, links, strict=True)):
            assert spoke.links.send(link, b"%d" % number)
        until(lambda: len(hub.payloads()) == 4, hub)
        for item in hub.items:
            assert isinstance(item, Arrived)
            assert hub.links.send(item.link, item.payload + b"!")
        until(lambda: all(spoke.payloads() for spoke in spokes), hub, *spokes)
        assert [spoke.payloads() for spoke in spokes] == [[b"%d!" % number] for number in range(4)]

    def test_what_is_sent_before_the_link_is_up_arrives(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = here.links.dial(there.links.address)
        assert here.links.send(link, b"early")
        until(lambda: there.payloads() == [b"early"], here, there)

    def test_sizes(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        assert not here.links.send(link, bytes(MAX_MESSAGE_BYTES + 1))
        largest = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
        assert here.links.send(link, b"")
        assert here.links.send(link, largest)
        assert here.links.send(link, b"after")
        until(lambda: len(there.payloads()) == 3, here, there)
        assert there.payloads() == [b"", largest, b"after"]
        assert not there.links.send(there.last_link(), bytes(MAX_MESSAGE_BYTES + 1))

    def test_unknown_and_closed_links_take_nothing(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        assert not here.links.send(LinkId(link + 1000), b"lost")
        here.links.close_link(link)
        here.links.close_link(link)
        here.links.close_link(LinkId(link + 1000))
        assert not here.links.send(link, b"lost")
        assert here.links.receive() == []

    def test_an_accepted_link_whose_dialler_left_takes_nothing(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        here.links.send(link, b"hello")
        until(lambda: bool(there.payloads()), here, there)
        here.links.close_link(link)
        until(lambda: not there.links.send(there.last_link(), b"lost"), here, there)
        assert not [item for item in there.items if isinstance(item, Changed)]

    def test_a_closed_accepted_link_is_ignored(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link, other = self.connected(here, there), self.connected(here, there)
        here.links.send(link, b"hello")
        until(lambda: bool(there.payloads()), here, there)
        there.links.close_link(there.last_link())
        here.links.send(link, b"ignored")
        here.links.send(other, b"heard")
        until(lambda: b"heard" in there.payloads(), here, there)
        assert b"ignored" not in there.payloads()
        assert here.changes(link) == [LinkChange.UP]

    def test_a_flood_is_dropped_not_waited_for(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        payload, sent = bytes(32 * 1024), 0
        started = time.monotonic()
        while here.links.send(link, payload):
            sent += 1
            assert sent < 100_000, "no bound in sight"
        assert time.monotonic() - started < DEADLINE_SECONDS
        assert not here.links.send(LinkId(link + 1), payload)
        until(lambda: len(there.payloads()) >= sent, here, there)
        until(lambda: here.links.send(link, b"after the flood"), here, there)
        until(lambda: there.payloads()[-1] == b"after the flood", here, there)

    def test_a_batch_is_bounded(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        sent = sum(here.links.send(link, b"x") for _ in range(1000))
        taken, largest = 0, 0
        deadline = time.monotonic() + DEADLINE_SECONDS
        while taken < sent:
            assert time.monotonic() < deadline
            there.links.wait(0.1)
            batch = len(there.links.receive())
            taken, largest = taken + batch, max(largest, batch)
        assert largest < 1000
        there.links.receive()
        assert not there.links.unread

    def test_a_closed_listener_is_down_then_refused(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        there.links.close()
        until(lambda: LinkChange.REFUSED in here.changes(link), here)
        assert here.changes(link)[:3] == [LinkChange.UP, LinkChange.DOWN, LinkChange.REFUSED]

    def test_a_listener_that_comes_back_is_up_again(self, end: Callable[..., Log]) -> None:
        here, first = end(), end()
        link, address = self.connected(here, first), first.links.address
        first.links.close()
        until(lambda: LinkChange.REFUSED in here.changes(link), here)
        second = end(address)
        assert second.links.address == address
        until(lambda: here.changes(link)[-1] is LinkChange.UP, here, second)
        assert here.links.send(link, b"again")
        until(lambda: b"again" in second.payloads(), here, second)
        assert second.links.send(second.last_link(), b"welcome")
        until(lambda: b"welcome" in here.payloads(link), here, second)

    def test_dialling_nobody_is_refused_until_somebody_listens(self, end: Callable[..., Log]) -> None:
        here, gone = end(), end()
        address = gone.links.address
        gone.links.close()
        link = here.links.dial(address)
        until(lambda: here.changes(link) == [LinkChange.REFUSED], here)
        there = end(address)
        until(lambda: here.changes(link)[-1] is LinkChange.UP, here, there)

    def test_addresses_that_cannot_be_are_refused(self, end: Callable[..., Log]) -> None:
        here = end()
        for address in self.bad_addresses:
            with pytest.raises(ConfigError):
                here.links.dial(address)

    def test_an_address_is_taken_once(self, end: Callable[..., Log]) -> None:
        here = end()
        with pytest.raises(ConfigError):
            self.listen(here.links.address)

    def test_wait_ends_in_time(self, end: Callable[..., Log]) -> None:
        here = end()
        started = time.monotonic()
        here.links.wait(0.02)
        here.links.wait(0.0)
        assert 0.015 < time.monotonic() - started < DEADLINE_SECONDS

    def test_wake_ends_a_wait_of_another_thread(self, end: Callable[..., Log]) -> None:
        here = end()
        waiter = threading.Thread(target=here.links.wait, args=(None,))
        waiter.start()
        here.links.wake()
        joined(waiter)

    def test_wake_before_wait_is_not_lost(self, end: Callable[..., Log]) -> None:
        here = end()
        here.links.wake()
        here.links.wake()
        here.links.receive()
        started = time.monotonic()
        here.links.wait(DEADLINE_SECONDS)
        assert time.monotonic() - started < DEADLINE_SECONDS / 2
        here.links.wait(0.0)

    def test_a_message_ends_a_wait_of_another_thread(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        waiter = threading.Thread(target=there.links.wait, args=(None,))
        waiter.start()
        here.links.send(link, b"x")
        joined(waiter)
        until(lambda: there.payloads() == [b"x"], there)

    def test_a_change_ends_a_wait(self, end: Callable[..., Log]) -> None:
        here, gone = end(), end()
        gone.links.close()
        here.links.dial(gone.links.address)
        waiter = threading.Thread(target=here.links.wait, args=(None,))
        waiter.start()
        joined(waiter)
        assert [type(item) for item in here.links.receive()] == [Changed]

    def test_an_address_is_free_once_nobody_listens_and_dialled_links_go_on(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        here.links.stop_listening()
        here.links.stop_listening()
        successor = end(here.links.address)
        assert successor.links.address == here.links.address
        assert here.links.send(link, b"still here")
        until(lambda: b"still here" in there.payloads(), here, there)
        here.links.close()
        other = end()
        self.connected(other, successor)

    def test_close_is_idempotent_and_final(self, end: Callable[..., Log]) -> None:
        here, there = end(), end()
        link = self.connected(here, there)
        for _ in range(2):
            here.links.close()
        assert not here.links.send(link, b"lost")
        assert here.links.receive() == []
        here.links.wait(None)
        here.links.wake()
        here.links.close_link(link)
        with pytest.raises(ConfigError):
            here.links.dial(there.links.address)
        assert repr(here.links)

    def test_nothing_leaks(self, end: Callable[..., Log]) -> None:
        def use() -> None:
            with self.listen() as first, self.listen() as second:
                here, there = Log(first), Log(second)
                link = self.connected(here, there)
                first.dial(gone)
                first.send(link, b"x")
                until(lambda: there.payloads() == [b"x"] and len(here.items) > 1, here, there)

        listener = end()
        gone = listener.links.address
        listener.links.close()
        use()
        files, threads, tasks = len(os.listdir("/proc/self/fd")), threading.active_count(), _tasks()
        use()
        until(lambda: _tasks() <= tasks)  # the system may still be burying a thread that was joined
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def _tasks() -> int:
    """Threads of this process, native ones included."""
    return len(os.listdir("/proc/self/task"))
