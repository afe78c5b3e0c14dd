"""``kvbaton serve`` as a process: its first lines, its answers, its end."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from refusals import refused

import kvbaton
from kvbaton.serving.fleet import free_ports

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvbaton.__file__).parents[1]), "KVBATON_TORCH_THREADS": "1"}
PATIENCE_SECONDS = 60


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvbaton.cli.main", *arguments]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that has said where it listens, and its URL."""
    process = subprocess.Popen(command("serve", *arguments), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"listens at (http://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("".join(seen))
    finally:
        process.kill()
        process.communicate()


JSON = {"Content-Type": "application/json"}


def post(url: str, **fields: object) -> urllib.request.Request:
    return urllib.request.Request(f"{url}/v1/completions", data=msgspec.json.encode(fields), headers=JSON)


def test_a_server_answers_and_finishes_its_requests_after_sigterm():
    with serving("--model", "recall", "--port", "0") as (process, url):
        with urllib.request.urlopen(post(url, prompt="a7=3MB0;?a7=", max_tokens=4, temperature=0)) as response:
            assert msgspec.json.decode(response.read())["choices"][0]["text"] == "3MB0"
        stream = post(url, prompt="a7=3MB0;?a7=", max_tokens=200, temperature=0, ignore_eos=True, stream=True)
        with urllib.request.urlopen(stream) as response:
            assert response.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            rest = response.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(PATIENCE_SECONDS) == 0


def test_what_cannot_be_served_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"kvbaton: {tmp_path} holds no config.json" in refused(capsys, "--model", str(tmp_path), "--port", "0")
    assert "kvbaton: model '/no/such/model' is no directory" in refused(capsys, "--model", "/no/such/model")
    half = ("--model", "recall", "--disaggregation-mode", "decode", "--port", "0")
    assert "without a shared secret\nhint: pass --secret-file" in refused(capsys, *half, "--host", "0.0.0.0")


def test_a_full_disk_under_the_logs_stops_nothing_and_what_the_grace_period_does_not_last_for_is_told_so():
    """Found by `python -m lab chaos`: the first line on stderr ended the server."""
    (port,) = free_ports(1)
    url, arguments = f"http://127.0.0.1:{port}", ("--port", str(port), "--grace-period-secs", "0.01")
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command("serve", "--model", "recall", *arguments), stdout=full, stderr=full, env=ENVIRONMENT
        )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(post(url, prompt="a7=3MB0;?a7=", max_tokens=4, temperature=0)) as response:
                    assert msgspec.json.decode(response.read())["choices"][0]["text"] == "3MB0"
                break
            except OSError:  # not listening yet
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        stream = post(url, prompt="a7=3MB0;?a7=", max_tokens=2000, temperature=0, ignore_eos=True, stream=True)
        with urllib.request.urlopen(stream) as response:
            assert response.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            events = response.read().splitlines()
        last = msgspec.json.decode(events[-2].removeprefix(b"data: "))
        assert last["error"]["code"] == "draining"
        assert "is stopping; send it again" in last["error"]["message"]
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
