"""A program of a user of the `text-generation` package: plain, streamed, asynchronous, chat, and what goes wrong.

Runs in an environment of its own (text_generation.txt); see report.py for what it prints.
"""

from types import SimpleNamespace
from typing import Any

from report import main, outcome
from text_generation import AsyncClient, Client
from text_generation.types import Grammar, Response

MESSAGES = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi é"}]


def client_of(servers: SimpleNamespace, **changes: Any) -> Client:
    headers = {"Authorization": f"Bearer {changes.get('key', servers.key)}"}
    headers |= changes.get("headers", {})
    return Client(changes.get("url", servers.url), headers=headers, timeout=30)


def async_client_of(servers: SimpleNamespace) -> AsyncClient:
    return AsyncClient(servers.url, headers={"Authorization": f"Bearer {servers.key}"}, timeout=30)


def shown(response: Response) -> dict[str, Any]:
    return response.model_dump(mode="json")


def plain(servers: SimpleNamespace) -> Any:
    return shown(client_of(servers).generate("abc", max_new_tokens=2))


def all_parameters(servers: SimpleNamespace) -> Any:
    return shown(
        client_of(servers).generate(
            "abcdef",
            do_sample=True,
            max_new_tokens=10,
            best_of=2,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            return_full_text=True,
            stop_sequences=["d"],
            temperature=0.7,
            top_k=20,
            top_p=0.9,
            truncate=4,
            typical_p=0.9,
            watermark=True,
            decoder_input_details=True,
            top_n_tokens=2,
        )
    )


def seeded(servers: SimpleNamespace) -> Any:
    return shown(client_of(servers).generate("abc", do_sample=True, seed=7))


def streamed(servers: SimpleNamespace) -> Any:
    events = client_of(servers).generate_stream("aé", max_new_tokens=8, top_n_tokens=1)
    return [event.model_dump(mode="json") for event in events]


async def asynchronous(servers: SimpleNamespace) -> Any:
    response = await async_client_of(servers).generate("abc", stop_sequences=["b"])
    return shown(response)


async def streamed_asynchronously(servers: SimpleNamespace) -> Any:
    events = async_client_of(servers).generate_stream("abc")
    return [event.model_dump(mode="json") async for event in events]


def chat(servers: SimpleNamespace) -> Any:
    return client_of(servers).chat(MESSAGES, max_tokens=3, logprobs=True).model_dump(mode="json")


async def chat_asynchronously(servers: SimpleNamespace) -> Any:
    return (await async_client_of(servers).chat(MESSAGES, seed=1)).model_dump(mode="json")


def chat_stream(servers: SimpleNamespace) -> Any:
    """Cannot work with any server, see the test."""
    return [chunk.model_dump() for chunk in client_of(servers).chat(MESSAGES, stream=True)]


async def chat_stream_asynchronously(servers: SimpleNamespace) -> Any:
    stream = await async_client_of(servers).chat(MESSAGES, stream=True)
    return [chunk.model_dump() async for chunk in stream]


def errors(servers: SimpleNamespace) -> Any:
    """What each status becomes, by the way that was asked: in one piece, streamed, as a chat."""
    unknown = {"X-Model": "nowhere"}
    clients = {
        401: client_of(servers, key="wrong"),
        404: client_of(servers, headers=unknown),
        429: client_of(servers, url=servers.full),
        503: client_of(servers, url=servers.empty),
    }
    found = {status: _errors_of(client) for status, client in clients.items()}
    client, too_many = client_of(servers), 10**6
    found[422] = {
        "plain": outcome(lambda: client.generate("abc", max_new_tokens=too_many)),
        "stream": outcome(lambda: list(client.generate_stream("abc", max_new_tokens=too_many))),
        "chat": outcome(lambda: client.chat(MESSAGES, max_tokens=too_many)),
        "grammar": outcome(lambda: client.generate("a", grammar=Grammar(type="regex", value="("))),
    }
    return found


def _errors_of(client: Client) -> dict[str, Any]:
    return {
        "plain": outcome(lambda: client.generate("abc")),
        "stream": outcome(lambda: list(client.generate_stream("abc"))),
        "chat": outcome(lambda: client.chat(MESSAGES)),
    }


def asynchronous_errors(servers: SimpleNamespace) -> Any:
    async def generate(url: str, key: str = servers.key) -> Any:
        client = AsyncClient(url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        return await client.generate("abc")

    return {
        401: outcome(generate, servers.url, "wrong"),
        429: outcome(generate, servers.full),
        503: outcome(generate, servers.empty),
    }


if __name__ == "__main__":
    main(
        plain,
        all_parameters,
        seeded,
        streamed,
        asynchronous,
        streamed_asynchronously,
        chat,
        chat_asynchronously,
        chat_stream,
        chat_stream_asynchronously,
        errors,
        asynchronous_errors,
    )
