"""Gauges of the whole fleet, made when they are asked for: every gateway process sees the same ones."""

from prometheus_client import Metric
from prometheus_client.metrics_core import GaugeMetricFamily

from gateway.model_directory import ModelDirectory


def fleet_metrics(directory: ModelDirectory) -> list[Metric]:
    """Queues and workers as the directory last saw them."""
    models = directory.models
    waiting = GaugeMetricFamily(
        "tokenfleet_queue_waiting", "Requests that wait for a worker", labels=["model"]
    )
    running = GaugeMetricFamily(
        "tokenfleet_queue_running", "Requests that a worker holds", labels=["model"]
    )
    workers = GaugeMetricFamily(
        "tokenfleet_workers", "Workers that were heard of", labels=["model", "state"]
    )
    kv_used = GaugeMetricFamily(
        "tokenfleet_worker_kv_used_ratio",
        "Share of the KV cache in use",
        labels=["model", "worker"],
    )
    speed = GaugeMetricFamily(
        "tokenfleet_worker_tokens_per_second", "Tokens a second", labels=["model", "worker"]
    )
    for model in models:
        waiting.add_metric([model.name], model.depth.waiting)
        running.add_metric([model.name], model.depth.running)
        for state in ("ready", "draining"):
            count = sum(worker.state == state for worker in model.workers)
            workers.add_metric([model.name, state], count)
        for worker in model.workers:
            kv_used.add_metric([model.name, worker.id], worker.kv_used)
            speed.add_metric([model.name, worker.id], worker.tokens_per_s)
    queue_size = GaugeMetricFamily(
        "tgi_queue_size", "Requests that wait", value=sum(model.depth.waiting for model in models)
    )
    batch_size = GaugeMetricFamily(
        "tgi_batch_current_size",
        "Requests that run, over all workers",
        value=sum(worker.running for model in models for worker in model.workers),
    )
    reachable = GaugeMetricFamily(
        "tokenfleet_broker_up", "Whether the broker answers", value=int(directory.is_reachable)
    )
    return [queue_size, batch_size, reachable, waiting, running, workers, kv_used, speed]
