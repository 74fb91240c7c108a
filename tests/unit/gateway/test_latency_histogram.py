"""Our histogram tells what prometheus_client's would."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gateway.latency_histogram import LatencyHistogram

BOUNDS = (0.001, 0.5, 1.0, 30.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(BOUNDS) | st.floats(0, 60))))
def test_the_text_is_the_same(observations: list[tuple[str, float]]):
    texts = []
    for make in (
        lambda registry: LatencyHistogram("gap", "Gaps", registry=registry, bounds=BOUNDS),
        lambda registry: Histogram("gap", "Gaps", ["model"], registry=registry, buckets=BOUNDS),
    ):
        registry = CollectorRegistry()
        histogram = make(registry)
        for model, seconds in observations:
            histogram.labels(model).observe(seconds)
        lines = generate_latest(registry).decode().splitlines()
        texts.append([line for line in lines if "_created" not in line])
    assert texts[0] == texts[1]
