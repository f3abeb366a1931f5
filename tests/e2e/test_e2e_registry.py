"""Downloads from the page in a real browser, with real workers and a slow Hub on this machine: the bar moves, the SAE is there."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from saehub.jobs.models import Job, State
from saes.models import SAE
from saes.numerics.formats import load_sae
from tests.conftest import wait_for
from tests.e2e.looking import becomes, click, no_violations, not_reloaded, stamp
from tests.mini_hub import COMMIT, MiniHub

pytestmark = pytest.mark.timeout(900)
GOLDEN = Path(__file__).parent.parent / "golden" / "saelens_standard" / "cfg.json"
REPO, SCOPE = "lab/large", "google/gemma-scope-2b-pt-res"
D_IN, D_SAE = 64, 16384
SLOW, QUICK = 200_000, 50_000_000  # bytes a second of an SAE of 8 MB: until its bar was seen to move, and then


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    return {name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def gemma_scope(seed: float) -> bytes:
    arrays = {name: tensor.numpy() + np.float32(seed) for name, tensor in tensors().items()}
    file = io.BytesIO()
    np.savez(file, **arrays, threshold=np.full(D_SAE, 0.1, dtype=np.float32))
    return file.getvalue()


@pytest.fixture
def served(sites_hub: MiniHub, hub_cache: Path) -> Iterator[MiniHub]:
    """The site's Hub, with two repositories of which nothing is here yet."""
    hub = sites_hub
    config = json.loads(GOLDEN.read_text()) | {"d_in": D_IN, "d_sae": D_SAE}
    hub.repos[f"models/{REPO}"] = {
        "README.md": b"# SAEs",
        "blocks.1/cfg.json": json.dumps(config).encode(),
        "blocks.1/sae_weights.safetensors": save(tensors()),
        "blocks.2/cfg.json": json.dumps(config).encode(),
        "blocks.2/sae_weights.safetensors": save(tensors()),
    }
    hub.repos[f"models/{SCOPE}"] = {
        f"layer_3/width_16k/average_l0_{l0}/params.npz": gemma_scope(l0 / 1e6) for l0 in (22, 82, 311)
    }
    yield hub
    for kept in (hub.repos, hub.faults, hub.requests, hub.asked):
        kept.clear()
    shutil.rmtree(hub_cache, ignore_errors=True)


def bar_of(page: Any) -> float | None:
    """How far the card's bar is, read off the page itself; None where there is none any more."""
    value: float | None = page.evaluate("() => document.querySelector('.job progress')?.value ?? null")
    return value


def watch_the_bar(page: Any) -> None:
    """The bar is seen to move twice."""
    seen: list[float] = []

    def moved() -> bool:
        value = bar_of(page)
        if value and value not in seen:
            seen.append(value)
        page.wait_for_timeout(50)
        return len(seen) >= 3

    wait_for(moved, 300, "the bar to move")
    assert seen == sorted(seen) and seen[0] < 0.9, seen


def download(hub: MiniHub, page: Any, path: str) -> SAE:
    """On the SAE's own page, without a reload, its bar moves to the end; then the row is ready."""
    rate = hub.fault("/lfs/", "rate", SLOW, times=None)
    page.click("text=Download the selected")
    page.wait_for_url(re.compile(r"/saes/\d+/$"))
    stamp(page)
    watch_the_bar(page)
    rate.value = QUICK
    page.wait_for_selector(".chip.ok", timeout=300_000)
    hub.faults.remove(rate)
    row = SAE.objects.get(repo_path=path)
    wait_for(lambda: Job.objects.get(pk=row.job_id).state not in ("queued", "running"), 300, "the job to end")
    job = Job.objects.get(pk=row.job_id)
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    assert row.ready and row.revision == COMMIT and not_reloaded(page)
    return row


