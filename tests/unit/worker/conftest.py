"""What several tests of the worker share."""

import pytest

from worker.sampling import choice


@pytest.fixture(params=["kernel", "torch"])
def drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Random choices by the kernel, and by the torch operations that other devices run."""
    if request.param == "torch":
        monkeypatch.setattr(choice, "random_choice", lambda *_, **__: None)
    return request.param
