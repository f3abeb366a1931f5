"""How the browser tests look at a page: never between the parts of a swap, and never for a fixed time."""

from __future__ import annotations

import time
from typing import Any

from axe_playwright_python.sync_playwright import Axe

AXE = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
UNDER_WAY = ".htmx-swapping, .htmx-settling, .htmx-added"


def no_violations(page: Any) -> None:
    """axe finds nothing wrong with the page as it stands.

    Cards and lists go on changing while axe looks, which takes it long enough to see the half of a change; what is wrong
    with the page itself it finds a second time.
    """
    page.wait_for_load_state()
    found = violations(page)
    if found:
        again = violations(page)
        found = {name: again[name] for name in found.keys() & again.keys()}
    assert not found, found


def violations(page: Any) -> dict[tuple[str, str], str]:
    """What axe says is wrong, by rule and element."""
    becomes(page, UNDER_WAY, 0)
    answer = Axe().run(page, options=AXE).response["violations"]
    return {(one["id"], str(node["target"])): node["html"] for one in answer for node in one["nodes"]}


def stamp(page: Any) -> None:
    """Mark the document: a reload would lose the mark."""
    page.evaluate("window.notReloaded = true")


def not_reloaded(page: Any) -> bool:
    return bool(page.evaluate("window.notReloaded === true"))


def becomes(page: Any, selector: str, n: int) -> None:
    """Wait until the page has so many of these; the CSP forbids it to evaluate a condition of ours."""
    until = time.monotonic() + 120
    while page.locator(selector).count() != n:
        assert time.monotonic() < until, f"{page.locator(selector).count()} of {selector}, not {n}"
        page.wait_for_timeout(50)


def click(page: Any, selector: str) -> None:
    """Click on what leads to another page, or to this one anew, and wait until that has been loaded with its scripts.

    A click alone returns while the old page may still be there, and what is asked next would be asked of that.
    """
    with page.expect_navigation():
        page.click(selector)
