"""A Prometheus histogram for what is observed with every token.

prometheus_client's takes two locks an observation, for threads; this one belongs to one event loop.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Latencies:
    """How many observations of one model fell under each bound; a value that is a bound counts there."""

    __slots__ = ("_bounds", "counts", "sum_s")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.sum_s += seconds


class LatencyHistogram(Collector):
    """Durations in seconds, by model."""

    def __init__(
        self, name: str, help: str, *, registry: CollectorRegistry, bounds: tuple[float, ...]
    ) -> None:
        self._name, self._help = name, help
        self._bounds = bounds
        self._by_model: dict[str, Latencies] = {}
        registry.register(self)

    def labels(self, model: str) -> Latencies:
        if model not in self._by_model:
            self._by_model[model] = Latencies(self._bounds)
        return self._by_model[model]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The name, for the registry's check that it is the only one of it."""
        yield HistogramMetricFamily(self._name, self._help, labels=["model"])

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=["model"])
        bounds = (*map(floatToGoString, self._bounds), "+Inf")
        for model, latencies in self._by_model.items():
            counts = accumulate(latencies.counts)
            family.add_metric([model], list(zip(bounds, counts, strict=True)), latencies.sum_s)
        yield family
