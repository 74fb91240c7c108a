"""/docs in a real browser without a network: it draws every route, and what it shows to try works as shown."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.docs.browser import Page, open_page
from tests.fleet import Fleet

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]

STEP_S = 0.02


@pytest.fixture
async def url(redis_url: str) -> AsyncIterator[str]:
    fleet = Fleet(redis_url)
    try:
        await fleet.worker("--echo-delay-ms", str(1000 * STEP_S))
        yield await fleet.gateway()
    finally:
        await fleet.stop()


@pytest.fixture
async def page(url: str, tmp_path: Path) -> AsyncIterator[Page]:
    async with open_page(tmp_path / "browser") as page:
        await page.open(f"{url}/docs")
        await page.until("document.querySelectorAll('details.route').length > 0")
        yield page


async def test_page(page: Page, url: str, tmp_path: Path):
    """One browser for all of it: starting one takes most of the time."""
    await _draws_every_route(page, url)
    await _stream_shows_its_tokens_one_by_one(page)
    await _every_example_runs_as_shown(page, url)
    await _curl_is_copied(page, url)
    await page.screenshot(Path(os.environ.get("DOCS_SCREENSHOT", tmp_path / "docs.png")))
    assert all(asked.startswith((url, "data:")) for asked in page.asked), page.asked
    assert page.complaints == []


async def _draws_every_route(page: Page, url: str) -> None:
    async with aiohttp.ClientSession(url) as session, session.get("/openapi.json") as response:
        paths = (await response.json())["paths"]
    expected = {
        (method.upper(), path) for path, operations in paths.items() for method in operations
    }
    cards = await page.run(
        "[...document.querySelectorAll('details.route')].map(card => "
        "[card.querySelector('.verb').textContent, card.querySelector('.path').textContent])"
    )
    assert {tuple(card) for card in cards} == expected and len(cards) == len(expected)
    links = await page.run("document.querySelectorAll('nav a').length")
    assert links == len(expected)
    await page.until("document.getElementById('health').textContent === 'ready'")
    assert await page.until("document.getElementById('models').textContent") == "echo"
    temperature = "[...document.querySelectorAll('#post--generate .name')]"
    assert await page.run(f"{temperature}.some(name => name.textContent === 'temperature')")


async def _stream_shows_its_tokens_one_by_one(page: Page) -> None:
    """Each time the text grows, the browser notes it."""
    await page.run(
        """(() => {
          const card = document.getElementById('post--generate_stream');
          const said = card.querySelector('.said');
          window.seen = [];
          new MutationObserver(() => seen.push(said.textContent)).observe(said, {childList: true});
          card.querySelector('.send').click();
        })()"""
    )
    await page.until("seen.at(-1) === 'The capital of France is'")
    texts = [text for text in await page.run("seen") if text]
    assert len(texts) > 10 and all("The capital of France is".startswith(text) for text in texts)


async def _every_example_runs_as_shown(page: Page, url: str) -> None:
    """From top to bottom, as the routes of requests show the last request that was made."""
    count = await page.run("document.querySelectorAll('details.route').length")
    for number in range(count):
        card = f"document.querySelectorAll('details.route')[{number}]"
        name = await page.run(f"{card}.id")
        await page.run(f"{card}.open = true")
        await page.run(f"{card}.querySelector('.send').click()")
        line = f"{card}.querySelector('.result-line')"
        await page.until(f"!{card}.querySelector('.send').hidden")
        result = await page.run(f"{line}.textContent")
        is_bad = await page.run(f"{line}.classList.contains('bad')")
        raw = await page.run(f"{card}.querySelector('pre').textContent")
        assert not is_bad and (result.startswith("200") or "events" in result), (
            f"{name}: {result} {raw}"
        )
        assert raw, name


async def _curl_is_copied(page: Page, url: str) -> None:
    """A shell would send what the page sends."""
    await page.run("navigator.clipboard.writeText = async text => { window.copied = text }")
    card = "document.getElementById('post--generate')"
    await page.run(f"[...{card}.querySelectorAll('button')].at(-1).click()")
    command = await page.until("window.copied")
    head, _, body = command.partition(" -d ")
    assert head == f"curl -N -X POST '{url}/generate' -H 'content-type: application/json'"
    shown = await page.run(f"{card}.querySelector('textarea').value")
    assert json.loads(body.strip("'")) == json.loads(shown)
