"""The errors of the `openai` package, by the status that each is made from, and what it tries again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import openai
import pytest

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

MESSAGES = [{"role": "user", "content": "Hi"}]
Make = Callable[..., openai.OpenAI]


@pytest.fixture
def make(servers) -> Iterator[Make]:
    """Clients of a gateway; they do not try again unless told to."""
    clients: list[openai.OpenAI] = []

    def make(url: str = servers.url, key: str = servers.key, **values) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, **{"max_retries": 0} | values)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@contextmanager
def failing(
    error: type[openai.APIStatusError], code: str | None, kind: str, param: str | None = None
) -> Iterator[pytest.ExceptionInfo]:
    with pytest.raises(openai.APIStatusError) as failure:
        yield failure
    value = failure.value
    assert type(value) is error, value
    assert (value.code, value.type, value.param) == (code, kind, param), value
    assert value.request_id and value.message


def test_wrong_key(make: Make):
    with failing(openai.AuthenticationError, "invalid_api_key", "authentication_error"):
        make(key="wrong").completions.create(model="echo", prompt="a")


def test_unknown_model(make: Make):
    with failing(
        openai.NotFoundError, "model_not_found", "invalid_request_error", "model"
    ) as failure:
        make().completions.create(model="gpt-9", prompt="a")
    assert all(name in failure.value.message for name in ("gpt-9", "echo", "tiny"))
    with failing(openai.NotFoundError, "model_not_found", "invalid_request_error", "model"):
        make().models.retrieve("gpt-9")


def test_unknown_route(make: Make):
    with failing(openai.NotFoundError, None, "invalid_request_error"):
        make().embeddings.create(model="echo", input="a")


def test_broken_rules(make: Make):
    completions = make().completions
    with failing(openai.BadRequestError, None, "invalid_request_error", "temperature"):
        completions.create(model="echo", prompt="a", temperature=3)
    with failing(openai.BadRequestError, None, "invalid_request_error", "suffix"):
        completions.create(model="echo", prompt="a", suffix="z")
    with failing(openai.BadRequestError, None, "invalid_request_error", "nonsense"):
        completions.create(model="echo", prompt="a", extra_body={"nonsense": 1})
    code = "context_length_exceeded"
    with failing(openai.BadRequestError, code, "invalid_request_error", "prompt"):
        completions.create(model="echo", prompt="a", max_tokens=10**6)


def test_broken_rules_of_a_stream(make: Make):
    """Told before the stream begins, so that they have a status."""
    with failing(openai.BadRequestError, None, "invalid_request_error", "n"):
        make().chat.completions.create(model="echo", messages=MESSAGES, n=0, stream=True)


def test_template_that_refuses(make: Make):
    messages = [{"role": "system", "content": "Be kind"}]
    with failing(
        openai.UnprocessableEntityError, "template_error", "invalid_request_error"
    ) as failure:
        make().chat.completions.create(model="tiny", messages=messages)
    assert "there is no system role" in failure.value.message


def test_grammar_that_fails_at_the_worker(make: Make):
    with failing(openai.BadRequestError, None, "invalid_request_error") as failure:
        make().chat.completions.create(
            model="echo", messages=MESSAGES, response_format={"type": "json_object"}
        )
    assert "grammar is not supported by the echo model" in failure.value.message


def test_too_long_a_body(make: Make):
    with failing(openai.APIStatusError, "payload_too_large", "invalid_request_error") as failure:
        make().completions.create(model="echo", prompt="a" * 2_000_000)
    assert failure.value.status_code == 413


def test_overload(make: Make, servers):
    with failing(openai.RateLimitError, "rate_limit_exceeded", "rate_limit_error") as failure:
        make(servers.full).completions.create(model="echo", prompt="a")
    assert failure.value.response.headers["retry-after"] == "1"


def test_fleet_without_workers(make: Make, servers):
    with failing(openai.InternalServerError, "unavailable", "server_error") as failure:
        make(servers.empty).completions.create(model="echo", prompt="a")
    assert failure.value.status_code == 503
    assert failure.value.response.headers["retry-after"] == "1"


def test_client_waits_as_it_is_told_and_tries_again(make: Make, servers):
    """By our Retry-After: after one second, not after its own half."""
    tries: list[int] = []

    class ElsewhereThen(httpx2.HTTPTransport):
        """The first try meets the full gateway."""

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            tries.append(1)
            if len(tries) == 1:
                request.url = request.url.copy_with(port=httpx2.URL(servers.full).port)
            return super().handle_request(request)

    http_client = httpx2.Client(transport=ElsewhereThen())
    client = make(max_retries=1, http_client=http_client)
    answer = client.completions.create(model="echo", prompt="a")
    assert answer.choices[0].text == "a" and len(tries) == 2
