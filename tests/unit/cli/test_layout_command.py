"""``kvbaton layout`` and ``check`` at control addresses: what running ranks say of their memory, whatever engine they
serve."""

from __future__ import annotations

import ctypes
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvbaton import CacheLayout, Coordinates, KVManager, Region, Sizes
from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED
from kvbaton.discovery.layouts import ask_layout
from kvbaton.errors import ConfigError, ExpiredError, PeerLostError
from kvbaton.layout import aux_pool, kv_pool, pool_bytes
from kvbaton.plan.layout_file import decode

SECRET = "correct horse battery staple, and then some"
AUX = bytearray(64)
PAGES = bytearray(1 << 20)


def rank(
    *,
    tp: int = 1,
    at: int = 0,
    name: str = "an engine",
    dtype: str = "float32",
    packing: str = "",
    secret: str | None = None,
) -> KVManager:
    pool = kv_pool(range(2), pages=4, page_size=16, heads=4, head_bytes=64, dtype=dtype, tp_size=tp, tp_rank=at)
    pool = type(pool)(**{**{name: getattr(pool, name) for name in pool.__struct_fields__}, "packing": packing})
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (PAGES, AUX)]
    layout = CacheLayout(
        "a model",
        (Region(addresses[0], pool_bytes(pool)), Region(addresses[1], 64)),
        (pool, aux_pool(slots=1, slot_bytes=64, region=1, tp_size=tp, tp_rank=at)),
    )
    return KVManager.open(
        layout,
        role="both",
        backend="memory",
        group=name,
        sizes=Sizes(tp=tp),
        coordinates=Coordinates(tp=at),
        secret=secret,
    )


@contextmanager
def group(tp: int = 1, **settings: str) -> Iterator[str]:
    with ExitStack() as ranks:
        managers = [ranks.enter_context(rank(tp=tp, at=at, **settings)) for at in range(tp)]  # type: ignore[arg-type]
        yield ",".join(manager.address for manager in managers)


def test_a_running_group_is_written_down_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prefill.json"
    with group(tp=2) as addresses, rank(name="another") as other:
        assert main(["layout", *addresses.split(","), "--output", str(file)]) == 0
        assert main(["layout", addresses]) == 0
        assert main(["check", addresses, other.address]) == 0
    printed = capsys.readouterr().out
    found = decode(file.read_bytes(), "the file")
    assert [(one.coordinates.tp, one.group_size, one.group) for one in found] == [
        (0, 2, "an engine"),
        (1, 2, "an engine"),
    ]
    assert found == decode(printed.splitlines()[0].encode(), "stdout")
    assert printed.splitlines()[-1] == "compatible"
    assert found[0].layout.model == "a model"


def test_what_differs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with group(packing="CPU_ATTN:vec") as theirs, group(name="another") as ours:
        assert main(["check", theirs, ours, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(one["field"], one["prefill"], one["decode"]) for one in told["differences"]] == [
        ("kv.packing", "CPU_ATTN:vec", "")
    ]


def test_a_rank_that_is_asked_serves_on() -> None:
    with rank() as asked:
        before = ask_layout(asked.address)
        assert ask_layout(asked.address) == before
        assert asked.live_rooms == 0
        assert asked.sizes()["sides"] == 0


def test_a_secret_is_needed_and_enough(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text(SECRET)
    with group(secret=SECRET) as address:
        assert main(["layout", address, "--secret-file", str(file), "--output", str(tmp_path / "out")]) == 0
        with pytest.raises(ExpiredError, match="the secret the same"):
            ask_layout(address, secret=SECRET[::-1], seconds=0.3)
        with pytest.raises(ExpiredError):
            ask_layout(address, seconds=0.3)


def test_where_no_rank_is_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(PeerLostError, match="nobody listens"):
        ask_layout(address)
    assert main(["layout", address]) == FAILED
    assert "nobody listens" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        ask_layout("tcp://10.1.2.3:5")
    with pytest.raises(ConfigError):
        ask_layout("tcp://nonsense")
