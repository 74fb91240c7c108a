"""The Prometheus text, alone and summed over processes."""

import asyncio
import logging
import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from gateway import exposition
from gateway.exposition import SharedMetrics, bury


def process(folder=None, *, requests=0, latency=None):
    registry = CollectorRegistry()
    counter = Counter("tgi_request_failure", "Failures", ["err"], registry=registry)
    counter.labels("validation").inc(requests)
    Gauge("tokenfleet_open", "Open", registry=registry).set(requests)
    histogram = Histogram("tokenfleet_wait_seconds", "Wait", registry=registry, buckets=(1, 10))
    if latency is not None:
        histogram.observe(latency)
    return SharedMetrics(registry, folder=folder)


def samples(text: str) -> dict[str, float]:
    """Every sample by name and labels; the library's parser checks the form but renames counters."""
    assert list(text_string_to_metric_families(text))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_one_process_is_valid_text():
    found = samples(process(requests=2, latency=5).render())
    assert found['tgi_request_failure{err="validation"}'] == 2
    assert found['tokenfleet_wait_seconds_bucket{le="1.0"}'] == 0
    assert found['tokenfleet_wait_seconds_bucket{le="10.0"}'] == 1
    assert found["tokenfleet_wait_seconds_sum"] == 5


def test_labels_are_escaped():
    registry = CollectorRegistry()
    Counter("c", "C", ["x"], registry=registry).labels('a"b\\c\nd').inc()
    text = SharedMetrics(registry).render()
    assert 'c_total{x="a\\"b\\\\c\\nd"} 1.0' in text


def test_processes_are_summed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    process(tmp_path, requests=2, latency=5).write()
    monkeypatch.setattr(os, "getpid", lambda: 2)
    process(tmp_path, requests=3).write()
    monkeypatch.setattr(os, "getpid", lambda: 3)
    mine = process(tmp_path, requests=4, latency=0.5)
    mine.write()
    found = samples(mine.render())
    assert found['tgi_request_failure{err="validation"}'] == 9
    assert found["tokenfleet_open"] == 9
    assert found["tokenfleet_wait_seconds_count"] == 2
    assert found['tokenfleet_wait_seconds_bucket{le="1.0"}'] == 1

    bury(tmp_path, 1)
    bury(tmp_path, 99)
    found = samples(mine.render())
    assert found['tgi_request_failure{err="validation"}'] == 9, "counts of the dead stay"
    assert found["tokenfleet_open"] == 7, "gauges of the dead go"


def test_series_that_only_another_process_has(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    process(tmp_path, requests=2).write()
    registry = CollectorRegistry()
    Counter("tgi_request_failure", "Failures", ["err"], registry=registry)
    monkeypatch.setattr(os, "getpid", lambda: 2)
    found = samples(SharedMetrics(registry, folder=tmp_path).render())
    assert found == {'tgi_request_failure{err="validation"}': 2}


async def test_run_keeps_the_file_fresh(tmp_path):
    metrics = process(tmp_path, requests=2)
    task = asyncio.create_task(metrics.run())
    await asyncio.sleep(0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getpid()}.live.json"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    process(None).write()


async def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    """A folder that is not there refuses a file as a full disk does."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(exposition, "WRITE_S", 0)
    folder = tmp_path / "full"
    task = asyncio.create_task(process(folder, requests=2).run())
    for _ in range(5):
        await asyncio.sleep(0)
    folder.mkdir()
    async with asyncio.timeout(10):
        while not task.done() and not list(folder.glob("*.live.json")):
            await asyncio.sleep(0)
    assert not task.done()
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
