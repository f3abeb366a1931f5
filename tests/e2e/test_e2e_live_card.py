"""A card that is swapped all the time is still there for whoever presses its button, by mouse or by keyboard."""

from __future__ import annotations

from typing import Any

import pytest

from saehub.jobs.models import Job, State, enqueue
from tests.conftest import wait_for

pytestmark = pytest.mark.timeout(900)
WATCH = """() => {
  window.heard = 0; window.left = 0;
  document.body.addEventListener("htmx:wsAfterMessage", () => window.heard++);
  document.addEventListener("focusout", () => window.left++);
}"""


@pytest.fixture
def counting(page: Any) -> Job:
    """A job whose card changes about twice a second, open in the page, and heard of over the socket."""
    job = enqueue("probe", None, title="count", steps=3000, seconds=0.1)
    page.goto(job.get_absolute_url())
    page.evaluate(WATCH)
    wait_for(lambda: page.evaluate("document.querySelector('.job progress')?.value > 0"), 300, "the job to count")
    messages(page, 1)
    return job


def messages(page: Any, more: int) -> None:
    """Until the socket has brought so many more cards."""
    until = page.evaluate("window.heard") + more
    wait_for(lambda: page.evaluate("window.heard") >= until, 300, "the socket's cards")


def middle(page: Any, selector: str) -> list[float]:
    """Where an element is, asked in one go: between two questions of Playwright's it may have been swapped."""
    look = "(s) => { const box = document.querySelector(s).getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }"
    found: list[float] = page.evaluate(look, selector)
    return found


def is_cancelled(job: Job) -> None:
    wait_for(lambda: Job.objects.get(pk=job.pk).state == State.CANCELLED, 300, "the job to be cancelled")


def test_a_press_that_lasts_longer_than_a_card_is_a_click(page: Any, counting: Job) -> None:
    page.mouse.move(*middle(page, ".job .act button"))
    page.mouse.down()
    messages(page, 3)
    page.mouse.up()
    is_cancelled(counting)
    page.wait_for_selector(".job .chip.off")


def test_a_card_is_only_held_while_it_is_pressed(page: Any, counting: Job) -> None:
    page.mouse.move(*middle(page, ".job .step"))
    page.mouse.down()
    messages(page, 2)
    held = page.evaluate("document.querySelector('.job progress').value")
    page.mouse.up()
    shown = "document.querySelector('.job progress').value"
    wait_for(lambda: page.evaluate(shown) > held, 300, "the card to move on")


def test_focus_stays_on_the_button_itself(page: Any, counting: Job) -> None:
    """Not taken away and given back: a screen reader would say the button's name with every swap."""
    button = page.get_by_role("button", name="Cancel")
    button.focus()
    page.evaluate(
        "window.left = 0; window.button = document.activeElement; window.card = document.querySelector('.job')"
    )
    messages(page, 3)
    assert page.evaluate("window.card !== document.querySelector('.job')"), "the card was swapped"
    assert page.evaluate("document.activeElement === window.button && window.left === 0")
    page.keyboard.down("Space")
    messages(page, 2)
    page.keyboard.up("Space")
    is_cancelled(counting)
