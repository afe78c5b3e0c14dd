"""``kvbaton check A B``: can A's ranks hand over to B's? Every difference, before any traffic.

A is the prefill side, B the decode side; each is a layout file (see ``kvbaton.plan.layout_file``), the URL of one of
our servers, or the control addresses of running ranks of any engine, ``tcp://HOST:PORT,tcp://HOST:PORT``. Exit code 0:
compatible; 1: not, or one side cannot be read; 2: wrong usage, or a layout contradicts itself.
"""

from __future__ import annotations

import argparse
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kvbaton.discovery.access import bearer, read_secret
from kvbaton.discovery.names import audience_of_url
from kvbaton.errors import AuthenticationError, ConfigError, IncompatibleError, LayoutError, PeerLostError
from kvbaton.plan.groups import compare_groups
from kvbaton.plan.layout_file import MAX_LAYOUT_BYTES, RankLayout, decode, encode

TIMEOUT_SECONDS = 10.0
MAX_READY_BYTES = 64 << 10
URLS = ("http://", "https://")
TABLE_COLUMNS = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefill",
        metavar="A",
        help="the prefill side: a layout file, a server's URL, or tcp://HOST:PORT of each rank, with commas",
    )
    parser.add_argument("decode", metavar="B", help="the decode side, likewise")
    parser.add_argument(
        "--secret-file", type=Path, default=None, help="shared secret; needed where the servers have one"
    )
    parser.add_argument("--json", action="store_true", help="data on stdout instead of a table")


def run(options: argparse.Namespace) -> int:
    secret = read_secret(options.secret_file) if options.secret_file is not None else None
    sides = [load(where, secret) for where in (options.prefill, options.decode)]
    found = [*server_differences(options.prefill, options.decode), *compare_groups(*sides)]
    if options.json:
        sys.stdout.write(msgspec.json.encode(_data(options, sides, found)).decode() + "\n")
    else:
        sys.stdout.write(_as_text(options, sides, found))
    return 1 if found else 0


def server_differences(prefill: str, decode_side: str) -> Iterator[IncompatibleError]:
    """Servers that are given as the half that they are not, or that take prompts of other lengths. Raises
    PeerLostError."""
    sides = [_ready(where) if where.startswith(URLS) else _Ready() for where in (prefill, decode_side)]
    for wanted, where, side in zip(("prefill", "decode"), (prefill, decode_side), sides, strict=True):
        if side.mode and side.mode != wanted:
            advice = "A is the prefill side, B the decode side"
            yield IncompatibleError(
                f"role: {where} is a {side.mode} server: {advice}",
                field="role",
                ours=side.mode if wanted == "prefill" else "",
                theirs=side.mode if wanted == "decode" else "",
                hint=advice,
            )
    ours, theirs = (side.max_model_len for side in sides)
    if ours and theirs and ours != theirs:
        advice = "start both with the same model"
        yield IncompatibleError(
            f"max_model_len: A takes {ours} tokens of prompt and answer, B {theirs}: {advice}",
            field="max_model_len",
            ours=str(ours),
            theirs=str(theirs),
            hint=advice,
        )


class _Ready(msgspec.Struct):
    mode: str = ""
    max_model_len: int = 0


def _ready(url: str) -> _Ready:
    """What a server says of itself; nothing where it says nothing."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/ready", timeout=TIMEOUT_SECONDS) as response:
            payload = bytes(response.read(MAX_READY_BYTES))
    except urllib.error.HTTPError as error:  # it is not ready, and says so with the same body
        payload = bytes(error.read(MAX_READY_BYTES))
    except (OSError, ValueError) as error:
        raise PeerLostError(f"{url} does not answer: {getattr(error, 'reason', None) or error}") from None
    try:
        return msgspec.json.decode(payload, type=_Ready)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Ready()


def load(where: str, secret: str | None = None) -> tuple[RankLayout, ...]:
    """The ranks in a file, behind a URL, or at control addresses. Raises ConfigError, AuthenticationError,
    PeerLostError, ExpiredError."""
    if where.startswith("tcp://"):
        from kvbaton.discovery.layouts import ask_layout

        return decode(encode([ask_layout(address, secret=secret) for address in where.split(",")]), where)
    if where.startswith(URLS):
        return decode(_fetch(f"{where.rstrip('/')}/layout", secret), where)
    path = Path(where)
    try:
        if path.stat().st_size > MAX_LAYOUT_BYTES:
            raise LayoutError(f"{where}: more than {MAX_LAYOUT_BYTES} bytes are no layout")
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from None
    return decode(payload, where)


def _fetch(url: str, secret: str | None) -> bytes:
    request = urllib.request.Request(url, headers=dict(bearer(secret, "story", audience_of_url(url))))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return bytes(response.read(MAX_LAYOUT_BYTES + 1))
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise AuthenticationError(f"{url} refuses: it needs the shared secret", hint="pass --secret-file") from None
        raise PeerLostError(f"{url} answers HTTP {error.code}; is it a prefill or decode server?") from None
    except (OSError, ValueError) as error:
        raise PeerLostError(f"{url} does not answer: {getattr(error, 'reason', None) or error}") from None


def _data(
    options: argparse.Namespace, sides: Sequence[Sequence[RankLayout]], found: Sequence[IncompatibleError]
) -> dict[str, object]:
    return {
        "compatible": not found,
        "prefill": {"from": options.prefill, "ranks": len(sides[0]), "pools": _pools(sides[0])},
        "decode": {"from": options.decode, "ranks": len(sides[1]), "pools": _pools(sides[1])},
        "differences": [_difference(error) for error in found],
    }


def _difference(error: IncompatibleError) -> dict[str, object]:
    return {
        "field": error.field,
        "prefill": error.ours,
        "decode": error.theirs,
        "what_would_work": error.hint,
        "message": error.message,
    }


def _pools(ranks: Sequence[RankLayout]) -> dict[str, str]:
    """Kind, page size, element type and memory of each pool, for people."""
    lines: dict[str, str] = {}
    for rank in ranks:
        for pool in rank.layout.pools:
            unit = f"pages of {pool.rows} tokens" if pool.paged else "slots"
            window = f", window {pool.window}" if pool.window else ""
            memory = rank.layout.regions[pool.planes[0].region].memory
            lines.setdefault(pool.name, f"{pool.units} {unit}{window}, {pool.dtype}, {memory}")
    return lines


def _as_text(
    options: argparse.Namespace, sides: Sequence[Sequence[RankLayout]], found: Sequence[IncompatibleError]
) -> str:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise ConfigError(f"the table needs the package {error.name!r}", hint="pip install 'kvbaton[serve]'") from None
    out = io.StringIO()
    console = Console(file=out, width=TABLE_COLUMNS, force_terminal=False, highlight=False, markup=False)
    for name, where, ranks in (("prefill", options.prefill, sides[0]), ("decode", options.decode, sides[1])):
        console.print(f"{name}: {where}, {len(ranks)} rank{'s' if len(ranks) > 1 else ''}")
        for pool, line in _pools(ranks).items():
            console.print(f"  {pool}: {line}")
    if found:
        table = Table()
        for heading in ("field", "prefill", "decode", "what would work"):
            table.add_column(heading, overflow="fold")
        for difference in found:
            advice = difference.hint or difference.message
            table.add_row(difference.field, difference.ours, difference.theirs, advice)
        console.print(table)
    verdict = f"incompatible: {len(found)} difference{'s' if len(found) > 1 else ''}" if found else "compatible"
    console.print(verdict)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
