"""What the commands say to a user who left something out or mistyped it: one line, before anything starts."""

from typing import ClassVar

import pytest
from click.testing import CliRunner, Result

from common import client
from common.broker_url import BrokerUrlError, check_broker_url
from common.cli import main
from common.wire import BrokerAddress

RUN = (["gateway"], ["worker", "--model-id", "echo"], ["serve", "--model-id", "echo"])


def run(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(main, arguments, env=env)


@pytest.mark.parametrize("url", ["foo", "http://h", "redis://h:x", "redis+sentinel://h:1,h:2", ""])
@pytest.mark.parametrize("command", RUN, ids=lambda command: command[0])
def test_a_broken_broker_url_is_a_usage_error(command: list[str], url: str):
    done = run(*command, f"--redis-url={url}")
    assert done.exit_code == 2, done.output
    assert "redis+sentinel://host:26379" in done.output and "Traceback" not in done.output


def test_the_queue_commands_check_the_url_too():
    done = run("queue", "--redis-url", "foo", "depth")
    assert done.exit_code == 2 and "redis+sentinel://" in done.output
    assert run("queue", "depth", REDIS_URL="foo").exit_code == 2, "and read TGI's variable"


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://u:p@h:6379/0", "rediss://h:1?ssl_cert_reqs=none", "unix:///a/b"),
        *("redis+sentinel://h,i:2/service", "rediss+sentinel://:p@h:26379/service/3"),
    ],
)
def test_good_urls_pass(url: str):
    check_broker_url(url)
    BrokerAddress.parse(url)


@pytest.mark.parametrize(
    "url", ["foo://u:secret@h", "redis://u:secret@h:x", "redis://h:x?password=secret"]
)
def test_no_password_is_said(url: str):
    for check in (check_broker_url, BrokerAddress.parse):
        with pytest.raises(BrokerUrlError) as refused:
            check(url)
        assert "secret" not in str(refused.value) and "://h" in str(refused.value)


def test_what_only_the_library_finds_is_the_same_error():
    with pytest.raises(BrokerUrlError):
        BrokerAddress.parse("redis://h?db=x")


@pytest.mark.parametrize("command", ["worker", "serve"])
def test_a_model_must_be_named(command: str):
    done = run(command)
    assert done.exit_code == 2
    assert "--model-id" in done.output and "`echo` is a test model" in done.output


class Recorder:
    """In the place of the client: notes what it was asked."""

    calls: ClassVar[list] = []

    def __init__(self, *urls: str, **options) -> None:
        self.calls.append(urls)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def generate(self, prompt: str, *, parameters: dict, model: str | None) -> dict:
        self.calls.append(parameters)
        return {"generated_text": "answer"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(client, "FleetClient", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder.calls


@pytest.mark.parametrize("options", [("--url", "localhost:1", "--url", "https://b:2"), ()])
def test_a_gateway_without_a_scheme_is_asked_over_http(calls: list, options: tuple[str, ...]):
    done = run("generate", "x", "--no-stream", *options)
    assert done.output == "answer\n"
    assert calls[0] == (
        ("http://localhost:1", "https://b:2") if options else ("http://127.0.0.1:8080",)
    )
    assert run("generate", "x", "--no-stream", TOKENFLEET_URL="c:3").exit_code == 0
    assert calls[2] == ("http://c:3",)


def test_a_gateway_of_another_scheme_is_refused(calls: list):
    done = run("generate", "x", "--url", "ftp://h")
    assert done.exit_code == 2 and "Given: ftp://h" in done.output and not calls


def test_a_temperature_of_zero_is_greedy(calls: list):
    run("generate", "x", "--no-stream", "--temperature", "0", "--seed", "0")
    assert calls[1] == {"max_new_tokens": 256, "seed": 0}
    run("generate", "x", "--no-stream", "--temperature", "0.5")
    assert calls[3] == {"max_new_tokens": 256, "temperature": 0.5}
