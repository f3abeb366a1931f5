"""Tags of the team and stars of one's own: on the pages, in the list's filters and counts, on the desk, by the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from saes.dependents import dependents
from saes.models import SAE, Star
from saes.tags import LONGEST, MOST, starred_by, tag, tags_of
from tests.api_calls import problem
from tests.sae_rows import a_catalogue_row, a_trained_sae

pytestmark = pytest.mark.django_db
TAG = "saes:sae_tag"


def tags(sae: SAE) -> list[str]:
    return list(SAE.objects.values_list("tags", flat=True).get(pk=sae.pk))


@pytest.fixture
def names(client_of: Callable[[str], Client]) -> Callable[..., list[str]]:
    def get(query: str = "", role: str = "viewer") -> list[str]:
        return [row.sae.name for row in client_of(role).get(reverse("saes:sae_list") + query).context["page"]]

    return get


@pytest.fixture
def counts(client_of: Callable[[str], Client]) -> Callable[[str], dict[str, list[tuple[str, int]]]]:
    def get(query: str = "") -> dict[str, list[tuple[str, int]]]:
        facets = client_of("viewer").get(reverse("saes:sae_list") + query).context["facets"]
        return {facet.key: [(option.value, option.n) for option in facet.options] for facet in facets}

    return get


# ------------------------------------------------------------------------------------------------------- tags


def test_what_is_written_becomes_short_words() -> None:
    assert tags_of(" Paper, to-check #paper\tv1.2 Größe ") == ["größe", "paper", "to-check", "v1.2"]
    assert tags_of("") == tags_of(" , ") == []
    for wrong, said in (("-x", "cannot be a tag"), ("a/b", "cannot be a tag"), ("x" * (LONGEST + 1), "short word")):
        with pytest.raises(ValueError, match=said):
            tags_of(f"good {wrong}")
    with pytest.raises(ValueError, match=f"room for {MOST}"):
        tags_of(" ".join(f"t{n}" for n in range(MOST + 1)))


def test_the_longest_tags_fit_into_the_index(counts: Any) -> None:
    words = [f"{'語' * (LONGEST - 2)}{n:02}" for n in range(MOST)]
    row = a_catalogue_row(model_name="語" * 120, architecture="ö" * 40)
    row.tags = words
    row.save()
    assert counts()["tag"] == [(word, 1) for word in words]


def test_the_tag_facet_counts_each_tag_under_the_other_filters(names: Any, counts: Any) -> None:
    a_trained_sae("both", tags=["a", "b"], site="x")
    a_trained_sae("one", tags=["a"], site="y")
    a_trained_sae("none", site="y")
    assert counts()["tag"] == [("a", 2), ("b", 1), ("–", 1)]
    assert counts("?site=y")["tag"] == [("a", 1), ("–", 1)]
    under_b = counts("?tag=b")
    assert under_b["tag"] == [("a", 2), ("b", 1), ("–", 1)], "its own filter does not narrow a facet"
    assert under_b["site"] == [("x", 1)] and counts("?tag=a")["site"] == [("x", 1), ("y", 1)]
    assert counts("?tag=b&layer=–")["site"] == [("x", 1)], "the layer is counted under the tag"
    assert names("?tag=b&sort=name") == ["both"] and names("?tag=a&tag=b&sort=name") == ["both", "one"]
    assert names("?tag=–") == ["none"] and names("?tag=b&tag=–&sort=name") == ["both", "none"]
    assert names("?tag=missing") == [] and counts("?tag=missing")["tag"][-2:] == [("missing", 0), ("–", 1)]
    assert names("?q=both&tag=a") == ["both"] and counts("?q=one")["tag"] == [("a", 1)]
    a_trained_sae("found", tags=["zeta-1"])
    assert names("?q=zet+1") == ["found"], "a search finds tags too"


def test_the_total_is_that_of_the_rows_under_every_tag(counts: Any, client_of: Any) -> None:
    for n in range(6):
        a_trained_sae(f"s{n}", tags=[["x"], ["x", "y"], []][n % 3], layer=n % 2)
    for query in ("?tag=x", "?tag=y&layer=1", "?tag=–&state=here", "?tag=x&tag=–", "?tag=y&q=s"):
        page = client_of("viewer").get(reverse("saes:sae_list") + query)
        assert page.context["total"] == len(page.context["page"].object_list) > 0, query


def test_one_is_tagged_on_its_page_with_a_line_in_its_history(client_of: Any) -> None:
    sae = a_trained_sae(tags=["old", "stays"])
    page = client_of("annotator").get(sae.get_absolute_url()).content.decode()
    assert 'value="old stays"' in page and 'href="/saes/?tag=old"' in page
    answer = client_of("annotator").post(reverse(TAG), {"sae": sae.pk, "tags": "New, stays", "action": "set"})
    assert answer.url == sae.get_absolute_url() and tags(sae) == ["new", "stays"]
    assert LogEntry.objects.get().change_message == "Tagged new; No more tagged old"
    client_of("annotator").post(reverse(TAG), {"sae": sae.pk, "tags": "stays new", "action": "set"})
    assert LogEntry.objects.count() == 1, "nothing changed"
    client_of("annotator").post(reverse(TAG), {"sae": sae.pk, "tags": "", "action": "set"})
    assert tags(sae) == []


def test_several_are_tagged_in_the_list_whosever_they_are(client_of: Any, user_of: Any) -> None:
    a, b, c = a_trained_sae("a", owner=user_of("curator")), a_trained_sae("b", tags=["x"]), a_trained_sae("c")
    client, here = client_of("annotator"), reverse("saes:sae_list") + "?source=trained"
    data = {"sae": [a.pk, b.pk], "tags": "x y", "next": here}
    answer = client.post(reverse(TAG), data | {"action": "add"}, follow=True)
    assert answer.redirect_chain[0][0] == here and "Tags of 2 SAEs changed." in answer.content.decode()
    assert [tags(row) for row in (a, b, c)] == [["x", "y"], ["x", "y"], []]
    client.post(reverse(TAG), data | {"action": "remove", "tags": "x"})
    assert [tags(row) for row in (a, b, c)] == [["y"], ["y"], []]
    assert "They were so already." in client.post(reverse(TAG), data | {"action": "remove", "tags": "x"}, follow=True).content.decode()  # fmt: skip


def test_what_cannot_be_a_tag_is_said_and_nothing_changes(client_of: Any) -> None:
    a, full = a_trained_sae("a"), a_trained_sae("full", tags=[f"t{n:02}" for n in range(MOST)])
    post = client_of("annotator").post
    for data, said in (
        ({"sae": a.pk, "tags": "a/b", "action": "add"}, "a/b cannot be a tag"),
        ({"sae": a.pk, "tags": " ", "action": "add"}, "Write the tag first."),
        ({"sae": "x", "tags": "a", "action": "add"}, "Choose at least one SAE first."),
        ({"sae": [a.pk, full.pk], "tags": "new", "action": "add"}, f"full has room for {MOST} tags"),
        ({"sae": [a.pk, full.pk], "tags": "new", "action": "set"}, "Say whether to add or remove tags."),
    ):
        assert said in post(reverse(TAG), data, follow=True).content.decode(), said
    assert tags(a) == [] and len(tags(full)) == MOST and not LogEntry.objects.exists()
    out = {"sae": a.pk, "tags": "ok", "action": "add", "next": "https://elsewhere.example/"}
    assert post(reverse(TAG), out).url == a.get_absolute_url(), "never to a page of somebody else's"


def test_who_may_only_look_does_not_tag(client_of: Any) -> None:
    sae = a_trained_sae(tags=["x"])
    data = {"sae": sae.pk, "tags": "y", "action": "add"}
    assert client_of("viewer").post(reverse(TAG), data).status_code == 403
    assert client_of("viewer").get(reverse(TAG)).status_code == 405
    page = client_of("viewer").get(reverse("saes:sae_list")).content.decode()
    assert 'name="tags"' not in page and '<a class="chip" href="/saes/?tag=x">x</a>' in page
    page = client_of("annotator").get(reverse("saes:sae_list")).content.decode()
    assert 'name="tags"' in page and 'value="fetch"' not in page, "who tags need not download"


def test_the_desk_edits_and_narrows_by_tags(client_of: Any) -> None:
    a, b = a_trained_sae("a", tags=["x"]), a_trained_sae("b")
    desk = reverse("admin:saes_sae_changelist")
    client = client_of("curator")
    assert {row.name for row in client.get(desk + "?tag=x").context["cl"].result_list} == {"a"}
    picked = {"_selected_action": [a.pk, b.pk], "tags": "y z"}
    assert "Tags of 2 SAEs changed." in client.post(desk, picked | {"action": "add_tags"}, follow=True).content.decode()
    client.post(desk, picked | {"action": "remove_tags", "tags": "z"}, follow=True)
    assert tags(a) == ["x", "y"] and tags(b) == ["y"]
    page = reverse("admin:saes_sae_change", args=[a.pk])
    form = client.get(page).context["adminform"].form
    assert form["tags"].value() == "x y"
    kept = {"name": "a", "curation": "draft", "owner": "", "licence": "", "pin": "", "notes": "", "model": ""}
    assert "cannot be a tag" in client.post(page, kept | {"tags": "a/b"}).content.decode()
    assert client.post(page, kept | {"tags": "W v"}).status_code == 302
    assert tags(a) == ["v", "w"]


def test_scripts_tag_and_narrow(api: Any) -> None:
    a, b = a_trained_sae("a", tags=["x"]), a_trained_sae("b")
    body = api("annotator", "post", "/saes/tags", {"saes": [a.pk, b.pk], "add": ["New"], "remove": ["x"]}).json()
    assert body == {"changed": 2, "tags": {str(a.pk): ["new"], str(b.pk): ["new"]}}
    found = api("viewer", "get", "/saes?tag=new&facets=true").json()
    assert found["count"] == 2 and found["facets"]["tag"] == {"new": 2} and found["items"][0]["tags"] == ["new"]
    assert api("viewer", "get", "/saes?tag=x").json()["count"] == 0
    problem(api("annotator", "post", "/saes/tags", {"saes": [a.pk], "add": ["two words"]}), 422, "is not one tag")
    problem(api("annotator", "post", "/saes/tags", {"saes": [a.pk, 10**30], "add": ["y"]}), 404, "There is no SAE")
    assert tags(a) == ["new"]


# ------------------------------------------------------------------------------------------------------- stars


def test_a_star_is_given_and_taken_off_and_is_ones_own(client_of: Any, user_of: Any, names: Any) -> None:
    a, b = a_trained_sae("a"), a_trained_sae("b")
    url, here = reverse("saes:sae_star", args=[a.pk]), reverse("saes:sae_list") + "?sort=name"
    for _ in range(2):
        assert client_of("viewer").post(url, {"starred": "1", "next": here}).url == here
    assert starred_by(user_of("viewer")) == {a.pk} and Star.objects.count() == 1
    page = client_of("viewer").get(here)
    assert page.content.decode().count('aria-pressed="true"') == 1 and page.context["n_starred"] == 1
    assert names("?starred=1") == ["a"] and names("?starred=1&q=nothing") == []
    assert names("?starred=1", "curator") == [] and names("", "curator") == names(""), "another person's list is whole"
    assert 'aria-pressed="true"' in client_of("viewer").get(a.get_absolute_url()).content.decode()
    assert 'aria-pressed="true"' not in client_of("curator").get(a.get_absolute_url()).content.decode()
    assert dependents(a) == [], "a star keeps nothing from being deleted"
    client_of("viewer").post(url, {"starred": "0"})
    assert starred_by(user_of("viewer")) == frozenset() and names("?starred=1") == []
    client_of("viewer").post(reverse("saes:sae_star", args=[b.pk]), {"starred": "1"})
    b.delete()
    assert not Star.objects.exists()
    assert client_of("viewer").post(reverse("saes:sae_star", args=[a.pk + 99])).status_code == 404
    assert client_of("stranger").post(url).status_code == 403


def test_the_starred_are_counted_under_the_other_filters(client_of: Any, counts: Any) -> None:
    rows = [a_trained_sae(f"s{n}", layer=n % 2, tags=["x"] if n else []) for n in range(4)]
    for row in rows[:3]:
        client_of("viewer").post(reverse("saes:sae_star", args=[row.pk]), {"starred": "1"})

    def shown(query: str) -> tuple[int, int]:
        context = client_of("viewer").get(reverse("saes:sae_list") + query).context
        return context["n_starred"], context["total"]

    assert shown("") == (3, 4) and shown("?layer=1") == (1, 2) and shown("?starred=1&layer=1") == (1, 1)
    assert counts("?starred=1")["layer"] == [("0", 2), ("1", 1)] and counts("?starred=1")["tag"] == [("x", 2), ("–", 1)]
    client_of("viewer").post(reverse("saes:sae_star", args=[rows[3].pk]), {"starred": "1"})
    assert counts("?starred=1")["layer"] == [("0", 2), ("1", 2)], "what was counted of other stars is not remembered"


def test_a_click_in_the_page_swaps_the_star_alone(client_of: Any) -> None:
    sae = a_trained_sae()
    url = reverse("saes:sae_star", args=[sae.pk])
    html = client_of("viewer").post(url, {"starred": "1"}, headers={"HX-Request": "true"}).content.decode()
    assert html.startswith("<button") and 'aria-pressed="true"' in html and 'value="0"' in html


def test_stars_ask_as_often_for_three_rows_as_for_one(
    client_of: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    client, url = client_of("viewer"), reverse("saes:sae_list")
    client.get(url)
    for n in range(3):
        Star.objects.create(user=user_of("viewer"), sae=a_trained_sae(f"s{n}", tags=[f"t{n}", "x"]))
        if n != 1:
            with django_assert_num_queries(
                12
            ):  # of test_saes_list.py, and how many of the starred are under the filters
                client.get(url)
            with django_assert_num_queries(11):
                client.get(url + "?starred=1")


def test_all_the_starred_go_into_the_basket(client_of: Any) -> None:
    rows = [a_catalogue_row(f"r{n}") for n in range(3)]
    client = client_of("researcher")
    for row in rows[:2]:
        client.post(reverse("saes:sae_star", args=[row.pk]), {"starred": "1"})
    client.post(reverse("saes:sae_basket"), {"action": "add_all", "query": "starred=1"})
    assert client.session["basket"] == [rows[0].pk, rows[1].pk]


def test_scripts_star_for_their_owner(api: Any, user_of: Any) -> None:
    sae = a_trained_sae()
    assert api("viewer", "put", f"/saes/{sae.pk}/star").json() == {"id": sae.pk, "starred": True}
    assert api("viewer", "get", f"/saes/{sae.pk}").json()["starred"] is True
    assert api("curator", "get", f"/saes/{sae.pk}").json()["starred"] is False
    assert api("viewer", "get", "/saes?starred=true").json()["count"] == 1
    assert api("curator", "get", "/saes?starred=true").json()["count"] == 0
    assert api("viewer", "get", "/saes?starred=false").json()["count"] == 1
    assert api("viewer", "delete", f"/saes/{sae.pk}/star").json()["starred"] is False
    assert not starred_by(user_of("viewer"))


def test_a_sync_of_the_catalogue_keeps_tags_and_stars(user_of: Any) -> None:
    """What a sync writes of a row it knows are columns of their own."""
    from saes.catalogue import GUESSED, PUBLISHED

    assert "tags" not in {*GUESSED, *PUBLISHED}
    row = a_catalogue_row()
    assert tag(user_of("annotator"), [row.pk], add=["x"]) == 1 and tag(user_of("annotator"), [], add=["x"]) == 0