def test_a_custom_repository_and_gemma_scope(served: MiniHub, page: Any) -> None:
    page.goto("/saes/")
    page.click("text=Download from the Hub")
    page.fill("[name=repo]", f"{served.url}/{REPO}/tree/main")
    page.keyboard.press("Enter")
    becomes(page, "#found tbody tr", 2)
    no_violations(page)
    page.check("[aria-label='Select blocks.1']")
    row = download(served, page, "blocks.1")
    assert (row.d_in, row.d_sae, row.source) == (D_IN, D_SAE, "hub")
    x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(load_sae(row.files).forward(x)).all()

    page.goto(f"/saes/download/?repo={SCOPE}")
    becomes(page, "#found tbody tr", 3)
    page.fill("#l0", "100")
    page.press("#l0", "Enter")
    becomes(page, "#found tbody tr", 1)
    assert "average_l0_82" in page.inner_text("#found tbody tr")
    page.wait_for_url("**l0=100**")
    no_violations(page)
    page.check("#found tbody input[type=checkbox]")
    row = download(served, page, "layer_3/width_16k/average_l0_82")
    assert (row.d_in, row.d_sae, row.hook_name) == (D_IN, D_SAE, "blocks.3.hook_resid_post")
    assert (row.architecture, row.published_l0, row.model_name) == ("jumprelu", 82.0, "gemma-2-2b")


def test_a_connection_cut_half_way_is_watched_to_the_end(served: MiniHub, page: Any) -> None:
    """Twice the Hub hangs up in the middle of the weights: the bar goes on from there, and the files are the Hub's."""
    served.fault("/lfs/models/lab/large/blocks.2/sae_weights", "cut", 0.5, times=2)
    page.goto(f"/saes/download/?repo={REPO}")
    page.wait_for_selector("#found tbody tr")
    page.check("[aria-label='Select blocks.2']")
    row = download(served, page, "blocks.2")
    weights = "/lfs/models/lab/large/blocks.2/sae_weights"
    asked = [one.range for one in served.requests if one.path.startswith(weights)]
    begun = [int(text.removeprefix("bytes=").partition("-")[0]) for text in asked if text]
    size = len(served.repos[f"models/{REPO}"]["blocks.2/sae_weights.safetensors"])
    assert max(begun) >= size * 0.7, f"after two cuts it went on from there: {asked}"
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (row.files / name).read_bytes() == served.repos[f"models/{REPO}"][f"blocks.2/{name}"]
    page.reload()
    assert page.locator(".chip.failed").count() == 0 and page.locator(".chip.ok").count() >= 1
    page.goto(f"/jobs/{row.job_id}/")
    assert page.inner_text("main").count("the connection was cut; again in") == 2, "its log says so"
    no_violations(page)


def test_the_list_by_keyboard_into_the_basket(served: MiniHub, page: Any) -> None:
    for number in range(3):
        SAE.objects.create(
            name=f"release/{number}",
            sae_id=str(number),
            source="hub",
            repo_id=REPO,
            repo_path=f"blocks.{number}",
            model_name="m",
            layer=number,
        )
    page.goto("/saes/")
    assert not page.locator(".bulk").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.wait_for_selector(".bulk", state="visible")
    assert page.locator("tbody input:checked").count() == 2
    no_violations(page)
    page.click(".bulk >> text=Add to basket")
    page.wait_for_selector(".note.ok")
    assert "2 put into the basket" in page.inner_text(".note.ok")
    click(page, "text=Basket, 2")
    assert "repo: lab/large" in page.inner_text("pre.spec") and page.locator("tbody tr").count() == 2
    no_violations(page)
    page.goto("/saes/")
    stamp(page)
    page.check("#facets [name=layer][value='2']")
    becomes(page, ".registry tbody tr", 1)
    page.wait_for_url("**layer=2**")
    assert not_reloaded(page), "the URL holds the filter, in place"
    page.reload()
    assert page.locator(".registry tbody tr").count() == 1 and page.is_checked("#facets [name=layer][value='2']")
