"""Downloads from the page: what a repository holds, Gemma Scope by facets, the basket; rows and jobs that come of it."""

from typing import Any

import pytest
import yaml
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes import repository
from saes.models import SAE
from tests.mini_hub import COMMIT, Fault, MiniHub

pytestmark = pytest.mark.django_db
SCOPE = "google/gemma-scope-2b-pt-res"
FILES = {f"layer_{layer}/width_16k/average_l0_{l0}/params.npz": b"x" * 100 for layer in (9, 12) for l0 in (22, 82)}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page may wait as long as it takes: how long that is, is another test's question."""
    repository._asked.clear()
    monkeypatch.setattr(repository.listing_of, "__kwdefaults__", {"wait": 60.0})
    monkeypatch.setattr(repository.variants, "__kwdefaults__", {"live": True, "wait": 60.0})


@pytest.fixture
def look(client_of: Any) -> Any:
    def get(**query: Any) -> Any:
        return client_of("researcher").get(reverse("saes:sae_download"), query)

    return get


@pytest.fixture
def choose(client_of: Any) -> Any:
    def post(paths: list[str], repo: str = "lab/saes", action: str = "fetch", **fields: Any) -> Any:
        given = {"repo": repo, "path": paths, "action": action} | fields
        return client_of("researcher").post(reverse("saes:sae_download"), given)

    return post


def offers(answer: Any) -> list[Any]:
    """The places or variants that a page shows."""
    return [offer.one for offer in answer.context["rows"]]


