"""``kvbaton check``: deliberately different pairs, each with the right verdict; layout files that lie; live servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED, WRONG
from kvbaton.layout import (
    CacheLayout,
    Coordinates,
    Pool,
    Region,
    Shard,
    Staging,
    StateTensor,
    aux_pool,
    gated_delta_net,
    index_pool,
    kv_pool,
    mla_pool,
    pool_bytes,
    scale_pool,
    state_pool,
    swa_pool,
)
from kvbaton.plan.layout_file import RankLayout, decode, encode
from kvbaton.serving.server.api import ApiServer
from kvbaton.serving.server.request_parsing import ApiConfig, Mode
from kvbaton.serving.testing.engine import ScriptedEngine, spell
from kvbaton.serving.testing.http import run, serving

SECRET = "a secret of some length"


def layout(*pools: Pool, model: str = "m", memory: str = "DRAM") -> CacheLayout:
    """Pool i in a region of its own."""
    regions = tuple(Region((i + 1) << 40, pool_bytes(pool), memory) for i, pool in enumerate(pools))  # type: ignore[arg-type]
    placed = tuple(
        msgspec.structs.replace(pool, planes=tuple(msgspec.structs.replace(plane, region=i) for plane in pool.planes))
        for i, pool in enumerate(pools)
    )
    return CacheLayout(model, regions, placed)


def kv(**changes: object) -> Pool:
    settings = {"layers": range(4), "pages": 8, "page_size": 16, "heads": 4, "head_bytes": 64, "dtype": "bfloat16"}
    settings |= changes
    return kv_pool(settings.pop("layers"), **settings)  # type: ignore[arg-type]


def swa(**changes: object) -> Pool:
    settings = {"window": 128, "pages": 8, "page_size": 16, "heads": 4, "head_bytes": 64, "dtype": "bfloat16"}
    return swa_pool(range(4, 6), **(settings | changes))  # type: ignore[arg-type]


def gdn(**changes: object) -> Pool:
    heads = {"key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 8, "conv_width": 4}
    tensors = gated_delta_net(element_bytes=2, dtype="bfloat16", **(heads | changes))  # type: ignore[arg-type]
    return state_pool(range(6, 8), tensors, slots=4)


AUX = aux_pool(slots=4, slot_bytes=256, region=0)
AUX2 = [aux_pool(slots=4, slot_bytes=256, region=0, tp_size=2, tp_rank=rank) for rank in range(2)]


def staged(one: CacheLayout, slot_bytes: int) -> CacheLayout:
    """``one`` with two slots of staging memory."""
    regions = (*one.regions, Region(60 << 40, 2 * slot_bytes))
    return msgspec.structs.replace(one, regions=regions, staging=Staging(len(one.regions), slot_bytes, 2))


def group(*layouts: CacheLayout, size: int = 0) -> list[RankLayout]:
    return [
        RankLayout(layout=one, coordinates=Coordinates(tp=i), group_size=size or len(layouts))
        for i, one in enumerate(layouts)
    ]


def tp_group(size: int, **changes: object) -> list[RankLayout]:
    aux = [aux_pool(slots=4, slot_bytes=256, region=0, tp_size=size, tp_rank=rank) for rank in range(size)]
    return group(*(layout(kv(tp_size=size, tp_rank=rank, **changes), aux[rank]) for rank in range(size)))


def stages(*cuts: range) -> list[RankLayout]:
    """One rank per stage; the last one has aux."""
    layouts = [layout(kv(layers=cut), *([AUX] if cut is cuts[-1] else [])) for cut in cuts]
    return [
        RankLayout(layout=one, coordinates=Coordinates(pp=i), group_size=len(cuts)) for i, one in enumerate(layouts)
    ]


BASE = group(layout(kv(), AUX))
SCALED = kv(head_bytes=32, dtype="float8_e4m3fn")
MLA = mla_pool(range(4), pages=8, page_size=64, latent_bytes=1024, rope_bytes=128, dtype="bfloat16")

#: name → (prefill, decode, fields that differ)
PAIRS = {
    "TP 4 with page 64 and NHD to TP 1 with page 16 and HND": (tp_group(4, page_size=64, order="NHD"), BASE, []),
    "more ranks than heads": (tp_group(8), tp_group(2), []),
    "pipeline stages to one rank, in another kind of memory": (
        stages(range(3), range(3, 4)),
        group(layout(kv(), AUX, memory="VRAM")),
        [],
    ),
    "another model": (BASE, group(layout(kv(), AUX, model="other")), ["model"]),
    "another element type": (
        BASE,
        group(layout(kv(head_bytes=32, dtype="float8_e4m3fn"), AUX)),
        ["kv.dtype", "kv.0.k.item_bytes", "kv.0.v.item_bytes"],
    ),
    "another number of heads": (BASE, group(layout(kv(heads=8), AUX)), ["kv.0.k.items", "kv.0.v.items"]),
    "page sizes with a factor of one": (BASE, group(layout(kv(page_size=7), AUX)), ["kv.page_size"]),
    "page sizes with a factor of eight": (BASE, group(layout(kv(page_size=24), AUX)), ["kv.page_size"]),
    "page sizes with a factor of sixteen": (
        group(layout(kv(page_size=528), AUX)),
        group(layout(kv(page_size=544), AUX)),
        [],
    ),
    "a packed interior": (
        group(layout(msgspec.structs.replace(kv(), packing="turbo"), AUX)),
        BASE,
        ["kv.packing"],
    ),
    "a rank is missing": (tp_group(2)[:1], BASE, ["prefill.ranks", "kv.0.k"]),
    "a stage is missing": (
        stages(range(3), range(3, 4))[:1],
        BASE,
        ["prefill.ranks", "aux", "kv.layers"],
    ),
    "another window": (
        group(layout(kv(), swa(), AUX)),
        group(layout(kv(), swa(window=64), AUX)),
        ["swa.window"],
    ),
    "decode expects a window that prefill does not keep": (BASE, group(layout(kv(), swa(), AUX)), ["swa"]),
    "prefill keeps a state that decode does not know": (group(layout(kv(), gdn(), AUX)), BASE, ["state"]),
    "index keys on one side": (
        group(layout(MLA, AUX)),
        group(layout(MLA, index_pool(range(4), pages=8, page_size=64, key_bytes=256, dtype="bfloat16"), AUX)),
        ["index"],
    ),
    "states with other heads": (
        group(layout(kv(), gdn(), AUX)),
        group(layout(kv(), gdn(value_heads=8), AUX)),
        ["state.6.conv.v.items", "state.6.recurrent.items"],
    ),
    "a convolution laid out the other way round": (
        group(
            layout(
                kv(),
                state_pool(
                    [6],
                    [
                        StateTensor(
                            name="conv", shape=(8, 4), element_bytes=2, dtype="x", axis=0, shards=(Shard("x", 8, 2),)
                        )
                    ],
                    slots=2,
                ),
                AUX,
            )
        ),
        group(
            layout(
                kv(),
                state_pool(
                    [6],
                    [
                        StateTensor(
                            name="conv", shape=(4, 8), element_bytes=2, dtype="x", axis=1, shards=(Shard("x", 8, 2),)
                        )
                    ],
                    slots=2,
                ),
                AUX,
            )
        ),
        ["state.6.conv.x.item_bytes", "state.6.conv.x.rows"],
    ),
    "scales for each page, and other pages": (
        group(layout(SCALED, scale_pool(SCALED, scale_bytes=4, row_tokens=16), AUX)),
        group(
            layout(
                kv(head_bytes=32, dtype="float8_e4m3fn", page_size=32),
                scale_pool(kv(head_bytes=32, dtype="float8_e4m3fn", page_size=32), scale_bytes=4, row_tokens=32),
                AUX,
            )
        ),
        ["kv_scale.0.k.row_tokens", "kv_scale.0.v.row_tokens"],
    ),
    "scales on one side": (
        group(layout(SCALED, scale_pool(SCALED, scale_bytes=4), AUX)),
        group(layout(SCALED, AUX)),
        ["kv_scale"],
    ),
    "staging slots that hold no block": (
        group(staged(layout(kv(), AUX), 1024)),
        group(staged(layout(kv(), AUX), 65536)),
        ["staging.slot_bytes"],
    ),
    "staging slots of different sizes, and staging on one side": (
        group(*(staged(one.layout, 1 << 16) for one in tp_group(2))),
        group(staged(layout(kv(tp_size=2), AUX2[0]), 1 << 15), layout(kv(tp_size=2, tp_rank=1), AUX2[1])),
        [],
    ),
    "K and V as one tensor": (
        BASE,
        group(layout(kv(tensors=("kv",)), AUX)),
        ["kv.0.tensors"],
    ),
    "two things at once": (
        BASE,
        group(layout(kv(dtype="float16", heads=2), AUX, model="other")),
        ["model", "kv.dtype", "kv.0.k.items", "kv.0.v.items"],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_gets_the_right_verdict_with_all_differences(name: str, tmp_path: Path, capsys) -> None:
    prefill, decode_side, fields = PAIRS[name]
    files = []
    for side, ranks in (("a", prefill), ("b", decode_side)):
        files.append(str(tmp_path / f"{side}.json"))
        Path(files[-1]).write_bytes(encode(ranks))
    assert main(["check", *files, "--json"], {}) == (1 if fields else 0)
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["compatible"] == (not fields)
    assert sorted(difference["field"] for difference in verdict["differences"]) == sorted(fields)
    for difference in verdict["differences"]:
        assert difference["prefill"] or difference["decode"]
        assert difference["what_would_work"]
    assert main(["check", *files], {}) == (1 if fields else 0)
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == (
        f"incompatible: {len(fields)} difference{'s' * (len(fields) > 1)}" if fields else "compatible"
    )
    assert all(field in text for field in fields)


def test_one_rank_need_not_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(msgspec.json.encode(BASE[0]))
    (tmp_path / "b.json").write_bytes(encode(BASE))
    assert main(["check", str(tmp_path / "a.json"), str(tmp_path / "b.json")], {}) == 0
    assert decode(encode(BASE), "x") == tuple(BASE)


# ---- files that lie --------------------------------------------------------------------------------------------------


def lying(change) -> bytes:
    """The base file after ``change`` of its decoded JSON."""
    ranks = json.loads(encode(BASE))
    change(ranks)
    return json.dumps(ranks).encode()


def set_plane(field: str, value: object):
    position = (
        "layer",
        "name",
        "region",
        "offset",
        "unit_stride",
        "row_stride",
        "item_stride",
        "item_bytes",
        "axis",
        "rows",
    )

    def change(ranks) -> None:
        ranks[0]["layout"]["pools"][0]["planes"][0][position.index(field)] = value

    return change


def set_pool(field: str, value: object):
    def change(ranks) -> None:
        ranks[0]["layout"]["pools"][0][field] = value

    return change


LIES = {
    "a unit stride that is too short": (set_plane("unit_stride", 100), "a unit spans"),
    "a row stride that overlaps": (set_plane("row_stride", 65), "overlap in memory|a unit spans"),
    "an item stride below the item": (set_plane("item_stride", 1), "every stride must be at least item_bytes=64"),
    "an offset beyond the region": (set_plane("offset", 1 << 30), "leave region 0"),
    "an offset before the region": (set_plane("offset", -64), "leave region 0"),
    "another tensor's bytes": (set_plane("offset", 4096), "share bytes|runs into"),
    "a region that is not there": (set_plane("region", 9), "region 9 does not exist"),
    "heads that do not divide": (set_plane("axis", [4, 3, 0]), "4 items do not divide over 3 ranks"),
    "a rank outside its axis": (set_plane("axis", [4, 2, 2]), "has no rank 2"),
    "an axis of nothing": (set_plane("axis", [0, 1, 0]), "axis of 0 items"),
    "a huge number of items": (set_plane("axis", [1 << 60, 1, 0]), "a unit spans"),
    "rows that do not divide the page": (set_plane("rows", 5), "5 rows do not divide the page of 16 tokens"),
    "more pages than memory": (set_pool("units", 1 << 20), "leave region 0"),
    "no pages": (set_pool("units", 0), "must be positive"),
    "an unknown kind of pool": (set_pool("kind", "ring"), "Invalid enum value 'ring'"),
    "a negative window": (set_pool("window", -1), "window=-1"),
    "no tensors": (set_pool("planes", []), "has no planes"),
    "an unknown kind of memory": (lambda r: r[0]["layout"]["regions"][0].__setitem__(2, "TAPE"), "enum value 'TAPE'"),
    "a region of nothing": (lambda r: r[0]["layout"]["regions"][0].__setitem__(1, 0), "empty or not addressable"),
    "an unknown field": (lambda r: r[0].__setitem__("stride", 1), "unknown field `stride`"),
    "the same rank twice": (lambda r: r.append(r[0]), "ranks 0 and 1 both are dp 0 pp 0 tp 0"),
    "no ranks": (lambda r: r.clear(), "0 ranks"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_by_name(name: str, tmp_path: Path, capsys) -> None:
    change, words = LIES[name]
    (tmp_path / "bad.json").write_bytes(lying(change))
    (tmp_path / "good.json").write_bytes(encode(BASE))
    for files in (("bad.json", "good.json"), ("good.json", "bad.json")):
        assert main(["check", *(str(tmp_path / file) for file in files)], {}) == WRONG
        captured = capsys.readouterr()
        assert "bad.json" in captured.err
        assert any(part in captured.err for part in words.split("|")), captured.err
        assert not captured.out


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"layout": {}}'])
def test_what_is_no_layout_file_is_refused(payload: bytes, tmp_path: Path, capsys) -> None:
    (tmp_path / "x.json").write_bytes(payload)
    assert main(["check", str(tmp_path / "x.json"), str(tmp_path / "x.json")], {}) == WRONG
    assert "not a layout file" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert main(["check", str(tmp_path / "x.json"), str(tmp_path)], {}) == WRONG
    assert "cannot be read" in capsys.readouterr().err


# ---- servers ---------------------------------------------------------------------------------------------------------


def half(
    ranks: list[RankLayout], secret: str | None = None, mode: Mode = "decode", max_positions: int = 1
) -> web.Application:
    engine = ScriptedEngine(lambda _request: spell("hi"))
    config = ApiConfig(model="m", max_positions=max_positions, mode=mode)
    return ApiServer(engine, None, config, layouts=ranks, secret=secret).app


def checked(
    prefill: list[RankLayout], decode_side: list[RankLayout], *arguments: str, secret: str | None = None
) -> int:
    async def test() -> int:
        async with serving(half(prefill, secret, "prefill")) as a, serving(half(decode_side, secret)) as b:
            return await asyncio.to_thread(main, ["check", a, b, *arguments], {})

    return run(test())


def test_two_servers_are_compared(capsys) -> None:
    assert checked(tp_group(2), BASE) == 0
    assert checked(tp_group(2), tp_group(1, page_size=7)) == 1
    assert "kv.page_size" in capsys.readouterr().out


def test_swapped_servers_and_one_server_twice_are_told(capsys) -> None:
    async def test() -> None:
        one = [msgspec.structs.replace(rank, group="p") for rank in BASE]
        two = [msgspec.structs.replace(rank, group="d") for rank in BASE]
        async with serving(half(one, None, "prefill")) as a, serving(half(two)) as b:
            for sides, count in ([(a, b), 0], [(b, a), 2], [(a, a), 2], [(b, b), 2]):
                assert await asyncio.to_thread(main, ["check", *sides, "--json"], {}) == (1 if count else 0)
                differences = json.loads(capsys.readouterr().out)["differences"]
                assert [one["field"] for one in differences if one["field"] in ("role", "group")] == (
                    [] if not count else ["role", "role"] if sides == (b, a) else ["role", "group"]
                )

    run(test())


def test_servers_that_take_prompts_of_other_lengths_are_told(capsys) -> None:
    async def test() -> None:
        sides = half(BASE, None, "prefill"), half(BASE, max_positions=2)
        async with serving(sides[0]) as a, serving(sides[1]) as b:
            assert await asyncio.to_thread(main, ["check", a, b, "--json"], {}) == 1
        told = [one for one in json.loads(capsys.readouterr().out)["differences"] if one["field"] == "max_model_len"]
        assert [(one["prefill"], one["decode"]) for one in told] == [("1", "2")]

    run(test())


def test_a_layout_is_for_operators(tmp_path: Path, capsys) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    assert checked(BASE, BASE, secret=SECRET) == FAILED
    assert "needs the shared secret" in capsys.readouterr().err
    assert checked(BASE, BASE, "--secret-file", str(tmp_path / "secret"), secret=SECRET) == 0


def test_a_server_that_hands_nothing_over(capsys) -> None:
    assert checked([], BASE) == FAILED
    assert "answers HTTP 400" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys) -> None:
    assert main(["check", "http://127.0.0.1:9", "http://127.0.0.1:9"], {}) == FAILED
    assert "does not answer" in capsys.readouterr().err
