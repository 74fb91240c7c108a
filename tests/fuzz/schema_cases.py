"""Runs schemathesis against /openapi.json: bodies, headers and paths that fit the schema, and some that do not."""

import asyncio
import re
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("schemathesis.toml")
SHORT = ("examples", "fuzzing")
LONG = ("examples", "coverage", "fuzzing", "stateful")


async def run_cases(
    url: str, *, seed: int, max_examples: int, phases: tuple[str, ...], folder: Path
) -> int:
    """How many cases were sent. AssertionError with schemathesis' report when one of them shows a fault.

    Faults are: 5xx, a status, type or body that the schema does not tell, refusal of what fits it, acceptance of what
    does not, a method that it does not have.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)]
    command += ["run", f"{url}/openapi.json", "--seed", str(seed), "--no-color"]
    command += ["--max-examples", str(max_examples), "--phases", ",".join(phases)]
    command += ["--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--generation-database", "none", "--warnings", "off"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    report = output.decode(errors="replace")
    counted = re.search(r"(\d+) generated", report)
    assert process.returncode == 0 and counted, f"seed {seed}\n{report[-30_000:]}"
    return int(counted[1])
