"""A minute of the fault matrix at a fixed seed. `make chaos` runs ten."""

import time

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.report import summary

SECONDS = 45.0

# One fault of each kind; the whole matrix takes longer than a test may.
FAULTS = [
    "worker kill -9",
    "worker SIGTERM",
    "worker pause > lease",
    "gateway kill -9",
    "half of connections cut",
    "replies dropped",
    "broker kill -9 + AOF",
    "broker rolled back",
    "broker wiped",
    "memory full",
    "script cache gone",
]


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(180)
async def test_nobody_loses_or_repeats_a_token_whatever_breaks():
    campaign = Campaign(seed=7)
    await campaign.run_matrix(until=time.monotonic() + SECONDS, faults=FAULTS)
    details = [text for cell in campaign.cells.values() for text in cell.details]
    assert campaign.is_sound, (summary(campaign, seconds=SECONDS), details, campaign.ended)
