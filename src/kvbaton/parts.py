"""The parts of one rank's manager, made by name: its control links, its data plane, the registry's client."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbaton.control.address import Address
from kvbaton.control.base import Links
from kvbaton.control.zmq import ZmqLinks
from kvbaton.discovery import make_membership
from kvbaton.discovery.placement import group_of
from kvbaton.discovery.registry import RegistryCoordinates, Route, Sizes, check_inside
from kvbaton.errors import ConfigError
from kvbaton.layout import Coordinates
from kvbaton.transports import make_transport
from kvbaton.transports.base import Transport

if TYPE_CHECKING:
    from kvbaton.discovery.membership import Membership


@dataclass(frozen=True, slots=True)
class Parts:
    """Open; whoever takes them closes them."""

    links: Links
    transport: Transport
    registry: Membership | None
    group: str  #: of the rooms' ranks: one data-parallel rank of the engine


def new_instance() -> str:
    """A fresh instance id: names one process for as long as it lives."""
    return uuid.uuid4().hex


def make_parts(
    layout_digest: str,
    *,
    backend: str,
    bind: Address,
    advertise: str,
    registry: str,
    registers: bool,
    secret: str | None,
    instance: str,
    group: str,
    sizes: Sizes,
    coordinates: Coordinates,
) -> Parts:
    """As :meth:`kvbaton.manager.KVManager.open` describes them. ``registers``: the rank is one that others look up.

    Raises ConfigError or TransportError; nothing stays open then.
    """
    where = RegistryCoordinates(dp=coordinates.dp, pp=coordinates.pp, cp=coordinates.cp, tp=coordinates.tp)
    check_inside(where, sizes)
    if sizes.ranks > 1 and not group:
        raise ConfigError(f"group: name the engine instance that the {sizes.ranks} ranks belong to, alike on each")
    group = group or new_instance()
    rooms_group = group_of(group, coordinates.dp, sizes.dp)
    with ExitStack() as made:
        links = ZmqLinks(str(bind), secret=secret, advertise=advertise)
        made.callback(links.close)
        membership = None
        if registry:
            route = Route(
                instance=instance,
                group=group,
                address=links.address,
                layout_digest=layout_digest,
                http_port=0,
                coordinates=where,
                sizes=sizes,
            )
            membership = make_membership(registry, route if registers else None, secret)
            made.callback(membership.close)
        transport = make_transport(backend, instance)
        made.pop_all()
    return Parts(links, transport, membership, rooms_group)
