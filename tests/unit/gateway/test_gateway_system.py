"""Health, info, key, CORS, traces, draining and the documentation."""

import json
import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.exceptions import ConnectionError

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


async def test_cors_for_named_origins(make_client):
    client = await make_client(cors_allow_origin=("https://a.example",))
    response = await client.get("/info", headers={"origin": "https://a.example"})
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert response.headers["vary"] == "Origin"
    response = await client.get("/info", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in response.headers
    assert "access-control-allow-origin" not in (await client.get("/info")).headers


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
