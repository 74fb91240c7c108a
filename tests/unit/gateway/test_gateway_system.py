"""Health, info, key, CORS, traces, draining and the documentation."""

import json
import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.exceptions import ConnectionError

from gateway.routes import route_table

BODY = {"inputs": "Hi"}


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/ready", "/health/ready"])
async def test_health(client, fleet, path):
    response = await client.get(path)
    assert response.status == 200 and await response.text() == ""
    fleet.registry.error = ConnectionError("refused")
    await client.services.directory.refresh()
    response = await client.get(path)
    assert response.status == 503
    assert await response.text() == '{"error":"unhealthy","error_type":"healthcheck"}'
    assert (await client.get("/health/live")).status == 200


async def test_draining(client):
    client.services.is_draining = True
    assert (await client.get("/health")).status == 503
    assert (await client.get("/health/live")).status == 200
    response = await client.post("/generate", json=BODY)
    assert response.status == 503 and response.headers["connection"] == "close"


async def test_info(client):
    body = await (await client.get("/info")).json()
    assert body["model_id"] == "tiny" and body["model_pipeline_tag"] == "text-generation"
    assert (body["max_input_tokens"], body["max_total_tokens"]) == (20, 30)
    assert body["max_concurrent_requests"] == 1024 and body["max_best_of"] == 2
    (model,) = body["models"]
    assert model["is_ready"] and model["workers"][0]["slots"] == 4 and model["waiting"] == 3
    assert "chat_template" not in model


async def test_info_before_any_worker(make_client, fleet):
    fleet.registry.cards.clear()
    client = await make_client(model_id="later")
    body = await (await client.get("/info")).json()
    assert body["model_id"] == "later" and body["max_total_tokens"] is None and body["models"] == []


async def test_models(client):
    body = await (await client.get("/v1/models")).json()
    assert body == {
        "object": "list",
        "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "tiny"}],
    }


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer k3y", 200),
        ("bearer k3y", 200),
        ("Bearer K3Y", 401),
        ("Bearer ", 401),
        ("Basic k3y", 401),
        ("Bearer k3\xff", 401),
    ],
)
async def test_key(make_client, header, status):
    client = await make_client(api_key="k3y")
    headers = {"authorization": header} if header else {}
    response = await client.post("/generate", json=BODY, headers=headers)
    assert response.status == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await response.json())["error_type"] == "unauthorized"
    assert (await client.get("/info")).status == 200


async def test_cors_for_any_origin(client):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    response = await client.options("/generate", headers=headers)
    assert response.status == 204
    assert response.headers["access-control-allow-origin"] == "*"
    assert "authorization" in response.headers["access-control-allow-headers"]
    response = await client.post(
        "/generate_stream", json=BODY, headers={"origin": "https://a.example"}
    )
    assert response.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in response.headers["access-control-expose-headers"]


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-os,x-stainless-retry-count"


@pytest.mark.parametrize(
    ("asked", "is_told"),
    [
        (STAINLESS, True),
        ("X-Own, x_other.1", True),
        ("x-a" * 1000, False),
        ("x-a, <b>", False),
        ("x-a;b", False),
        ("x-\u00e9", False),
    ],
)
async def test_preflight_allows_the_headers_it_is_asked_for(client, asked, is_told):
    """OpenAI's JavaScript client sends some that nobody else knows."""
    headers = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": asked,
    }
    response = await client.options("/v1/chat/completions", headers=headers)
    allowed = response.headers["access-control-allow-headers"]
    assert allowed.endswith(asked) == is_told and "authorization" in allowed
    assert response.headers["vary"].lower() == "access-control-request-headers"


