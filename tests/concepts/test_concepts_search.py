"""Looking for features of all SAEs: by label, by token, by direction."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from django.urls import reverse

from concepts.models import ConceptDictionary, FeatureView, Label, largest_view
from concepts.search import SearchError, alike, alike_in, by_label, by_promoted, comparable, largest_views
from saes.models import SAE
from saes.numerics.formats import load_sae
from saes.numerics.lm import load_lm
from tests.api_calls import good, problem
from tests.steering_rows import Rows

PAGE_QUERIES = 9


def search(client: Any, **query: Any) -> Any:
    return client.get(reverse("concepts:feature_search"), query)


def logits(rows: Rows) -> tuple[Any, np.ndarray]:
    """Tokenizer, and what unit directions add to every logit (d_sae, V), by the model's own norm and head."""
    lm, sae = load_lm(rows.model.location), load_sae(rows.sae.files)
    W = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    with torch.no_grad():
        gained = (W * lm.model.model.norm.weight) @ lm.model.lm_head.weight.T
    return lm.tokenizer, gained.numpy()


def test_features_that_raise_or_lower_a_token(rows: Rows, view: FeatureView) -> None:
    tokenizer, gained = logits(rows)
    for lowered, sign in ((False, 1), (True, -1)):
        order = np.argsort(-sign * gained, axis=1)[:, :10]
        token = int(np.bincount(order[:, 0]).argmax())
        text = tokenizer.decode([token])
        found = by_promoted(text, lowered=lowered, n=200)
        same = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().casefold() == text.strip().casefold()}
        expected = {int(i) for i in np.flatnonzero(np.isin(order, list(same)).any(1))}
        assert {one.feature for one in found} == expected and expected
        values = [one.logit.value for one in found if one.logit]
        assert values == sorted(values, key=lambda value: -sign * value)
        for one in found:
            assert one.logit and one.logit.value == pytest.approx(gained[one.feature, one.logit.id], abs=1e-4)


def test_features_alike_are_those_of_the_largest_cosine(rows: Rows, view: FeatureView) -> None:
    W = load_sae(rows.sae.files).W_dec
    W = (W / W.norm(dim=1, keepdim=True)).detach().numpy()
    cosine = W @ W[5]
    cosine[5] = -2
    found = alike(rows.sae, 5)
    assert [one.feature for one in found] == np.argsort(-cosine)[:50].tolist()
    np.testing.assert_allclose([one.cosine for one in found], np.sort(cosine)[::-1][:50], atol=1e-5)


def test_labels_are_found_by_the_beginnings_of_their_words_over_all_saes(rows: Rows, client_of: Any) -> None:
    other = SAE.objects.create(name="other", model=rows.model, d_sae=50, path="saes/other")
    names = {
        (rows.sae, 1): "cats and dogs",
        (rows.sae, 2): "catholic saints",
        (other, 3): "Dogs, then cats",
        (other, 4): "猫と犬",
    }
    for (sae, i), text in names.items():
        Label.objects.name_feature(sae, i, text, rows.owner)
    assert {label.feature for label in by_label("cat")} == {1, 2, 3}
    assert {label.feature for label in by_label("DOG cat")} == {1, 3}
    assert {label.feature for label in by_label("cat", rows.sae)} == {1, 2}
    assert {label.feature for label in by_label("atholi")} == {2}, "inside of a word, where no word begins so"
    assert {label.feature for label in by_label("と犬")} == {4}
    assert not by_label("' & !:*").exists()
    page = search(client_of("viewer"), q="dog").content.decode()
    assert "cats and dogs" in page and "Dogs, then cats" in page and "catholic" not in page


def test_what_cannot_be_looked_for_is_one_sentence(rows: Rows, client_of: Any, view: FeatureView) -> None:
    client = client_of("viewer")
    for query, said in (
        ({"by": "raises", "q": "zzzzqqqq"}, "No token holds “zzzzqqqq”"),
        ({"by": "like", "q": "x", "sae": rows.sae.pk}, "Write the feature&#x27;s number"),
        ({"by": "like", "q": "96", "sae": rows.sae.pk}, "There is no feature 96"),
        ({"by": "like", "q": "9"}, "Choose the SAE"),
        ({"by": "like", "q": "nobody/9"}, "There is no SAE nobody here."),
        ({"by": "nonsense", "q": "<script>alert(1)</script>", "sae": "9" * 30}, "No label holds these words"),
    ):
        response = search(client, **query)
        assert response.status_code == 200 and said in response.content.decode(), query
        assert "<script>alert" not in response.content.decode()
    assert "fault" not in search(client, by="like", q=f"{rows.sae.name}/5").content.decode()
    assert "Top tokens" in search(client, by="raises", q="a").content.decode()


