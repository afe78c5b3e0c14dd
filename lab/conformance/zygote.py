"""``python -m lab.conformance.zygote``: a process that has imported everything, and forks servers on request.

Starting an interpreter with torch takes seconds, forking one takes milliseconds; a table of topologies needs hundreds
of ranks. Requests come as lines of JSON on stdin (``{"arguments": [...], "log": "..."}``), each is answered with a line
that holds the process id. The end of stdin ends the zygote, not what it has forked.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import msgspec

import kvbaton.serving.server.launch  # noqa: F401 - what servers need is imported once, here
from kvbaton.cli.main import main
from kvbaton.serving.engine.model import load_model
from lab.conformance.requests import Start


def serve() -> None:
    load_model("recall", threads=1)  # imports what transformers imports only when a model is loaded
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who asks for a process watches it; nobody waits for it here
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Start)
        process = os.fork()
        if process == 0:
            _become(request)
        sys.stdout.write(f"{process}\n")
        sys.stdout.flush()


def _become(request: Start) -> None:
    """In the child; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(Path(request.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for ours, standard in ((null, 0), (log, 1), (log, 2)):
            os.dup2(ours, standard)
        os.close(log)
        os.close(null)
        code = main(request.arguments)
    except BaseException:  # noqa: BLE001 - the top of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
