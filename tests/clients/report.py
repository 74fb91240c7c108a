"""What the programs of this folder share: run scenarios, and tell as JSON what each came to. Standard library only:
it runs in other environments than the tests.
"""

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def main(*scenarios: Callable[[SimpleNamespace], Any]) -> None:
    """Run every scenario with the servers that the first argument describes; the last line is what they came to."""
    servers = SimpleNamespace(**json.loads(sys.argv[1]))
    outcomes = {scenario.__name__: outcome(scenario, servers) for scenario in scenarios}
    print(f"\n{json.dumps(outcomes, default=repr)}")


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or what it raised as `{"error", "bases", "message", "traceback"}`."""
    try:
        result = call(*arguments)
        return asyncio.run(result) if inspect.iscoroutine(result) else result
    except Exception as error:  # noqa: BLE001  what it is, is the answer
        bases = [cls.__name__ for cls in type(error).__mro__]
        text = "".join(traceback.format_exception(error))
        return {"error": bases[0], "bases": bases, "message": str(error), "traceback": text}
