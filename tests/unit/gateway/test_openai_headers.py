"""TGI's headers on OpenAI's routes: what computed an answer, and how long it took."""

import pytest

from tests.openai_calls import HI

pytestmark = pytest.mark.usefixtures("chat_model")

TIMES = ("x-total-time", "x-validation-time")
PROMPT = "<user>Hi<a>"


def without_times(headers) -> dict[str, str]:
    """TGI's headers, but for those that depend on the clock."""
    ours = {name.lower(): value for name, value in headers.items()}
    names = [name for name in ours if name.startswith("x-") and name != "x-request-id"]
    return {name: ours[name] for name in names if name not in TIMES}


async def test_chat(client):
    response = await client.post("/v1/chat/completions", json={"messages": HI})
    headers = without_times(response.headers)
    assert float(headers.pop("x-compute-time")) < 10
    assert headers == {
        "x-compute-type": "cpu+optimized",
        "x-compute-characters": str(len(PROMPT)),
        "x-queue-time": "250",
        "x-inference-time": "1500",
        "x-time-per-token": "750",
        "x-prompt-tokens": str(len(PROMPT)),
        "x-generated-tokens": "2",
    }
    assert all(0 <= int(response.headers[name]) < 10_000 for name in TIMES)


async def test_completions_sum_over_their_sequences_and_have_no_compute_time(client):
    body = {"prompt": ["Hi", "Hello"], "n": 2}
    response = await client.post("/v1/completions", json=body)
    assert without_times(response.headers) == {
        "x-compute-type": "cpu+optimized",
        "x-compute-characters": "7",
        "x-queue-time": "1000",
        "x-inference-time": "6000",
        "x-time-per-token": "750",
        "x-prompt-tokens": "7",
        "x-generated-tokens": "8",
    }


@pytest.mark.parametrize(
    ("path", "body", "num_characters"),
    [
        ("chat/completions", {"messages": HI}, len(PROMPT)),
        ("completions", {"prompt": ["Hi", "é"]}, 3),
        ("completions", {"prompt": [1, 2, 3]}, 0),
    ],
)
async def test_streams_tell_what_is_known_before(client, path, body, num_characters):
    response = await client.post(f"/v1/{path}", json={**body, "stream": True})
    assert without_times(response.headers) == {
        "x-compute-type": "cpu+optimized",
        "x-compute-characters": str(num_characters),
        "x-accel-buffering": "no",
    }
    await response.read()
