"""The command line: dispatch, exit codes, errors in one line."""

import asyncio
import json

import pytest
from aiohttp import web

from kvbaton.cli.main import main
from kvbaton.cli.program import FAILED, INTERRUPTED, WRONG
from kvbaton.errors import ConfigError, PeerLostError
from kvbaton.serving.evaluation.recall import make_prompts
from kvbaton.serving.server.lifecycle import port_of, reserve
from kvbaton.serving.testing.http import run, serving


@pytest.fixture(autouse=True)
def keep_signals_and_logging(monkeypatch):
    """The commands set these for a process of their own."""
    monkeypatch.setattr("kvbaton.cli.serve.exit_on_sigterm", lambda: None)
    monkeypatch.setattr("kvbaton.cli.router.exit_on_sigterm", lambda: None)
    monkeypatch.setattr("kvbaton.cli.program.start_logging", lambda _level: None)


def test_help_and_version_name_the_commands(capsys):
    for arguments in (["--help"], ["--version"], ["serve", "--help"], ["router", "--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments, {})
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "serve" in text
    assert "KVBATON_PAGE_SIZE" in text


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["serve"], ["serve", "--model"], ["serve", "--model", "m", "--port", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert main(arguments, {}) == WRONG
    assert not capsys.readouterr().out


def test_a_router_without_workers_says_so(capsys):
    assert main(["router", "--prefill", "http://127.0.0.1:1"], {}) == WRONG
    captured = capsys.readouterr()
    assert "kvbaton: a router needs at least one --decode URL" in captured.err
    assert "kvbaton router: " in captured.err  # the settings in use
    assert not captured.out


def test_a_port_in_use_is_one_line_and_a_hint(capsys):
    with reserve("127.0.0.1", 0) as taken:
        taken.listen()
        workers = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
        port = port_of(taken)
        assert main(["router", *workers, "--port", str(port)], {}) == WRONG
    error = capsys.readouterr().err
    assert f"kvbaton: port {port} at 127.0.0.1 is in use" in error
    assert "hint: stop what listens there" in error
    assert "Traceback" not in error


def test_errors_become_exit_codes(monkeypatch, capsys):
    def raising(error):
        def run(_options):
            raise error

        return run

    for error, code in [
        (ConfigError("wrong", hint="do this"), WRONG),
        (PeerLostError("gone"), FAILED),
        (KeyboardInterrupt(), INTERRUPTED),
    ]:
        monkeypatch.setattr("kvbaton.cli.router.run", raising(error))
        assert main(["router"], {}) == code
    error = capsys.readouterr().err
    assert "kvbaton: wrong\nhint: do this\n" in error
    assert "kvbaton: gone\n" in error


def recall_server(answers: dict[str, str], *, fail: bool = False) -> web.Application:
    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "recall"}]})

    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("recall", 0, 4)
        if fail:
            return web.json_response({"error": {"message": "no"}}, status=503)
        return web.json_response({"choices": [{"text": answers[body["prompt"]]}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", completions)
    return app


def evaluate(app: web.Application, *arguments: str) -> int:
    """The command runs its own loop, so it runs beside the server's."""

    async def test() -> int:
        async with serving(app) as url:
            return await asyncio.to_thread(main, ["eval", "recall", "--url", url, *arguments], {})

    return run(test())


def test_eval_recall_as_text_and_as_data(capsys):
    answers = {prompt.prompt: prompt.answer for prompt in make_prompts(8, 5)}
    wrong = next(iter(answers))
    answers[wrong] = "????"
    assert evaluate(recall_server(answers), "-n", "8", "--seed", "5") == 0
    assert capsys.readouterr().out == "recall: 0.8750 (7 of 8 right, 0 failed)\n"
    assert evaluate(recall_server(answers), "-n", "8", "--seed", "5", "--json", "--concurrency", "2") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["accuracy"], data["count"], data["correct"], data["failed"]) == (0.875, 8, 7, 0)
    assert [entry["answer"] for entry in data["answers"]] == list(answers.values())
    assert [entry["correct"] for entry in data["answers"]] == [prompt != wrong for prompt in answers]


def test_eval_that_fails_says_why(capsys):
    assert evaluate(recall_server({}, fail=True), "-n", "2") == FAILED
    captured = capsys.readouterr()
    assert "(0 of 2 right, 2 failed)" in captured.out
    assert "HTTP 503" in captured.err


def test_eval_without_a_server(capsys):
    with reserve("127.0.0.1", 0) as unused:
        url = f"http://127.0.0.1:{port_of(unused)}"
        assert main(["eval", "recall", "--url", url], {}) == FAILED
    assert f"no server answers at {url}" in capsys.readouterr().err
    assert main(["eval", "recall", "--url", "nonsense"], {}) == WRONG
    assert main(["eval", "recall", "--url", url, "--seed", "-1"], {}) == WRONG
