"""Whatever is posted, the answer is JSON with `error` and `error_type`, and never a 500."""

import asyncio
import gzip
import io
import json
import math
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DEEP = b"[" * 100_000 + b"]" * 100_000


def parameters(text: str) -> bytes:
    return b'{"inputs":"Hi","parameters":{%s}}' % text.encode()


CASES = [
    (b"", 400, "malformed_request"),
    (b"{", 400, "malformed_request"),
    (b'{"inputs":"\xff\xfe"}', 400, "malformed_request"),
    (rb'{"inputs":"\ud800"}', 400, "malformed_request"),
    (DEEP, 400, "malformed_request"),
    (
        b'{"inputs":"Hi","parameters":' + b'{"grammar":' + b'{"a":' * 5000 + b"1" + b"}" * 5002,
        400,
        None,
    ),
    (b"[]", 422, "validation"),
    (b'"Hi"', 422, "validation"),
    (b"null", 422, "validation"),
    (b"{}", 422, "validation"),
    (b'{"inputs":null}', 422, "validation"),
    (b'{"inputs":7}', 422, "validation"),
    (b'{"inputs":["Hi"]}', 422, "validation"),
    (b'{"inputs":""}', 422, "validation"),
    (b'{"inputs":"Hi","parameters":[]}', 422, "validation"),
    (b'{"inputs":"Hi","priority":3}', 422, "validation"),
    (b'{"inputs":"Hi","model":5}', 422, "validation"),
    (b'{"inputs":"Hi","model":""}', 404, "model_not_found"),
    (parameters('"temperature":NaN'), 422, "validation"),
    (parameters('"temperature":Infinity'), 422, "validation"),
    (parameters('"temperature":1e400'), 422, "validation"),
    (parameters('"temperature":1e39'), 422, "validation"),
    (parameters('"temperature":1e-50'), 422, "validation"),
    (parameters('"temperature":-1'), 422, "validation"),
    (parameters('"temperature":"1"'), 422, "validation"),
    (parameters('"temperature":true'), 422, "validation"),
    (parameters('"top_k":-1'), 422, "validation"),
    (parameters('"top_k":1.5'), 422, "validation"),
    (parameters('"top_k":99999999999999999999'), 422, "validation"),
    (parameters('"max_new_tokens":-1'), 422, "validation"),
    (parameters('"max_new_tokens":1e2'), 422, "validation"),
    (parameters('"max_new_tokens":' + "9" * 30), 422, "validation"),
    (parameters('"max_new_tokens":' + "9" * 5000), None, None),
    (parameters('"seed":-1'), 422, "validation"),
    (parameters('"seed":18446744073709551616'), 422, "validation"),
    (parameters('"truncate":-1'), 422, "validation"),
    (parameters('"best_of":-1'), 422, "validation"),
    (parameters('"top_n_tokens":-1'), 422, "validation"),
    (parameters('"min_new_tokens":-1'), 422, "validation"),
    (parameters('"repetition_penalty":0'), 422, "validation"),
    (parameters('"stop":"x"'), 422, "validation"),
    (parameters('"stop":[1]'), 422, "validation"),
    (parameters('"stop":[""]'), 422, "validation"),
    (parameters('"logit_bias":{"\u0662":1}'), 422, "validation"),
    (parameters('"logit_bias":{"1":null}'), 422, "validation"),
    (parameters('"grammar":{"type":"regex","value":"("}'), 422, "validation"),
    (parameters('"grammar":{"type":"json","value":"%s"}' % ("[" * 9000)), 422, "validation"),
    (parameters('"grammar":{"type":"json","value":{"$ref":"http://a/b"}}'), 422, "validation"),
    (parameters('"adapter_id":"a"'), 422, "validation"),
]


async def check(response, status, kind):
    text = await response.text()
    assert response.content_type == "application/json", text
    body = json.loads(text)
    assert list(body) == ["error", "error_type"] and body["error"]
    assert 400 <= response.status < 500, text
    assert status is None or response.status == status, text
    assert kind is None or body["error_type"] == kind, text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("data", "status", "kind"), CASES, ids=range(len(CASES)))
async def test_bad_body(client, fleet, path, data, status, kind):
    response = await client.post(path, data=data, headers={"content-type": "application/json"})
    await check(response, status, kind)
    assert not fleet.requests


