"""A minute of the fault matrix at a fixed seed, and the harness against fleets that are broken on purpose.

`make chaos` plays the whole matrix.
"""

import json
import time
from collections import Counter
from contextlib import aclosing

import pytest

from tests.chaos.campaign import Campaign, matrix
from tests.chaos.results import summary

SECONDS = 45.0
LIMIT_S = 8.0  # nobody waits longer for what a sabotaged fleet will never say

# One fault of each kind; the whole matrix takes longer than a test may.
FAULTS = (
    "worker kill -9",
    "worker SIGTERM",
    "worker pause > lease",
    "gateway kill -9",
    "half of connections cut",
    "replies dropped",
    "broker kill -9 + AOF",
    "broker rolled back",
    "broker wiped",
    "failover, lost tail",
    "memory full",
    "disk full",
    "script cache gone",
    "broker clock +1 h",
    "poison",
    "client abort",
    "duplicate POST",
)

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.timeout(240)]


async def test_nobody_loses_or_repeats_a_token_whatever_breaks():
    names = matrix([7], faults=FAULTS)
    outcomes = [o async for o in Campaign().run(names, until=time.monotonic() + SECONDS)]
    details = [text for outcome in outcomes for text in (*outcome.details, *outcome.ended)]
    assert len(outcomes) > 5
    assert not details, json.dumps(summary(outcomes))


@pytest.mark.parametrize(
    ("sabotage", "fault", "finding"),
    [
        ("no-fence", "worker pause > lease", None),
        ("no-journal", "gateway kill -9", "stuck"),
        ("no-hash", "gateway and broker lost", "changed"),
    ],
)
async def test_broken_protocol_is_caught(sabotage: str, fault: str, finding: str | None):
    names = [(fault, "P3", seed) for seed in range(16)]
    campaign = Campaign(sabotage=sabotage, end_after_s=LIMIT_S)
    found = Counter()
    async with aclosing(campaign.run(names)) as outcomes:
        async for outcome in outcomes:
            found += outcome.wrong
            if finding in found if finding else found:
                return
    pytest.fail(f"{sabotage}: only {dict(found)} was found")
