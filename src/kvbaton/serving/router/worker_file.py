"""A file that names workers, read again whenever it changes: ``prefill URL [BOOTSTRAP_PORT]`` or ``decode URL`` a line.

Rules: what is new in it is added, what is no longer in it is taken out as ``DELETE /workers/{id}`` does; workers from
elsewhere are not touched. A file that cannot be read, or has a mistake, changes nothing and is one warning: whoever
writes it is to replace it (rename), not to write into it.

This file must not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from kvbaton.errors import ConfigError
from kvbaton.serving.router.worker import ROLES, Worker
from kvbaton.serving.router.workers import Workers, parse_worker

INTERVAL_SECONDS = 1.0
MAX_FILE_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class WorkerFile:
    def __init__(self, path: Path, workers: Workers) -> None:
        self._path = path
        self._workers = workers
        self._text: str | None = None
        self._own: dict[str, Worker] = {}
        self._trouble = ""

    def sync(self) -> None:
        """Read it, if it has changed, and apply the difference."""
        try:
            text = read(self._path)
            if text == self._text:
                return
            named = {worker.id: worker for worker in parse(text, self._path)}
        except ConfigError as error:
            if error.message != self._trouble:
                _log.warning("%s; the workers stay as they are", error.message)
            self._trouble = error.message
            return
        self._text, self._trouble = text, ""
        there = {worker.id: worker for worker in self._workers.all}
        for gone in self._own.keys() - named.keys():
            if gone in there:
                self._workers.remove(there[gone])
                _log.info("%s is no longer in %s", there[gone], self._path)
        self._own = {id_: worker for id_, worker in self._own.items() if id_ in named}
        for new in (worker for id_, worker in named.items() if id_ not in there):
            try:
                self._workers.add(new)
            except ConfigError as error:
                _log.warning("--workers-file %s: %s is not taken: %s", self._path, new, error.message)
                continue
            self._own[new.id] = new

    async def watch_forever(self) -> None:
        """Until cancelled."""
        while True:
            self.sync()
            await asyncio.sleep(INTERVAL_SECONDS)


def read(path: Path) -> str:
    """The text of such a file. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--workers-file {path}: more than {MAX_FILE_BYTES} bytes name no workers")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--workers-file {path} cannot be read: {error}") from None


def parse(text: str, path: Path) -> list[Worker]:
    """The workers that are named; ``#`` begins a comment. Raises ConfigError, which names the line."""
    found: dict[str, Worker] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        role, *values = line.partition("#")[0].split() or [""]
        if not role:
            continue
        known = next((one for one in ROLES if one == role), None)
        if known is None or not values:
            raise ConfigError(f"--workers-file {path}, line {number}: a line is `prefill URL [PORT]` or `decode URL`")
        try:
            worker = parse_worker(known, values)
        except ConfigError as error:
            raise ConfigError(f"--workers-file {path}, line {number}: {error.message}") from None
        found[worker.id] = worker
    return list(found.values())