@pytest.mark.parametrize(
    "data",
    [
        b'{"inputs":"a\\u0000b"}',
        b'{"inputs":"Hi","parameters":null}',
        b'{"inputs":"Hi","unknown":{"x":[1]},"parameters":{"unknown":1}}',
        b'{"inputs":"Hi","parameters":{"stop":null,"details":null,"do_sample":null,"watermark":null}}',
        b'{"inputs":"Hi","parameters":{"temperature":null,"top_k":null,"seed":null,"best_of":null}}',
        b'{"inputs":"Hi","parameters":{"temperature":1,"best_of":0,"seed":18446744073709551615}}',
    ],
)
async def test_odd_but_valid_bodies(client, data):
    response = await client.post(
        "/generate", data=data, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.status == 200, await response.text()


async def test_content_type_is_required(client):
    await check(await client.post("/generate", data=b"inputs=Hi"), 415, "unsupported_media_type")
    response = await client.post(
        "/generate", data='{"inputs":"Hi"}', headers={"content-type": "text/plain"}
    )
    await check(response, 415, "unsupported_media_type")


async def test_body_that_is_too_long(make_client):
    client = await make_client(payload_limit=1000)
    await check(
        await client.post("/generate", json={"inputs": "x" * 2000}), 413, "payload_too_large"
    )


async def test_prompt_of_ten_megabytes(client):
    data = io.BytesIO(json.dumps({"inputs": "x" * 10_000_000}).encode())
    headers = {"content-type": "application/json"}
    await check(
        await client.post("/generate", data=data, headers=headers), 413, "payload_too_large"
    )


async def test_prompt_just_below_the_limit_of_bytes(client):
    response = await client.post("/generate", json={"inputs": "x" * 1_000_000})
    await check(response, 422, "validation")


async def test_broken_compression(client):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    await check(
        await client.post("/generate", data=b"no gzip", headers=headers), 400, "malformed_request"
    )


HI = b'{"inputs":"Hi"}'
BARE = zlib.compress(HI, wbits=-zlib.MAX_WBITS)


async def post_packed(client, data: bytes, encoding: str):
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return await client.post("/generate", data=data, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", gzip.compress(HI)),
        ("X-GZIP", gzip.compress(HI)),
        ("deflate", zlib.compress(HI)),
        ("deflate", BARE),
        ("identity", HI),
    ],
    ids=range(5),
)
async def test_compressed_body(client, encoding, data):
    response = await post_packed(client, data, encoding)
    assert response.status == 200, await response.text()


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("gzip", b""),
        ("gzip", HI),
        ("gzip", gzip.compress(HI)[:-1]),
        ("gzip", gzip.compress(HI) + b"more"),
        ("deflate", BARE[:-1]),
        ("deflate", b""),
    ],
    ids=range(6),
)
async def test_compressed_body_that_is_not_whole(client, encoding, data):
    await check(await post_packed(client, data, encoding), 400, "malformed_request")


async def test_compressed_body_is_as_long_as_it_is_unpacked(make_client):
    client = await make_client(payload_limit=1000)
    longest = json.dumps({"inputs": ""}).replace('""', '"%s"' % ("x" * 986)).encode()
    assert len(longest) == 1000
    response = await post_packed(client, gzip.compress(longest), "gzip")
    assert "tokens" in (await response.json())["error"], "it was read"
    for num_more in (1, 100_000):
        data = gzip.compress(longest + b" " * num_more)
        await check(await post_packed(client, data, "gzip"), 413, "payload_too_large")


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
async def test_other_encodings_are_refused(client, encoding):
    response = await post_packed(client, HI, encoding)
    await check(response, 415, "unsupported_media_type")
    assert encoding in (await response.json())["error"]
    assert response.headers["accept-encoding"] == "gzip, deflate"


async def test_unknown_path_and_method(client):
    await check(await client.get("/nope"), 404, "not_found")
    response = await client.get("/generate")
    await check(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


async def test_unforeseen_error_is_a_500_that_tells_nothing(client, fleet, caplog):
    fleet.error = RuntimeError("secret")
    response = await client.post("/generate", json={"inputs": "Hi"})
    assert response.status == 500
    body = await response.json()
    assert body["error_type"] == "internal" and "secret" not in body["error"]
    assert "request failed" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    [
        *("best_of", "temperature", "repetition_penalty", "frequency_penalty", "presence_penalty"),
        *("top_k", "top_p", "typical_p", "min_p", "do_sample", "seed", "max_new_tokens", "stop"),
        *("min_new_tokens", "truncate", "return_full_text", "details", "decoder_input_details"),
        *(
            "logit_bias",
            "top_n_tokens",
            "watermark",
            "grammar",
            "adapter_id",
            "include_stop",
            "ignore_eos_token",
        ),
    ]
)


async def test_any_parameters_give_200_or_a_json_error(client, fleet):
    loop = asyncio.get_running_loop()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(FIELDS, JSON, max_size=4), st.text(max_size=10))
    def examine(values, inputs):
        asyncio.run_coroutine_threadsafe(send(values, inputs), loop).result(20)

    async def send(values, inputs):
        data = json.dumps({"inputs": inputs, "parameters": values})
        response = await client.post(
            "/generate", data=data, headers={"content-type": "application/json"}
        )
        if response.status != 200:
            await check(response, None, None)

    await loop.run_in_executor(None, examine)
    for request in fleet.requests:
        assert math.isfinite(request.sampling.temperature) and request.stopping.max_new_tokens > 0
