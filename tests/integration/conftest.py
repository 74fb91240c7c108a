"""Real processes for the tests of this folder: gateways and workers on the private broker."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.fleet import Fleet


@pytest.fixture
async def fleet(redis_url: str) -> AsyncIterator[Fleet]:
    """No process yet; all that a test starts are killed behind it."""
    fleet = Fleet(redis_url)
    yield fleet
    await fleet.stop()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def long_deadline() -> AsyncIterator[None]:
    """As `deadline`, for tests that start processes."""
    async with asyncio.timeout(90):
        yield