def test_before_anything_is_named_the_page_says_where_names_come_from(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    page = search(client).content.decode()
    assert "No feature is named yet" in page and reverse("saes:sae_list") in page
    assert "No features harvested yet" in search(client, by="raises").content.decode()
    page = search(client, sae=rows.sae.pk).content.decode()
    assert "No feature of tiny-sae is named yet" in page
    assert reverse("concepts:feature_list", args=[rows.sae.pk]) in page
    assert reverse("concepts:label_import", args=[rows.sae.pk]) in page
    first, second = (Label.objects.name_feature(rows.sae, i, f"name {i}", rows.owner) for i in (3, 5))
    page = search(client)
    assert list(page.context["labels"]) == [second, first] and "Newest labels" in page.content.decode()


def test_names_and_densities_come_from_the_view_over_the_most_tokens(
    rows: Rows, view: FeatureView, client_of: Any, api: Any
) -> None:
    """A later, smaller harvest does not take the place of the large one."""
    small = FeatureView.objects.create(name="small", sae=rows.sae, capture=rows.capture, owner=rows.owner)
    shutil.copytree(view.folder, small.folder)
    facts = json.loads((small.folder / "view.json").read_text())
    (small.folder / "view.json").write_text(json.dumps(facts | {"n_tokens": 40}))
    small.finish(n_tokens=40, alive=90, dead=6)
    found = largest_view(rows.sae)
    assert found is not None and found[0] == view and found[1].n_tokens == view.n_tokens
    assert [one.pk for one in largest_views()] == [view.pk] == [one.pk for one in largest_views([rows.sae])]
    client = client_of("viewer")
    address = reverse("concepts:feature_list", args=[rows.sae.pk])
    assert client.get(address).context["view"] == view and client.get(f"{address}5/").context["view"] == view
    assert client.get(f"{address}?view={small.pk}").context["view"] == small, "unless it is chosen"
    for page in (client.get(address).content.decode(), client.get(f"{address}5/").content.decode()):
        assert f"({view.n_tokens:,} tokens)" in page and "(40 tokens)" in page, "what there is to choose from"
    assert good(api("viewer", "get", f"/saes/{rows.sae.pk}/features/5"))["view_id"] == view.pk
    assert good(api("viewer", "get", f"/saes/{rows.sae.pk}/features/5?view={small.pk}"))["view_id"] == small.pk


def test_without_a_view_there_are_no_logits(rows: Rows) -> None:
    with pytest.raises(SearchError, match="harvest"):
        by_promoted("Paris")
    with pytest.raises(SearchError, match="harvest its features"):
        alike(rows.sae, 3)


@pytest.mark.parametrize("n", [1, 3])
def test_the_page_asks_the_same_queries_for_one_and_three_labels(
    n: int, rows: Rows, client_of: Any, django_assert_num_queries: Any
) -> None:
    for i in range(n):
        Label.objects.name_feature(rows.sae, i, f"cats {i}", rows.owner)
    client = client_of("viewer")
    search(client, q="cats")
    with django_assert_num_queries(PAGE_QUERIES):
        assert search(client, q="cats").status_code == 200


def test_the_omnibox_finds_labels_and_concepts(rows: Rows, client_of: Any) -> None:
    client = client_of("annotator")
    label = Label.objects.name_feature(rows.sae, 5, "about <b>cats</b>", rows.owner)
    assert client.get("/search/", {"q": "cats"}).url == label.get_absolute_url(), "the only thing of that name"
    dictionary = ConceptDictionary.objects.create(sae=rows.sae, name="animals", owner=rows.owner)
    dictionary.change({"big cats": {"description": "", "members": [[5, 1.0, 1, None]]}}, rows.owner, "new")
    page = client.get("/search/", {"q": "cats"}).content.decode()
    assert "about &lt;b&gt;cats" in page and "tiny-sae/5" in page and "big cats" in page and "animals" in page


# ---------------------------------------------------------------------------------------------------- in other SAEs


@pytest.fixture
def second(rows: Rows, run_job: Any, tmp_path: Any) -> SAE:
    """Another SAE of the same hook point, harvested: rows 10 to 49 of its decoder are those of the first, turned round."""
    from django.utils import timezone

    from saes.numerics.formats import save_sae
    from tests.tiny_models import RESID, tiny_sae

    weights, first = tiny_sae("standard", d_sae=64, model_name="tiny-llama"), load_sae(rows.sae.files)
    with torch.no_grad():
        weights.W_dec[10:50] = first.W_dec[10:50].detach().flip(0) * 3
    sae = SAE.objects.create(
        name="second", source="trained", model=rows.model, model_name=rows.model.name, hook_name="model.layers.1",
        architecture="standard", d_in=32, d_sae=64, path="saes/second", owner=rows.owner, ready_at=timezone.now(),
    )  # fmt: skip
    assert RESID == "blocks.1.hook_resid_post", "the same place by another name"
    save_sae(weights, sae.files)
    view = FeatureView.objects.create(name="second", sae=sae, capture=rows.capture, owner=rows.owner, k=3)
    job = run_job(view.start(rows.owner))
    assert job.state == "done", job.error
    return sae


def test_where_another_sae_points(rows: Rows, view: FeatureView, second: SAE, client_of: Any) -> None:
    a, b = (
        torch.nn.functional.normalize(load_sae(sae.files).W_dec.detach(), dim=1).numpy() for sae in (rows.sae, second)
    )
    assert comparable(rows.sae) == [second] and comparable(second) == [rows.sae]
    found, left = alike_in(rows.sae, 12, [second])
    assert left == [] and [one.sae for one in found] == [second] * 50
    cosine = b @ a[12]
    assert found[0].feature == 47 and found[0].cosine == pytest.approx(1, abs=1e-4), "12 of 10 to 49, turned round"
    np.testing.assert_allclose([one.cosine for one in found], np.sort(cosine)[::-1][:50], atol=2e-4)
    assert alike_in(second, 47, [rows.sae])[0][0].feature == 12
    page = search(client_of("viewer"), by="like", q=f"{rows.sae.pk}/12", **{"in": second.pk}).content.decode()
    assert f"/saes/{second.pk}/features/47/" in page and "all 1 others" not in page


def test_saes_of_another_place_or_without_directions_are_not_compared(
    rows: Rows, view: FeatureView, second: SAE, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    SAE.objects.filter(pk=second.pk).update(hook_name_out="blocks.0.hook_resid_post")
    assert comparable(rows.sae) == []
    SAE.objects.filter(pk=second.pk).update(hook_name_out="")
    third = SAE.objects.create(name="not harvested", model=rows.model, hook_name=rows.sae.hook_name, d_sae=8, path="x")
    assert alike_in(rows.sae, 1, [second, third])[1] == [third]
    with pytest.raises(SearchError, match="not harvested are not kept"):
        alike_in(rows.sae, 1, [third])
    monkeypatch.setattr("concepts.search.MOST_NUMBERS", 1)
    assert alike_in(rows.sae, 1, [second, rows.sae])[1] == [rows.sae], "one is always read"
    lens = view.folder / "logit_lens.json"
    lens.write_text(lens.read_text().replace('"version": 2', '"version": 1'))
    for one in (rows.sae, second):
        page = search(client_of("viewer"), by="like", q=f"{one.pk}/3", **{"in": "others"}).content.decode()
        assert 'class="fault"' in page and "harvest" in page
    assert "fault" not in search(client_of("viewer"), by="like", q=f"{second.pk}/3", **{"in": "x"}).content.decode()


def test_the_api_compares_saes(rows: Rows, view: FeatureView, second: SAE, api: Any) -> None:
    address = f"/features/search?by=cosine&sae_id={rows.sae.pk}&feature=12&among="
    for among in (second.pk, "others"):
        items = good(api("viewer", "get", f"{address}{among}"))["items"]
        assert items[0]["sae_id"] == second.pk and items[0]["feature"] == 47
    problem(api("viewer", "get", f"{address}77"), 422, "hook point of tiny-sae")