MIXED = {
    "README.md": b"# SAEs", "cfg.json": b"{}",
    "layers.3/cfg.json": b"{}", "layers.3/sae.safetensors": b"s" * 10,
    "layers.10/cfg.json": b"{}", "layers.10/sae.safetensors": b"s" * 10, "layers.10/examples.safetensors": b"e" * 999,
    "tl/cfg.json": b"{}", "tl/sae_weights.safetensors": b"s",
    "t0/ae.pt": b"p", "t0/config.json": b"{}", "t0/trainer_state.pt": b"p",
    "scope/hyperparams.json": b"{}", "scope/checkpoints/final.safetensors": b"s",
    "layer0.sae.pt": b"q", "odd.pt": b"o",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- a repository


def test_a_repository_shows_the_saes_it_holds(hub: MiniHub, look: Any) -> None:
    hub.repos["models/lab/saes"] = MIXED
    answer = look(repo="lab/saes")
    found = {one.path: one.format for one in offers(answer)}
    assert found == {
        "layer0.sae.pt": "qwen_scope", "layers.3": "sparsify", "layers.10": "sparsify", "odd.pt": "", "scope": "llama_scope",
        "t0": "dictionary_learning", "tl": "saelens",
    }  # fmt: skip
    paths = [one.path for one in offers(answer)]
    assert paths.index("layers.3") < paths.index("layers.10"), "in the order of numbers"
    sizes = {one.path: one.size_bytes for one in offers(answer)}
    assert sizes["layers.10"] == 12, "examples are never downloaded"
    html = answer.content.decode()
    assert f"{COMMIT[:8]}" in html and "7 SAEs in 16 files" in html and 'value="sparsify|layers.3"' in html


def test_words_narrow_the_paths(hub: MiniHub, look: Any) -> None:
    hub.repos["models/lab/saes"] = MIXED
    assert [one.path for one in offers(look(repo="lab/saes", q="layers 1"))] == ["layers.10"]
    assert look(repo="lab/saes", q="nothing").context["rows"] == []
    pasted = look(repo="https://huggingface.co/lab/saes/blob/main/layers.3/sae.safetensors")
    assert [one.path for one in offers(pasted)] == ["layers.3"], "an address of a file is its SAE"


def test_one_that_is_chosen_becomes_a_row_and_a_job(hub: MiniHub, choose: Any, user_of: Any) -> None:
    response = choose(["sparsify|layers.3"], revision="v2")
    row = SAE.objects.get()
    assert response.status_code == 302 and response.url == row.get_absolute_url()
    assert (row.repo_id, row.repo_path, row.format, row.revision) == ("lab/saes", "layers.3", "sparsify", "v2")
    assert (row.name, row.owner, row.layer, row.source) == ("lab/saes:layers.3", user_of("researcher"), 3, "hub")
    assert (row.job.kind, row.job.state, row.job.params) == ("download", State.QUEUED, {"sae": row.pk})


def test_many_go_to_the_list(client_of: Any) -> None:
    client = client_of("researcher")
    given = {
        "repo": "lab/saes",
        "path": ["sparsify|layers.3", "sparsify|layers.10", "sparsify|layers.3"],
        "action": "fetch",
    }
    response = client.post(reverse("saes:sae_download"), given)
    assert response.url == f"{reverse('saes:sae_list')}?state=coming"
    assert SAE.objects.count() == Job.objects.count() == 2
    assert "2 queued for download." in client.get(response.url).content.decode()


def test_asking_twice_starts_nothing_twice(choose: Any) -> None:
    first = choose(["sparsify|layers.3"])
    assert choose(["sparsify|layers.3"]).url == first.url and Job.objects.count() == 1
    SAE.objects.update(ready_at=timezone.now())
    assert choose(["sparsify|layers.3"]).url == first.url and Job.objects.count() == 1
    SAE.objects.update(ready_at=None)
    Job.objects.update(state=State.FAILED)
    assert choose(["sparsify|layers.3"]).url == first.url and Job.objects.count() == 2, "what failed may be tried again"


def test_a_row_of_the_catalogue_is_used(choose: Any) -> None:
    row = SAE.objects.create(
        name="release/id", source="hub", repo_id="lab/saes", repo_path="layers.3", format="sparsify", sae_id="id"
    )
    assert choose(["sparsify|layers.3"]).url == row.get_absolute_url()
    row.refresh_from_db()
    assert row.busy and row.name == "release/id" and row.owner is None


def test_what_is_somebody_elses_is_left_alone(choose: Any, user_of: Any) -> None:
    SAE.objects.create(name="theirs", source="hub", repo_id="lab/saes", repo_path="layers.3", owner=user_of("curator"))
    response = choose(["sparsify|layers.3"])
    assert response.url == reverse("saes:sae_list") and not Job.objects.exists()


def test_a_path_may_be_named(choose: Any) -> None:
    choose([], own_path="/deep/folder/")
    row = SAE.objects.get()
    assert (row.repo_path, row.format) == ("deep/folder", "") and row.busy


@pytest.mark.parametrize(
    "status, repo, says",
    [
        (422, "not a repository", "not a repository is not a repository"),
        (422, "https://example.com/a/b", "is not a repository; they look like"),
        (200, "lab/nothing", "lab/nothing"),
        (200, "lab/gated", "lab/gated"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(hub: MiniHub, look: Any, status: int, repo: str, says: str) -> None:
    hub.private.add("models/lab/gated")
    hub.repos["models/lab/gated"] = MIXED
    answer = look(repo=repo)
    assert answer.status_code == status and says in answer.context["fault"]
    html = answer.content.decode()
    assert 'role="alert"' in html and f'value="{repo}"' in html, "what was typed is kept"


def test_the_hub_out_of_reach_is_one_sentence(hub: MiniHub, look: Any) -> None:
    hub.close()
    assert "cannot be reached" in look(repo="lab/saes").context["fault"]


def test_a_slow_hub_is_asked_on_while_the_page_looks_again(hub: MiniHub, look: Any, monkeypatch: Any) -> None:
    hub.repos["models/lab/saes"] = MIXED
    hub.faults.append(Fault("/api/models/lab/saes", "delay", 1.0))
    monkeypatch.setattr(repository.listing_of, "__kwdefaults__", {"wait": 0.0})
    html = look(repo="lab/saes").content.decode()
    assert "has not answered about lab/saes yet" in html and "load delay:2s" in html
    monkeypatch.setattr(repository.listing_of, "__kwdefaults__", {"wait": 60.0})
    assert look(repo="lab/saes").context["n_found"] == 7


def test_a_repository_without_saes_says_so(hub: MiniHub, look: Any) -> None:
    hub.repos["models/lab/model"] = {"config.json": b"{}", "model.safetensors": b"w"}
    html = look(repo="lab/model").content.decode()
    assert "No SAE was recognised in lab/model" in html and 'name="own_path"' in html


# ---------------------------------------------------------------------------------------------------- Gemma Scope


def test_gemma_scope_is_chosen_by_facets(hub: MiniHub, look: Any) -> None:
    hub.repos[f"models/{SCOPE}"] = FILES
    answer = look(repo=SCOPE)
    assert [(one.layer, one.l0) for one in offers(answer)] == [(9, 22), (9, 82), (12, 22), (12, 82)]
    assert [key for key, *_ in answer.context["facets"]] == ["layer"], "what all share is no choice"
    html = answer.content.decode()
    assert (
        "blocks.12.hook_resid_post" in html
        and "from the Hub" in html
        and 'value="gemma_scope_1|layer_9/width_16k/average_l0_22"' in html
    )
    assert [one.l0 for one in offers(look(repo=SCOPE, layer="12"))] == [22, 82]
    near = look(repo=SCOPE, l0="70")
    assert [(one.layer, one.l0) for one in offers(near)] == [(9, 82), (12, 82)], "one of each layer"
    assert [one.canonical for one in offers(look(repo=SCOPE, canonical="1"))] == [True, True]
    wrong = look(repo=SCOPE, l0="many")
    assert len(wrong.context["rows"]) == 4 and "Give a number" in wrong.content.decode()


def test_gemma_scope_without_the_hub_is_the_catalogues(hub: MiniHub, look: Any, choose: Any) -> None:
    hub.close()
    row = SAE.objects.create(
        name="gs/one",
        source="hub",
        repo_id=SCOPE,
        repo_path="layer_9/width_16k/average_l0_82",
        format="gemma_scope_1",
        published_l0=82.0,
    )
    answer = look(repo=SCOPE)
    assert (
        answer.context["source"] == "the catalogue"
        and len(answer.context["rows"]) == 1
        and "ask the Hub" in answer.content.decode()
    )
    assert choose(["gemma_scope_1|layer_9/width_16k/average_l0_82"], repo=SCOPE).url == row.get_absolute_url()


def test_a_variant_that_is_chosen_knows_its_hook(choose: Any) -> None:
    choose(["gemma_scope_1|layer_9/width_16k/average_l0_82"], repo=SCOPE)
    row = SAE.objects.get()
    assert (row.hook_name, row.model_name, row.d_sae, row.published_l0) == (
        "blocks.9.hook_resid_post",
        "gemma-2-2b",
        16384,
        82.0,
    )


# ---------------------------------------------------------------------------------------------------- the basket


def an_sae(name: str, **fields: Any) -> SAE:
    return SAE.objects.create(name=name, source="hub", repo_id="lab/saes", repo_path=name, **fields)


def test_the_basket_keeps_downloads_and_empties(client_of: Any) -> None:
    client, url = client_of("researcher"), reverse("saes:sae_basket")
    one, two, three = an_sae("one", size_bytes=1_500_000), an_sae("two"), an_sae("three")
    back = reverse("saes:sae_list") + "?q=one"
    response = client.post(url, {"action": "add", "sae": [one.pk, two.pk, three.pk, 10**9, "x"], "next": back})
    assert response.url == back
    client.post(url, {"action": "add", "sae": [one.pk]})
    html = client.get(url).content.decode()
    assert "3 SAEs, " in html and "1.50 MB" in html and "and 2 whose size is not known" in html
    client.post(url, {"action": "remove", "sae": [three.pk]})
    response = client.post(url, {"action": "fetch_all"})
    assert response.url == f"{reverse('saes:sae_list')}?state=coming"
    assert {job.subject_id for job in Job.objects.all()} == {one.pk, two.pk}
    assert "The basket is empty" in client.get(url).content.decode()


def test_the_basket_is_a_spec_for_the_terminal(client_of: Any) -> None:
    from saes.batch import BatchSpec, plan

    client, url = client_of("researcher"), reverse("saes:sae_basket")
    one, two = an_sae("a/one", revision="v2"), an_sae("two")
    client.post(url, {"action": "add", "sae": [two.pk, one.pk]})
    answer = client.get(url + "?format=yaml")
    assert answer["Content-Disposition"] == 'attachment; filename="saes.yaml"'
    text = answer.content.decode()
    assert yaml.safe_load(text) and [row.pk for row in plan(BatchSpec.from_text(text, ".yaml"))] == [two.pk, one.pk]
    assert text.splitlines()[1].strip() in client.get(url).content.decode()


def test_choosing_nothing_is_said(client_of: Any, choose: Any) -> None:
    client = client_of("researcher")
    response = client.post(reverse("saes:sae_basket"), {"action": "add", "next": "https://evil.example/"})
    assert response.url == reverse("saes:sae_basket"), "never away from here"
    assert "Choose at least one SAE first." in client.get(response.url).content.decode()
    assert (
        choose([]).status_code == 302 and choose(["x"], repo="nonsense").status_code == 302 and not SAE.objects.exists()
    )


def test_choosing_goes_on_over_the_pages_of_the_list(client_of: Any) -> None:
    rows = [an_sae(f"sae {n:02}", model_name="m" if n else "other") for n in range(30)]
    client, url = client_of("researcher"), reverse("saes:sae_list")
    html = client.get(url + "?model=m").content.decode()
    assert "Put all 29 that match into the basket" in html and "Add, then the next page" in html
    assert 'name="next_page" value="/saes/?model=m&amp;page=2"' in html
    there = {"next": f"{url}?model=m", "next_page": f"{url}?model=m&page=2", "query": "model=m"}
    basket = reverse("saes:sae_basket")
    response = client.post(basket, there | {"action": "add_next", "sae": [rows[1].pk, rows[2].pk]})
    assert response.url == f"{url}?model=m&page=2"
    assert client.post(basket, there | {"action": "add_next"}).url == response.url, "none chosen: only the next page"
    assert client.session["basket"] == [rows[1].pk, rows[2].pk]
    assert client.get(url).content.decode().count("in the basket</span>") == 2
    client.post(basket, there | {"action": "add_all"})
    assert set(client.session["basket"]) == {row.pk for row in rows[1:]}
    assert "next_page" not in client.get(response.url).content.decode(), "the last page leads to none"


def test_to_the_basket_from_a_repository(choose: Any, client_of: Any) -> None:
    choose(["sparsify|layers.3"], action="add")
    assert SAE.objects.get().job is None and not Job.objects.exists()


def test_rows_that_went_away_leave_the_basket(client_of: Any) -> None:
    client, url = client_of("researcher"), reverse("saes:sae_basket")
    row = an_sae("one")
    client.post(url, {"action": "add", "sae": [row.pk]})
    row.delete()
    assert "The basket is empty" in client.get(url).content.decode()


@pytest.mark.parametrize("page", ["sae_download", "sae_basket"])
def test_who_may_not_add_gets_neither(page: str, client_of: Any) -> None:
    for method in ("get", "post"):
        assert getattr(client_of("viewer"), method)(reverse(f"saes:{page}")).status_code == 403


def test_the_pages_ask_as_often_for_three_rows_as_for_one(
    client_of: Any, django_assert_num_queries: Any, hub: MiniHub
) -> None:
    client = client_of("researcher")
    hub.repos[f"models/{SCOPE}"] = FILES
    rows = [
        an_sae(name, job=Job.objects.create(kind="download", queue="io", title=name))
        for name in ("one", "two", "three")
    ]
    for chosen in (rows[:1], rows):
        client.post(reverse("saes:sae_basket"), {"action": "clear"})
        client.post(reverse("saes:sae_basket"), {"action": "add", "sae": [row.pk for row in chosen]})
        client.get(reverse("saes:sae_basket"))
        with django_assert_num_queries(6):  # session, user, two of permissions, rows, running jobs
            client.get(reverse("saes:sae_basket"))
    for path in list(FILES)[:3]:
        SAE.objects.create(name=path, source="hub", repo_id=SCOPE, repo_path=path.removesuffix("/params.npz"))
        client.get(reverse("saes:sae_download"), {"repo": SCOPE, "live": 1})
        with django_assert_num_queries(10):
            client.get(reverse("saes:sae_download"), {"repo": SCOPE, "live": 1})
