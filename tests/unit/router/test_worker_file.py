"""Workers that a file names."""

from pathlib import Path

import pytest

from kvbaton.errors import ConfigError
from kvbaton.serving.router.worker import Worker
from kvbaton.serving.router.worker_file import WorkerFile, parse, read
from kvbaton.serving.router.workers import Workers
from kvbaton.serving.testing.http import run


def test_what_is_new_comes_what_is_gone_goes_and_mistakes_change_nothing(tmp_path: Path, caplog, monkeypatch) -> None:
    async def test() -> None:
        given = Worker("decode", "http://given")
        workers = Workers([given], None)
        monkeypatch.setattr(workers, "_probe_soon", lambda: None)  # there is nobody to probe
        path = tmp_path / "workers"
        file = WorkerFile(path, workers)

        def urls() -> list[str]:
            return [worker.url for worker in workers.all]

        file.sync()
        file.sync()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        path.write_text("# ours\nprefill http://p:1 9000\ndecode http://d  # the first\n\ndecode http://given\n")
        file.sync()
        assert sorted(urls()) == ["http://d", "http://given", "http://p:1"]
        assert next(worker for worker in workers.all if worker.role == "prefill").bootstrap_port == 9000
        path.write_text("decode http://e\nnonsense\n")
        file.sync()
        assert sorted(urls()) == ["http://d", "http://given", "http://p:1"]
        assert "line 2" in caplog.records[-1].message
        path.write_text("decode http://e\n")
        file.sync()
        assert sorted(urls()) == ["http://e", "http://given"], "what the file did not bring it does not take"

    run(test())


def test_more_workers_than_a_router_has_are_refused_by_name_and_the_file_is_read_on(
    tmp_path: Path, caplog, monkeypatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("kvbaton.serving.router.workers.MAX_WORKERS", 2)
        workers = Workers([], None)
        monkeypatch.setattr(workers, "_probe_soon", lambda: None)
        path = tmp_path / "workers"
        file = WorkerFile(path, workers)
        path.write_text("decode http://a\ndecode http://b\ndecode http://c\n")
        file.sync()
        assert [worker.url for worker in workers.all] == ["http://a", "http://b"]
        assert "decode http://c is not taken" in caplog.text
        path.write_text("decode http://c\n")
        file.sync()
        assert [worker.url for worker in workers.all] == ["http://c"]

    run(test())


@pytest.mark.parametrize("line", ["x http://a", "decode", "prefill ftp://a", "decode http://a 1", "prefill http://a x"])
def test_a_mistake_names_its_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse(f"decode http://d\n{line}\n", tmp_path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none")
