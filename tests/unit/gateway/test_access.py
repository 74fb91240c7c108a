"""Keys with names at the routes: who comes in, in which class, whose a request is, and what is written of it."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from common.messages import Failure, Frame
from gateway import file_watch
from gateway.api_keys import line_for

BODY = {"inputs": "Hi"}
HI = {"messages": [{"role": "user", "content": "Hi"}]}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(
        f"{line_for('web', 'w3b')}\n{line_for('other', '0ther')}\n"
        + line_for("batch", "b4tch").replace(" }", ", priority = 2 }")
        + "\n"
        + line_for("first", "f1rst").replace(" }", ", priority = 0 }")
    )
    return path


@pytest.fixture
async def client(make_client, keys_file):
    return await make_client(api_keys_file=str(keys_file), api_key="fixed")


async def test_every_key_opens_and_no_other(client):
    for key in ("w3b", "b4tch", "fixed"):
        assert (await client.post("/generate", json=BODY, headers=bearer(key))).status == 200
    for key in ("W3B", "web", ""):
        response = await client.post("/generate", json=BODY, headers=bearer(key))
        assert response.status == 401 and response.headers["www-authenticate"] == "Bearer"
    response = await client.post("/v1/chat/completions", json=HI, headers=bearer("no"))
    error = (await response.json())["error"]
    assert response.status == 401 and error["type"] == "authentication_error"
    assert error["code"] == "invalid_api_key"


async def test_open_routes_need_no_key_and_work_does(client):
    for path in ("/health", "/info", "/metrics", "/v1/models", "/docs", "/openapi.json"):
        assert (await client.get(path)).status == 200, path
    for path in ("/", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations", "/vertex"):
        assert (await client.post(path, json=BODY)).status == 401, path
    assert (await client.get("/requests/1")).status == 401


async def test_preflight_needs_no_key(client):
    headers = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-model",
    }
    response = await client.options("/v1/chat/completions", headers=headers)
    assert response.status == 204
    allowed = response.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "content-type", "x-model", "last-event-id"} <= set(allowed)
    response = await client.post("/generate", json=BODY, headers={"origin": "https://a.example"})
    assert response.status == 401, "a browser may read why"
    assert response.headers["access-control-allow-origin"] == "*"
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"retry-after", "x-request-id", "x-generated-tokens"} <= set(exposed)


@pytest.mark.parametrize(
    ("key", "asked", "priority"),
    [
        ("w3b", None, 1),
        ("w3b", 0, 0),
        ("b4tch", None, 2),
        ("b4tch", 0, 2),
        ("f1rst", None, 0),
        ("f1rst", 2, 2),
        ("fixed", 0, 0),
    ],
)
async def test_a_key_has_the_class_of_its_requests(client, fleet, key, asked, priority):
    body = BODY if asked is None else {**BODY, "priority": asked}
    assert (await client.post("/generate", json=body, headers=bearer(key))).status == 200
    instances = {"instances": [body]}
    assert (await client.post("/vertex", json=instances, headers=bearer(key))).status == 200
    assert [request.priority for request in fleet.requests] == [priority, priority]


async def test_the_name_is_written_and_the_key_is_not(client, fleet, caplog):
    caplog.set_level("DEBUG")
    await client.post("/generate", json=BODY, headers=bearer("w3b"))
    (line,) = [record for record in caplog.records if record.name == "gateway.access"]
    assert line.key == "web" and fleet.requests[0].tenant == "web"
    metrics = await (await client.get("/metrics")).text()
    assert 'tokenfleet_key_requests_total{key="web"} 1.0' in metrics
    assert 'tokenfleet_key_tokens_total{key="web",kind="generated"} 2.0' in metrics
    assert 'tokenfleet_key_tokens_total{key="web",kind="prompt"} 2.0' in metrics
    for text in (metrics, caplog.text):
        assert "w3b" not in text


async def test_requests_of_other_keys_are_unknown(client, fleet):
    headers = {**bearer("w3b"), "idempotency-key": "mine"}
    response = await client.post("/generate", json=BODY, headers=headers)
    path = f"/requests/{response.headers['x-request-id']}"
    for method, target in (("GET", path), ("DELETE", path), ("GET", f"{path}/stream")):
        response = await client.request(method, target, headers=bearer("0ther"))
        assert response.status == 404, (method, target)
    assert fleet.cancelled.empty()
    headers = {**bearer("0ther"), "idempotency-key": "mine"}
    await client.post("/generate", json=BODY, headers=headers)
    assert len({request.id for request in fleet.requests}) == 2, "a key's own retries only"
    mine, other = fleet.requests
    assert mine.fingerprint != other.fingerprint


async def test_a_changed_file_counts_at_once(make_client, keys_file, monkeypatch):
    monkeypatch.setattr(file_watch, "LOOK_S", 0.01)
    client = await make_client(api_keys_file=str(keys_file))
    keys_file.write_text(line_for("new", "n3w"))
    while (await client.post("/generate", json=BODY, headers=bearer("n3w"))).status == 401:
        pass
    assert (await client.post("/generate", json=BODY, headers=bearer("w3b"))).status == 401


async def test_a_full_gateway_is_divided_by_weight(make_client, fleet, tmp_path):
    path = tmp_path / "weights.toml"
    heavy = line_for("heavy", "h34vy").replace(" }", ", weight = 3 }")
    path.write_text(f"{heavy}\n{line_for('light', 'l1ght')}")
    client = await make_client(api_keys_file=str(path), max_concurrent_requests=4)
    fleet.answer = None

    async def stream(key: str):
        return await client.post("/generate_stream", json=BODY, headers=bearer(key))

    flood = [await stream("l1ght") for _ in range(4)]
    assert (await stream("h34vy")).status == 429
    for response in flood[:3]:
        response.close()
        await fleet.cancelled.get()
    while client.services.admission.num_open > 1:
        await asyncio.sleep(0)
    assert (await stream("l1ght")).status == 429, "one of four places is its share"
    more = [await stream("h34vy") for _ in range(3)]
    assert [response.status for response in more] == [200] * 3
    for response in (flood[3], *more):
        response.close()


async def test_openapi_tells_of_the_key(client):
    document = await (await client.get("/openapi.json")).json()
    assert document["paths"]["/generate"]["post"]["security"] == [{"key": []}]


class Meter:
    """In the place of the limits: notes what each request would pay."""

    def __init__(self) -> None:
        self.paid: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    @asynccontextmanager
    async def held(self, key, cost):
        try:
            yield
        finally:
            self.paid.put_nowait((key.name, cost()))


@pytest.fixture
async def meter(client, fleet) -> Meter:
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(card, chat_template="{{ messages[0].content }}")
    await client.services.directory.refresh()
    client.services.limits = Meter()
    return client.services.limits


@pytest.mark.parametrize(
    ("path", "body", "cost"),
    [
        ("/generate", BODY, 2 + 2),
        ("/", {**BODY, "stream": True}, 2 + 2),
        ("/generate", {**BODY, "parameters": {"best_of": 2, "do_sample": True}}, 2 + 2 * 2),
        ("/v1/chat/completions", HI, 2 + 2),
        ("/v1/completions", {"prompt": ["Hi", "Ho"], "n": 2}, 2 * 2 + 4 * 2),
        ("/vertex", {"instances": [BODY, BODY]}, 2 * 2 + 2 * 2),
        ("/generate", {"inputs": ""}, 0),
    ],
)
async def test_a_request_pays_for_prompt_and_answer(client, meter, path, body, cost):
    await (await client.post(path, json=body, headers=bearer("w3b"))).read()
    assert meter.paid.get_nowait() == ("web", cost)
    await client.post(path, json=body, headers=bearer("fixed"))
    assert meter.paid.empty(), "only keys with names have limits"


async def test_nobody_pays_for_tokenizing_or_for_what_did_not_come(client, meter, fleet):
    assert (await client.post("/tokenize", json=BODY, headers=bearer("w3b"))).status == 200
    assert meter.paid.empty()
    fleet.answer = lambda request: [Frame(failure=Failure("generation", "boom"))]
    headers = {**bearer("w3b"), "x-on-disconnect": "run"}
    assert (await client.post("/generate", json=BODY, headers=headers)).status == 424
    assert meter.paid.get_nowait() == ("web", 2)


@pytest.mark.parametrize(("policy", "cost"), [("cancel", 2 + 1), ("run", 2 + 9)])
async def test_who_leaves_pays_for_what_runs_on(client, meter, fleet, frames_of, policy, cost):
    fleet.answer = lambda request: frames_of(request.id, [" one", " two"])[:1]
    body = {**BODY, "parameters": {"max_new_tokens": 9}}
    headers = {**bearer("w3b"), "x-on-disconnect": policy}
    response = await client.post("/generate_stream", json=body, headers=headers)
    while b"one" not in await response.content.readline():
        pass
    response.close()
    assert await meter.paid.get() == ("web", cost)
