"""The transfer backend, with every call that SGLang makes of it written down: what the contract test replays.

Loaded by SGLang as a further plug-in; lines go to a file for each role in the directory that the environment names.
Only what the contract fixes is kept: order, numbers of pages and states, no ids, addresses or times.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from kvbaton.engines.sglang import plugin
from lab.sglang.contract import DIRECTORY

_POLLED = (0, 2, 4)
SENDER = ("__init__", "pop_decode_prefix_len", "init", "send", "poll", "abort", "clear", "failure_exception")
RECEIVER = ("__init__", "init", "send_metadata", "poll", "abort", "ensure_abort_notified", "clear", "failure_exception")


def load() -> None:
    """The entry point; it may come before that of the backend or after it."""
    install = plugin.install_chosen

    def install_recorded(registry: Any, kind: Any) -> None:
        install(registry, kind)
        from kvbaton.engines.sglang import backend

        for name in SENDER:
            _record(backend.KVBatonSender, "prefill", name)
        for name in RECEIVER:
            _record(backend.KVBatonReceiver, "decode", name)

    plugin.install_chosen = install_recorded


def _record(kind: type, role: str, name: str) -> None:
    method = getattr(kind, name)

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        inside = getattr(self, "_recording", False)  # a call of ours to ourselves
        self._recording = True
        try:
            result = method(self, *arguments, **more)
        except Exception as error:
            if not inside:
                _note(role, self.bootstrap_room, name, [getattr(error, "is_from_another_rank", None)])
            raise
        finally:
            self._recording = inside
        if not inside and (name != "poll" or (result in _POLLED and getattr(self, "_polled", None) != result)):
            if name == "poll":
                self._polled = result
            _note(role, self.bootstrap_room, name, _carried(name, arguments, more, result))
        return result

    setattr(kind, name, call)


def _note(role: str, room: int, name: str, carried: Any) -> None:
    with (Path(os.environ[DIRECTORY]) / f"{role}.jsonl").open("ab") as file:
        file.write(msgspec.json.encode([room, name, carried]) + b"\n")


def _states(given: Any) -> Any:
    return None if given is None else [len(units) for units in given]


def _carried(name: str, arguments: tuple[Any, ...], more: dict[str, Any], result: Any) -> Any:
    if name in ("pop_decode_prefix_len", "poll"):
        return [int(result)]
    if name == "init":
        return [int(arguments[0])]
    if name == "send":
        return [len(arguments[0]), _states(arguments[1] if len(arguments) > 1 else more.get("state_indices"))]
    if name == "send_metadata":
        return [len(arguments[0]), _states(arguments[2]), int(more.get("decode_prefix_len") or 0)]
    return []