async def test_cors_for_named_origins(make_client):
    client = await make_client(cors_allow_origin=("https://a.example",))
    response = await client.get("/info", headers={"origin": "https://a.example"})
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert response.headers["vary"] == "Origin"
    response = await client.get("/info", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in response.headers
    response = await client.get("/info")
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["vary"] == "Origin", "or a cache gives this answer to a page, too"


async def test_trace_goes_from_the_client_to_the_worker(make_client, fleet):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client = await make_client(tracer=provider.get_tracer("test"))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    response = await client.post("/generate", json=BODY, headers=headers)
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.name == "POST /generate"
    assert span.attributes["tokenfleet.request_id"] == response.headers["x-request-id"]
    assert span.attributes["tokenfleet.generated_tokens"] == 2
    (request,) = fleet.requests
    assert request.traceparent == f"00-{trace_id}-{span.context.span_id:016x}-01"
    provider.shutdown()


async def test_without_tracing_the_clients_trace_is_passed_on(client, fleet):
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.post("/generate", json=BODY, headers={"traceparent": traceparent})
    assert fleet.requests[0].traceparent == traceparent


async def test_unknown_paths_are_not_written_into_the_log(client, caplog):
    caplog.set_level("INFO")
    await client.get("/my-secret")
    lines = [record.getMessage() for record in caplog.records if record.name == "gateway.access"]
    assert lines == ["GET (unknown) 404"]


async def test_openapi(make_client):
    client = await make_client(api_key="k3y")
    document = await (await client.get("/openapi.json")).json()
    assert document == await (await client.get("/api-doc/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    operations = [item for path in document["paths"].values() for item in path.values()]
    identifiers = [operation["operationId"] for operation in operations]
    assert len(set(identifiers)) == len(identifiers)
    generate = document["paths"]["/generate"]["post"]
    assert generate["security"] == [{"key": []}] and "401" in generate["responses"]
    assert set(document["paths"]) >= {"/", "/generate", "/generate_stream", "/tokenize", "/info"}
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references == set(document["components"]["schemas"])
    fields = document["components"]["schemas"]["GenerateParameters"]["properties"]
    assert "temperature" in fields and fields["top_p"]["description"]


async def test_openapi_without_a_key(client):
    document = await (await client.get("/openapi.json")).json()
    assert "401" not in document["paths"]["/generate"]["post"]["responses"]


async def test_documentation_needs_nothing_from_elsewhere(client):
    page = await client.get("/docs")
    assert page.status == 200 and page.content_type == "text/html"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    text = await page.text()
    for path in re.findall(r'(?:src|href)="([^"#]+)"', text):
        if not path.startswith("data:"):
            assert (await client.get(path)).status == 200, path
    for name in ("docs.css", "docs.js"):
        content = await (await client.get(f"/docs/{name}")).text()
        assert (
            "http://" not in content.replace("http://www.w3.org", "") and "https://" not in content
        )


PAGES = [route.path for route in route_table() if route.method == "GET"]


@pytest.mark.parametrize("path", PAGES)
async def test_head_answers_as_get_without_the_body(client, path):
    path = path.replace("{model:.+}", "tiny").replace("{request_id}", "unknown")
    if path.endswith("/stream"):
        response = await client.head(path)
        assert (response.status, response.headers["allow"]) == (405, "GET")
        return
    response, shown = await client.head(path), await client.get(path)
    assert response.status == shown.status == (404 if "unknown" in path else 200)
    assert response.headers["x-request-id"] and await response.read() == b""
    if body := await shown.read():  # the probes have none
        assert response.headers["content-type"] == shown.headers["content-type"]
        length = int(response.headers["content-length"])
        assert length == len(body) or path == "/metrics", "whose numbers change in between"
    allowed = (await client.put(path)).headers["allow"]
    assert {"GET", "HEAD"} <= set(allowed.split(",")), allowed


async def test_head_needs_a_key_where_get_does(make_client):
    client = await make_client(api_key="secret")
    assert (await client.head("/requests/1")).status == 401
    assert (await client.head("/health")).status == 200


async def test_the_description_does_not_tell_of_head(client):
    paths = (await (await client.get("/openapi.json")).json())["paths"]
    assert {method for item in paths.values() for method in item} == {"get", "post", "delete"}
