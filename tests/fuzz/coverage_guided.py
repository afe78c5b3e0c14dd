"""Coverage-guided fuzzing of the codec and of the cores with atheris: ``python tests/fuzz/coverage_guided.py``.

Two targets: ``codec`` (bytes to ``messages.decode``, re-encoded where they are a message) and ``core`` (bytes are the
choices of a siege, or messages; see ``fuzz.siege``). Each runs in a process of its own for a bounded time and reports
executions, covered edges, and the input that broke it, if one did; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("codec", "core")
MAX_INPUT_BYTES = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=TARGETS, help="run this one here, as the child does")
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    if options.target:
        child(options.target, options.rest)
        return 0
    results = [fuzz(target, options.seconds) for target in TARGETS]
    print(json.dumps({"targets": results}, indent=1))
    return 1 if any(result["broken"] for result in results) else 0


def fuzz(target: str, seconds: int) -> dict[str, object]:
    """Run one target in a child process; what libFuzzer says of it."""
    with tempfile.TemporaryDirectory(prefix=f"kvbaton-fuzz-{target}-") as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds(target)):
            (corpus / f"seed-{number}").write_bytes(seed)
        libfuzzer = [
            str(corpus),
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            "-timeout=20",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            f"-artifact_prefix={directory}/",
        ]
        command = [sys.executable, __file__, "--target", target, "--", *libfuzzer]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds + 120, check=False)
        said = done.stdout + done.stderr
        executions = re.search(r"number_of_executed_units:\s*(\d+)", said)
        covered = [int(number) for number in re.findall(r"cov: (\d+)", said)]
        broken = done.returncode != 0
        if broken:
            print(said[-6000:], file=sys.stderr)
            for artifact in Path(directory).glob("*-*"):
                print(f"{artifact.name}: {artifact.read_bytes().hex()}", file=sys.stderr)
        return {
            "target": target,
            "seconds": seconds,
            "executions": int(executions[1]) if executions else 0,
            "covered_edges": max(covered, default=0),
            "corpus": len(list(corpus.iterdir())),
            "broken": broken,
        }


def seeds(target: str) -> list[bytes]:
    """Real messages, so that the fuzzer need not discover msgpack."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    from random import Random

    from fuzz.siege import KINDS, Siege

    from kvbaton.protocol.messages import encode

    siege, random = Siege(), Random(1)
    siege.serve_a_room(random)
    messages = [*siege.recorded, *(encode(siege.message(random, siege.scene.source)) for _ in range(4 * len(KINDS)))]
    if target == "codec":
        return messages
    return [*(b"\xff" + message for message in messages), *(random.randbytes(400) for _ in range(20))]


def child(target: str, arguments: list[str]) -> None:
    import atheris

    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    with atheris.instrument_imports(include=["kvbaton"]):
        from fuzz.bytes_as_choices import Choices
        from fuzz.siege import Siege
        from unit.protocol import scene

        from kvbaton.errors import MessageError
        from kvbaton.protocol.messages import decode, encode

    def codec(data: bytes) -> None:
        try:
            message = decode(data)
        except MessageError:
            return
        if decode(encode(message)) != message:
            raise AssertionError(f"{message} does not come back as it was")

    filled: dict[str, dict[int, Any]] = {}

    def fill(rank: Any) -> None:
        """The bytes of a source are the same each time: computed once."""
        if rank.name not in filled:
            slowly(rank)
            filled[rank.name] = {at: buffer.copy() for at, buffer in rank.memory.items()}
        for at, buffer in filled[rank.name].items():
            rank.memory[at][:] = buffer

    slowly, scene.fill = scene.fill, fill

    def core(data: bytes) -> None:
        siege = Siege()
        siege.world.checking = False  # after each step of the siege, not after each event
        if data[:1] == b"\xff":  # messages as they are, after an honest beginning
            siege.scene.start()
            siege.raw(data[1:])
        else:
            choices = Choices(data)
            while choices.left:
                step = choices.randint(0, 7)
                if step < 5:
                    siege.lie(choices, 6)
                elif step == 5:
                    siege.pass_time(choices.choice([0.3, 3.0, 12.0]))
                elif step == 6:
                    siege.ask_the_liar(choices)
                else:
                    siege.serve_a_room(choices)
                siege.check()
        siege.end(serve=data[-1:] == b"s")

    atheris.Setup([sys.argv[0], *arguments], codec if target == "codec" else core)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
