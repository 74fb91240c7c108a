"""Readers of what a program's scenario came to."""

from typing import Any


def error_of(outcome: Any) -> str:
    """The class of the error; fails with the outcome where there was none."""
    assert isinstance(outcome, dict) and "error" in outcome, f"no error, but {outcome}"
    return outcome["error"]
