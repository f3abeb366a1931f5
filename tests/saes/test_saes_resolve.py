"""The omnibox: every form in which an SAE is named leads to it, says how it was read, or offers what comes next."""

from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from saes.models import SAE, Release
from saes.resolve import Place, nearest, place_of, resolve

pytestmark = pytest.mark.django_db
REPO = "google/gemma-scope-2b-pt-res"
PATH = "layer_12/width_16k/average_l0_82"


@pytest.fixture
def scope() -> SAE:
    release = Release.objects.create(name="gemma-scope-2b-pt-res", repo_id=REPO, format="gemma_scope_1")
    other = "layer_12/width_16k/average_l0_22"
    SAE.objects.create(
        name=f"{release}/{other}", source="hub", release=release, sae_id=other, repo_id=REPO, repo_path=other
    )
    return SAE.objects.create(
        name=f"{release}/{PATH}", source="hub", release=release, sae_id=PATH, repo_id=REPO, repo_path=PATH, d_sae=16384,
        aliases=["gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical", "neuronpedia:gemma-2-2b/12-gemmascope-res-16k__l0-82"],
        neuronpedia_id="gemma-2-2b/12-gemmascope-res-16k",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        f"gemma-scope-2b-pt-res/{PATH}",
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
        f"{REPO}:{PATH}",
        f"  {REPO}:{PATH}/  ",
        f"{REPO}@0123abc:{PATH}",
        f"https://huggingface.co/{REPO}/tree/main/{PATH}",
        f"https://huggingface.co/{REPO}/blob/main/{PATH}/params.npz",
        f"huggingface.co/{REPO}/resolve/refs%2Fpr%2F1/{PATH}/params.npz?download=true",
        f"https://hf.co/{REPO}/tree/refs/pr/1/{PATH}",
        "gemma-2-2b/12-gemmascope-res-16k",
        "gemma-2-2b/12-gemmascope-res-16k__l0-82",
        "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k",
        "neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/123?embed=true",
    ],
)
def test_every_form_leads_to_the_sae(text: str, scope: SAE, client_of: Any) -> None:
    found = resolve(text)
    assert found.sae == scope and found.said, found
    answer = client_of("viewer").get(reverse("search"), {"q": text})
    assert answer.status_code == 302 and answer.url == scope.get_absolute_url()
    page = client_of("viewer").get(reverse("search"), {"q": text}, follow=True).content.decode()
    assert "This is " in page, "the page says how the text was read"


def test_a_feature_of_neuronpedia_opens_when_the_sae_is_here(scope: SAE, client_of: Any) -> None:
    text = {"q": "gemma-2-2b/12-gemmascope-res-16k/123"}
    assert resolve(text["q"]).feature == 123
    assert client_of("viewer").get(reverse("search"), text).url == scope.get_absolute_url()
    SAE.objects.filter(pk=scope.pk).update(ready_at=timezone.now())
    assert client_of("viewer").get(reverse("search"), text).url == reverse(
        "concepts:feature_detail", args=[scope.pk, 123]
    )
    far = {"q": "gemma-2-2b/12-gemmascope-res-16k/99999"}
    assert client_of("viewer").get(reverse("search"), far).url == scope.get_absolute_url(), "there is no such feature"


def test_several_are_listed(scope: SAE, client_of: Any) -> None:
    for text in (REPO, f"https://huggingface.co/{REPO}", f"{REPO}:layer_12"):
        assert {sae.pk for sae in resolve(text).saes} == set(SAE.objects.values_list("pk", flat=True)), text
    html = client_of("viewer").get(reverse("search"), {"q": f"{REPO}:layer_12/width_16k"}).content.decode()
    assert f"Read as {REPO}, layer_12/width_16k on the Hub." in html and html.count("average_l0_82") >= 1


def test_what_the_registry_lacks_is_offered(scope: SAE, client_of: Any) -> None:
    text = {"q": "https://huggingface.co/lab/saes/tree/v2/layers.3"}
    found = resolve(text["q"])
    assert found.sae is None and found.place == Place("lab/saes", "layers.3", "v2")
    url = reverse("saes:sae_download")
    html = client_of("researcher").get(reverse("search"), text).content.decode()
    assert f"{url}?repo=lab%2Fsaes&amp;revision=v2&amp;q=layers.3" in html and "Not in the registry yet" in html
    assert url not in client_of("viewer").get(reverse("search"), text).content.decode()


def test_a_slip_of_the_pen_gives_the_nearest_names(scope: SAE, client_of: Any) -> None:
    found = resolve(f"gema-scope-2b-pt-res/{PATH}")
    assert found.sae is None and found.nearest[0] == scope
    html = client_of("viewer").get(reverse("search"), {"q": f"gema-scope-2b-pt-res/{PATH}"}).content.decode()
    assert "Nearest names" in html and scope.get_absolute_url() in html
    assert nearest("something else altogether") == []


def test_nonsense_is_no_error(scope: SAE, client_of: Any) -> None:
    for text in (
        "",
        "   ",
        "/",
        ":",
        "a:b:c",
        "https://",
        "http://[",
        "https://huggingface.co/",
        "\0",
        "💥",
        "%",
        "a" * 5000,
        "x/y/z:",
        "[]",
        "'; --",
    ):
        assert client_of("viewer").get(reverse("search"), {"q": text}).status_code == 200, text


def test_places_are_read_from_what_people_paste() -> None:
    assert place_of("org/name") == Place("org/name") == place_of("https://huggingface.co/org/name/")
    assert place_of("org/name@v1:a/b") == Place("org/name", "a/b", "v1")
    assert place_of("https://huggingface.co/org/name/blob/abc/x/y.npz") == Place("org/name", "x/y.npz", "abc")
    for text in (
        "name",
        "https://example.com/org/name",
        "https://huggingface.co/datasets/org/name",
        "a b/c",
        "../x",
        "org/name/more",
    ):
        assert place_of(text) is None, text


def test_a_mirror_is_the_hub_too(scope: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"https://hub.lab.example/{REPO}/tree/main/{PATH}"
    assert resolve(text).sae is None
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.lab.example")
    assert resolve(text).sae == scope
