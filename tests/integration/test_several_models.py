"""Two models on one broker behind one gateway: body or header choose, every route speaks for both."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.fleet import Fleet

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

BODIES = {
    "/generate": {"inputs": "abc"},
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
}
# An echo with a salt answers something else than one without
SALTED = ("--served-model-name", "org/salted", "--echo-salt", "x")


@pytest.fixture
async def session(redis_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    fleet = Fleet(redis_url)
    try:
        await fleet.worker("--served-model-name", "plain")
        await fleet.worker(*SALTED)
        url = await fleet.gateway()
        async with aiohttp.ClientSession(url) as session:
            yield session
    finally:
        await fleet.stop()


async def ask(session, path: str, body: dict, header: str | None = None) -> tuple[int, str]:
    """Status, and the text or the error's message."""
    headers = {} if header is None else {"x-model": header}
    async with session.post(path, json={**BODIES[path], **body}, headers=headers) as response:
        answer = await response.json()
    if response.status != 200:
        error = answer["error"]
        return response.status, error["message"] if isinstance(error, dict) else error
    if path == "/generate":
        return 200, answer["generated_text"]
    choice = answer["choices"][0]
    assert answer["model"] in ("plain", "org/salted")
    return 200, choice.get("text") or choice["message"]["content"]


async def test_requests_find_their_model(session):
    for path in BODIES:
        texts = {}
        for name in ("plain", "org/salted"):
            by_body = await ask(session, path, {"model": name})
            assert by_body == await ask(session, path, {}, header=name)
            assert by_body == await ask(session, path, {"model": name}, header=name)
            assert by_body == await ask(session, path, {"model": "tgi"}, header=name)
            assert by_body[0] == 200, by_body
            texts[name] = by_body[1]
        assert texts["plain"] == "abc" != texts["org/salted"]
        await _refusals(session, path)
    await _descriptions(session)
    await _other_routes(session)


async def _refusals(session, path: str) -> None:
    rule = 400 if path.startswith("/v1/") else 422
    for status, message in (
        await ask(session, path, {"model": "third"}),
        await ask(session, path, {}, header="third"),
    ):
        assert status == 404
        assert message == ("The model `third` is not served here. Served: `org/salted`, `plain`")
    status, message = await ask(session, path, {"model": "plain"}, header="org/salted")
    assert status == rule and "`plain` and `org/salted`" in message
    status, message = await ask(session, path, {})
    assert status == rule and "`model` must name one of the models served" in message


async def _descriptions(session) -> None:
    async with session.get("/v1/models") as response:
        models = (await response.json())["data"]
    assert [model["id"] for model in models] == ["org/salted", "plain"]
    async with session.get("/v1/models/org/salted") as response:
        assert (await response.json())["id"] == "org/salted"
    async with session.get("/info") as response:
        info = await response.json()
    assert [model["model"] for model in info["models"]] == ["org/salted", "plain"]
    assert all(model["is_ready"] for model in info["models"])


async def _other_routes(session) -> None:
    header = {"x-model": "plain"}
    async with session.post("/tokenize", json={"inputs": "abc"}, headers=header) as response:
        assert len(await response.json()) == 3
    instances = {"instances": [{"inputs": "abc"}, {"inputs": "abc", "model": "org/salted"}]}
    async with session.post("/vertex", json=instances) as response:
        assert response.status == 422
    instances["instances"][0]["model"] = "plain"
    async with session.post("/vertex", json=instances) as response:
        one, two = (await response.json())["predictions"]
        assert one == "abc" != two


async def test_an_idempotency_key_is_of_one_model(session):
    headers = {"idempotency-key": "k"}
    for name, status in (("plain", 200), ("plain", 200), ("org/salted", 422)):
        named = {**headers, "x-model": name}
        async with session.post("/generate", json=BODIES["/generate"], headers=named) as response:
            assert response.status == status, name
