"""Who waits for a broker says so."""

from pathlib import Path

import pytest

from common import redis_client
from common.errors import Unavailable
from common.redis_client import open_redis, wait_for_redis

pytestmark = pytest.mark.usefixtures("deadline")


async def test_waiting_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(redis_client, "_SILENT_S", 0.0)
    redis = open_redis(f"unix://{tmp_path}/none.sock")
    with pytest.raises(Unavailable, match="no broker answered within"):
        await wait_for_redis(redis, timeout_s=0.3)
    assert caplog.text.count("waiting for the broker") == 1
    await redis.aclose()
