"""Where a server's links listen and what peers are told to dial; what it exports of its hand-offs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ranks import MakeRank

from kvbaton.errors import ConfigError
from kvbaton.manager import Span
from kvbaton.serving.server.build import link_hosts
from kvbaton.serving.server.launch import ServeConfig, serve
from kvbaton.serving.server.local_replica import handoffs_of
from kvbaton.serving.server.rank import ServerRank
from kvbaton.serving.server.replica import gauges_of

SOMEWHERE = "tcp://10.0.0.1:7000"


def config(mode: str, host: str, advertise: str = "") -> ServeConfig:
    return ServeConfig(model="none", mode=mode, host=host, port=0, control_advertise=advertise)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        (config("prefill", "127.0.0.1"), ("127.0.0.1", "")),
        (config("prefill", "localhost"), ("127.0.0.1", "")),
        (config("prefill", "::1", "tcp://[fd00::1]:7000"), ("::1", "fd00::1")),
        (config("prefill", "0.0.0.0", SOMEWHERE), ("0.0.0.0", "10.0.0.1")),
        (config("prefill", "::", "tcp://10.0.0.1:0"), ("::", "10.0.0.1")),
        (config("decode", "0.0.0.0"), ("127.0.0.1", "")),
        (config("decode", "no-such-host.invalid"), ("127.0.0.1", "")),
    ],
)
def test_links_listen_where_peers_can_dial_and_those_of_decode_nowhere(
    given: ServeConfig, hosts: tuple[str, str]
) -> None:
    assert link_hosts(given) == hosts


@pytest.mark.parametrize(
    ("host", "says"), [("0.0.0.0", "--disaggregation-control-advertise"), ("no-such-host.invalid", "cannot be found")]
)
def test_a_prefill_server_must_be_found_somewhere(host: str, says: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of enough characters")
    secret.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        serve(ServeConfig(model="none", mode="prefill", host=host, port=0, secret_file=secret))
    assert says in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (config("null", "0.0.0.0"), False),  # it has no links, and needs no address for them
        (config("null", "no-such-host.invalid"), False),
        (config("prefill", "127.0.0.1"), False),
        (config("decode", "127.0.0.1"), True),
        (config("decode", "0.0.0.0"), False),
        (config("decode", "0.0.0.0", SOMEWHERE), True),
    ],
)
def test_an_answer_is_taken_over_from_where_other_decode_servers_can_dial(given: ServeConfig, found: bool) -> None:
    assert given.hands_over == found
    assert dataclasses.replace(given, data_parallel_size=2).hands_over == found


@pytest.mark.parametrize("advertise", ["tcp://0.0.0.0:7000", "tcp://[::]:7000"])
def test_what_is_advertised_can_be_dialled(advertise: str) -> None:
    with pytest.raises(ConfigError, match="every interface"):
        config("prefill", "127.0.0.1", advertise)


@pytest.mark.parametrize("transport", ["memory"])
def test_a_rank_exports_its_rooms_and_staging_slots(make_rank: MakeRank) -> None:
    source, target = make_rank("prefill"), make_rank("decode")
    receiver = target.manager.receiver(1, [source.manager.address])
    receiver.publish([Span("kv", 0, 40, (5, 3, 1))], token_count=40)
    told = {gauge.name: gauge.value for gauge in gauges_of(handoffs_of(target.manager, ServerRank(), "auto"))}
    assert told == {"kvbaton_rooms_live": 1, "kvbaton_rooms_leased": 1, "kvbaton_rooms_quarantined": 0}
    receiver.abort("enough")
    target.wait_until(lambda: receiver.released, "the room ends")
    assert not any(gauge.value for gauge in gauges_of(handoffs_of(target.manager, ServerRank(), "auto")))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tensor_parallel_size": 3}, r"--tensor-parallel-size 3 does not divide the model's \d+ attention heads"),
        ({"pipeline_parallel_size": 99}, "pipeline-parallel size 99 is more than the model's"),
        ({"device": "cuda"}, "--device cuda: torch sees no CUDA device"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    sizes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbaton.serving.server.launch.load", lambda *_: pytest.fail("the weights are read"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        serve(ServeConfig(model="recall", port=0, **sizes))
