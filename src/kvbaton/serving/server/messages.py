"""The messages of a chat, in every shape that SDKs send them and send them back, and what a template is given of them.

Rules: what an answer of ours or of another server carries besides its text (``refusal``, ``annotations``, ``audio``)
is no part of a prompt and is ignored; a kind of content that is not text is refused by name. The arguments of a tool
call are handed to the template as an object, as templates expect them.

This file must not know HTTP or tokenizers.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct, field

from kvbaton.errors import ConfigError
from kvbaton.serving.server.raw import decoded, null, refuse

#: Bytes of what is handed to a chat template as it is, and levels of it.
MAX_TEMPLATE_BYTES = 256 << 10
#: Roles whose message may say nothing: the assistant's, when it called tools or refused.
_MAY_BE_SILENT = ("assistant",)

#: One message as a chat template is given it.
Turn = dict[str, Any]


class ContentPart(Struct, frozen=True):
    """A part of a message: ``text`` or the text of a ``refusal``."""

    type: Annotated[str, Meta(max_length=32)] = "text"
    text: str | None = None
    refusal: str | None = None

    def said(self) -> str:
        if self.type == "text" and self.text is not None:
            return self.text
        if self.type == "refusal" and self.refusal is not None:
            return self.refusal
        raise ConfigError(f"messages: content of type {self.type!r} is not implemented; send text")


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: Annotated[str, Meta(min_length=1, max_length=32)]
    content: str | Annotated[list[ContentPart], Meta(max_length=4096)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: Raw = field(default_factory=null)

    def text(self) -> str:
        """Raises ConfigError for content that is none."""
        if self.content is None:
            if self.role not in _MAY_BE_SILENT:
                refuse("messages", f"a message of the role {self.role!r} needs a content")
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.said() for part in self.content)

    def turn(self) -> Turn:
        """For the template. Raises ConfigError."""
        turn: Turn = {"role": self.role, "content": self.text()}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                turn[name] = getattr(self, name)
        calls = template_value(self.tool_calls, "messages.tool_calls", list[dict[str, Any]])
        if calls:
            turn["tool_calls"] = [_with_arguments(call) for call in calls]
        return turn


def template_value(raw: Raw, name: str, kind: Any) -> Any:
    """What a template is given as it came, within bounds; None for null. Raises ConfigError."""
    return decoded(raw, kind, name, MAX_TEMPLATE_BYTES)


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, where they are JSON, are an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
