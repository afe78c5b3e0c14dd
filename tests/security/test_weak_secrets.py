"""The shared secret: what is no secret is refused at the start, and what becomes a key of it is expensive to guess."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from zmq.utils import z85

from kvbaton import layout
from kvbaton.cli.main import main
from kvbaton.control.curve import CurveKeys
from kvbaton.discovery.access import read_secret, token_of
from kvbaton.errors import ConfigError
from kvbaton.manager import KVManager
from kvbaton.secret import key_of

SECRET = "kX7-a-secret-that-must-stay-one-Q2w"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str = SECRET, mode: int = 0o600) -> Path:
        path = tmp_path / "secret"
        path.write_text(text)
        path.chmod(mode)
        return path

    return make


@pytest.mark.parametrize("weak", ["", "short", "x" * 15, "a" * 64, "ab" * 16, "x" * 1025, "a secret with\nline ends"])
def test_a_weak_secret_is_refused(weak: str, write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"16 to 1024|is weak") as caught:
        read_secret(write(weak))
    assert "token_urlsafe" in str(caught.value.hint)
    for use in (lambda: CurveKeys.derive(weak), lambda: token_of(weak, "story", "h:1"), lambda: key_of(weak, "any")):
        with pytest.raises(ConfigError):
            use()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o666, 0o777])
def test_a_file_that_others_can_read_or_write_is_refused(mode: int, write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=rf"by others \(mode {mode:o}\)") as caught:
        read_secret(write(mode=mode))
    assert "chmod 600" in str(caught.value.hint)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_this_user_alone_is_read(mode: int, write: Callable[..., Path]) -> None:
    assert read_secret(write(f"  {SECRET}\n", mode)) == SECRET


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(write: Callable[..., Path]) -> None:
    path = write()
    os.chown(path, 65534, -1)
    with pytest.raises(ConfigError, match="another user"):
        read_secret(path)


@pytest.mark.parametrize("command", ["serve", "router"])
@pytest.mark.parametrize(("text", "mode"), [("a" * 32, 0o600), (SECRET, 0o644)])
def test_a_server_does_not_start_with_it(
    command: str, text: str, mode: int, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    workers = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    path = write(text, mode)
    arguments = [command, *(["--model", "recall"] if command == "serve" else workers), "--port", "0"]
    assert main([*arguments, "--secret-file", str(path)], {}) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert text not in said


def test_a_manager_refuses_a_weak_secret_too() -> None:
    pool = layout.kv_pool(range(1), pages=1, page_size=4, heads=1, head_bytes=16, dtype="float32")
    memory = bytearray(layout.pool_bytes(pool))
    region = layout.Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))
    with pytest.raises(ConfigError, match="16 to 1024"):
        KVManager.open(
            layout.CacheLayout("model", (region,), (pool,)), role="prefill", backend="memory", secret="short"
        )


def fast_hashes() -> set[bytes]:
    """What a guess costs next to nothing to compare with."""
    text = SECRET.encode()
    return {
        make(text).digest()[:32] for make in (hashlib.sha256, hashlib.sha512, hashlib.blake2b, hashlib.sha3_256)
    } | {
        hashlib.blake2b(text, digest_size=32, person=person).digest()
        for person in (b"kvbaton-server", b"kvbaton-client")
    }


def test_keys_are_stretched_once_per_process() -> None:
    secret = f"{SECRET} of this test"
    started = time.process_time()
    key_of(secret, "first")
    first = time.process_time() - started
    started = time.process_time()
    for number in range(100):
        key_of(secret, str(number))
    assert (time.process_time() - started) / 100 < first / 10
    keys = CurveKeys.derive(SECRET)
    assert not {z85.decode(keys.server_secret), z85.decode(keys.client_secret)} & fast_hashes()


def test_every_process_comes_to_the_same_keys() -> None:
    program = (
        "from kvbaton.discovery.access import token_of; from kvbaton.control.curve import CurveKeys;"
        f"print(token_of({SECRET!r}, 'router', 'h:1'), CurveKeys.derive({SECRET!r}).server_public.decode())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == [token_of(SECRET, "router", "h:1"), CurveKeys.derive(SECRET).server_public.decode()]
