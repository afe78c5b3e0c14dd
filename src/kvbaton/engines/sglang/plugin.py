"""What SGLang loads, in each of its processes, by the entry point ``sglang.srt.plugins``.

It adds ``kvbaton`` to the values of ``--disaggregation-transfer-backend``, and our classes behind it. SGLang only logs
what a plug-in raises and then calls the value unknown; whoever has asked for it gets the reason instead, and servers
with another backend are left alone.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from typing import Any

from kvbaton.engines.sglang.versions import check_version
from kvbaton.errors import ConfigError

NAME = "kvbaton"
FLAG = "--disaggregation-transfer-backend"

logger = logging.getLogger(__name__)


def load() -> None:
    """The entry point. Raises SystemExit where the command line asks for us and this is not the SGLang we know."""
    try:
        check_version()
        _install()
    except (ConfigError, ImportError, AttributeError) as error:
        text = f"the transfer backend {NAME} cannot be used: {error}"
        hint = getattr(error, "hint", "")
        if _asked_for(sys.argv):
            raise SystemExit(f"{text}{f' ({hint})' if hint else ''}") from error
        logger.warning("%s", text)


def _asked_for(arguments: list[str]) -> bool:
    return f"{FLAG}={NAME}" in arguments or (FLAG, NAME) in pairwise(arguments)


def _install() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([NAME])
    member = add_member(TransferBackend, NAME.upper(), NAME)

    def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
        if transfer_backend is not member or class_type is KVClassType.KVARGS:
            return original(transfer_backend, class_type)
        from kvbaton.engines.sglang import backend

        if class_type is KVClassType.MANAGER:
            install_chosen(HookRegistry, HookType)
        return {
            KVClassType.MANAGER: backend.KVBatonManager,
            KVClassType.SENDER: backend.KVBatonSender,
            KVClassType.RECEIVER: backend.KVBatonReceiver,
            KVClassType.BOOTSTRAP_SERVER: backend.KVBatonBootstrapServer,
        }[class_type]

    HookRegistry.register("sglang.srt.disaggregation.utils.get_kv_class", get_kv_class, HookType.AROUND)


def install_chosen(registry: Any, kind: Any) -> None:
    """What only a scheduler with this backend needs; naming a hook's target imports it."""
    registry.register("sglang.srt.disaggregation.decode.DecodeTransferQueue._defer_release", no_timer, kind.BEFORE)
    registry.register(
        "sglang.srt.disaggregation.common.conn.CommonKVReceiver.query_prefill_dp_ranks", _query_dp, kind.AROUND
    )
    registry.apply_hooks()


def _query_dp(original: Callable[..., Any], *arguments: Any) -> Any:
    from kvbaton.engines.sglang import backend

    return backend.query_prefill_dp_ranks(original, *arguments)


def add_member(kind: type[Enum], name: str, value: str) -> Enum:
    """A further member of an Enum, in place: SGLang looks its backends up by value. The one that is there, if it is."""
    if value in kind._value2member_map_:
        return kind(value)
    member = object.__new__(kind)
    member._name_, member._value_ = name, value
    member.__objclass__ = kind  # type: ignore[attr-defined]
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[value] = member
    return member


def no_timer(queue: Any, decode_req: Any) -> None:
    """Before SGLang keeps a failed request's pages aside: for as long as a write may touch them, not for 30 s."""
    if getattr(decode_req.kv_receiver.kv_mgr, "proves_release", False):
        queue.deferred_kv_release_timeout = math.inf
