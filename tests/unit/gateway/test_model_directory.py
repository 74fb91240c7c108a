"""What a gateway knows of the fleet, and what it says about models that it does not know."""

import asyncio
from dataclasses import replace

import pytest
from redis.exceptions import ConnectionError

from common.codec import DecodeError
from common.errors import ModelNotFound, Unavailable, ValidationError
from gateway.model_directory import ModelDirectory
from gateway.tokenization import TokenizerCache


@pytest.fixture
def make_directory(fleet):
    caches = []

    def make(**values) -> ModelDirectory:
        caches.append(TokenizerCache(num_threads=1))
        return ModelDirectory(fleet.registry, caches[-1], lambda model: fleet, **values)

    yield make
    for cache in caches:
        cache.close()


def add_model(fleet, name: str) -> None:
    fleet.registry.cards[name] = replace(fleet.registry.cards["tiny"], model=name)


async def test_only_model_is_the_default(make_directory):
    directory = make_directory()
    assert (await directory.find(None)).name == "tiny"
    assert (await directory.find("tiny")).card.max_total_tokens == 30
    assert directory.is_ready and directory.is_reachable


async def test_several_models_need_a_name(make_directory, fleet):
    add_model(fleet, "other")
    directory = make_directory()
    with pytest.raises(
        ValidationError, match="`model` must name one of the models served: `other`, `tiny`"
    ):
        await directory.find(None)
    assert (await make_directory(default_model="other").find(None)).name == "other"
    with pytest.raises(
        ModelNotFound, match="The model `gone` is not served here. Served: `other`, `tiny`"
    ):
        await make_directory(default_model="gone").find(None)


async def test_new_model_is_found_when_it_is_asked_for(make_directory, fleet, monkeypatch):
    monkeypatch.setattr("gateway.model_directory._LOOK_AGAIN_S", -1.0)
    directory = make_directory()
    await directory.refresh()
    add_model(fleet, "new")
    assert (await directory.find("new")).name == "new"


async def test_unknown_names_do_not_make_it_look_every_time(make_directory, fleet):
    directory = make_directory()
    await directory.refresh()
    add_model(fleet, "new")
    with pytest.raises(ModelNotFound):
        await directory.find("new")


async def test_many_who_ask_for_an_unknown_name_make_it_look_once(make_directory, fleet):
    directory, num_looks = make_directory(), 0
    look = fleet.registry.models

    async def models() -> list[str]:
        nonlocal num_looks
        num_looks += 1
        await asyncio.sleep(0)  # the others come meanwhile
        return await look()

    fleet.registry.models = models
    found = await asyncio.gather(
        *(directory.find("gone") for _ in range(50)), return_exceptions=True
    )
    assert {type(error) for error in found} == {ModelNotFound}
    assert num_looks == 1


def let_work(fleet, *models: str) -> None:
    """Only these models have a worker."""
    statuses = fleet.registry.statuses

    async def workers(model: str):
        return [replace(status, model=model) for status in statuses] if model in models else []

    fleet.registry.workers = workers


async def test_the_only_model_with_a_worker_is_the_default(make_directory, fleet):
    add_model(fleet, "a-dead-one")
    let_work(fleet, "tiny")
    directory = make_directory()
    assert (await directory.find(None)).name == "tiny"
    assert [model.name for model in directory.models] == ["tiny", "a-dead-one"], "living ones first"
    assert (await directory.find("a-dead-one")).name == "a-dead-one", "its queue takes requests"
    let_work(fleet)
    await directory.refresh()
    assert (await directory.find(None)).name == "tiny", "also while its workers change"
    let_work(fleet, "tiny", "a-dead-one")
    await directory.refresh()
    with pytest.raises(ValidationError, match="served: `a-dead-one`, `tiny`"):
        await directory.find(None)
    let_work(fleet)
    await directory.refresh()
    with pytest.raises(ValidationError, match="`model` must name one of the models served"):
        await directory.find(None)


async def test_the_operators_default_comes_before_the_only_living_model(make_directory, fleet):
    add_model(fleet, "other")
    let_work(fleet, "tiny")
    assert (await make_directory(default_model="other").find(None)).name == "other"


async def test_broker_that_was_never_there_is_told_once(make_directory, fleet, caplog):
    fleet.registry.error = ConnectionError("refused")
    directory = make_directory()
    for _ in range(3):
        await directory.refresh()
    assert caplog.text.count("the broker does not answer: refused") == 1
    assert directory.is_reachable is False


async def test_nothing_served(make_directory, fleet):
    fleet.registry.cards.clear()
    directory = make_directory()
    with pytest.raises(Unavailable, match="no model is served yet"):
        await directory.find("tiny")
    assert not directory.is_ready


async def test_broker_that_goes_away_and_comes_back(make_directory, fleet, caplog):
    fleet.registry.error = ConnectionError("refused")
    directory = make_directory()
    with pytest.raises(Unavailable, match="the broker does not answer"):
        await directory.find(None)
    fleet.registry.error = None
    await directory.refresh()
    assert directory.is_ready
    fleet.registry.error = ConnectionError("refused")
    await directory.refresh()
    assert not directory.is_ready and not directory.is_reachable
    assert (await directory.find("tiny")).name == "tiny", "what was known stays"
    assert "the broker does not answer" in caplog.text


async def test_model_without_ready_worker(make_directory, fleet):
    fleet.registry.statuses = [replace(fleet.registry.statuses[0], state="draining")]
    directory = make_directory()
    assert (await directory.find("tiny")).is_ready is False
    fleet.registry.statuses = [replace(fleet.registry.statuses[0], state="ready", seen_s=60.0)]
    await directory.refresh()
    assert not directory.is_ready


@pytest.mark.parametrize("data", [None, b"no json"])
async def test_model_whose_tokenizer_is_missing_or_broken_is_left_out(make_directory, fleet, data):
    fleet.registry.tokenizers["bytes"] = data
    with pytest.raises(Unavailable):
        await make_directory().find("tiny")


async def test_card_of_another_version_is_left_out(make_directory, fleet, caplog):
    async def card(name):
        if name == "new":
            raise DecodeError("schema version 9")
        return None if name == "gone" else fleet.registry.cards[name]

    add_model(fleet, "new")
    add_model(fleet, "gone")
    fleet.registry.card = card
    directory = make_directory()
    await directory.refresh()
    assert [model.name for model in directory.models] == ["tiny"]
    assert "schema version 9" in caplog.text


async def test_run_refreshes_until_ready(make_directory, fleet, deadline, monkeypatch):
    monkeypatch.setattr("gateway.model_directory.REFRESH_S", 0.001)
    statuses, fleet.registry.statuses = fleet.registry.statuses, []
    directory = make_directory()
    running = asyncio.create_task(directory.run())
    waiting = asyncio.create_task(directory.wait_until_ready())
    await asyncio.sleep(0)
    fleet.registry.statuses = statuses
    await waiting
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
