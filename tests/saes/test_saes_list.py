"""The one list: trained, imported and catalogue rows together; facets, search, sort, range, pages, the state of each."""

import re
from typing import Any

import pytest
from django.db import connection
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.filters import Filters
from saes.listing import sorting
from saes.models import SAE, LanguageModel
from saes.registry import COLUMNS, _ordered

pytestmark = pytest.mark.django_db
# session, user, two of permissions, stars, version of the counts, counts, pending downloads, keys, rows, running jobs
LIST_QUERIES = 11
REMEMBERED = 9  # without the two that count


def an_sae(name: str, **fields: Any) -> SAE:
    given = {
        "source": "hub", "model_name": "gemma-2-2b", "hook_name": "blocks.1.hook_resid_post", "site": "resid_post", "layer": 1,
        "architecture": "jumprelu", "d_sae": 16384, "repo_id": "org/repo", "repo_path": name, "format": "gemma_scope_1",
    }  # fmt: skip
    return SAE.objects.create(name=name, **given | fields)


def trained(name: str, **fields: Any) -> SAE:
    given = {
        "source": "trained", "model_name": "tiny", "architecture": "topk", "d_sae": 256, "k": 8, "repo_id": "", "repo_path": "",
        "path": f"sae/tiny/{name}", "size_bytes": 1000, "ready_at": timezone.now(), "l0": 8.0, "explained_variance": 0.8,
    }  # fmt: skip
    return an_sae(name, **given | fields)


def with_job(name: str, state: str, **fields: Any) -> SAE:
    job = Job.objects.create(kind="download", queue="io", title=name, state=state, done=30, total=100)
    return an_sae(name, job=job, **fields)


@pytest.fixture
def names(client_of: Any) -> Any:
    client = client_of("viewer")

    def get(query: str = "") -> list[str]:
        return [row.sae.name for row in client.get(reverse("saes:sae_list") + query).context["page"]]

    return get


@pytest.fixture
def counts(client_of: Any) -> Any:
    """`counts(query)["site"]`: [(value, rows)] as the page shows them."""
    client = client_of("viewer")

    def get(query: str = "") -> dict[str, list[tuple[str, int]]]:
        facets = client.get(reverse("saes:sae_list") + query).context["facets"]
        return {facet.key: [(option.value, option.n) for option in facet.options] for facet in facets}

    return get


def test_it_asks_as_often_for_three_rows_as_for_one(
    client_of: Any, user_of: Any, django_assert_num_queries: Any
) -> None:
    client, owner = client_of("viewer"), user_of("curator")
    url = reverse("saes:sae_list")

    def make(name: str) -> None:
        model = LanguageModel.objects.create(name=name, location="x", ready_at=timezone.now())
        with_job(name, State.RUNNING, owner=owner, model=model)

    client.get(url)
    make("first")
    with django_assert_num_queries(LIST_QUERIES):
        client.get(url)
    with django_assert_num_queries(REMEMBERED):
        client.get(url)
    make("second"), make("third")
    with django_assert_num_queries(LIST_QUERIES):
        html = client.get(url).content.decode()
    assert all(name in html for name in ("first", "second", "third"))


def test_what_is_here_comes_first_then_what_has_a_job(names: Any) -> None:
    an_sae("far")
    with_job("coming", State.RUNNING)
    trained("older", ready_at=timezone.now() - timezone.timedelta(days=1))
    trained("newer")
    assert names() == ["newer", "older", "coming", "far"]


def test_facets_count_each_under_the_others(counts: Any, names: Any) -> None:
    an_sae("a"), an_sae("b", site="mlp_out", layer=2), an_sae("c", model_name="gpt2-small", d_sae=24576)
    trained("mine", curation="reviewed")
    every = counts()
    assert every["model"] == [("gemma-2-2b", 2), ("gpt2-small", 1), ("tiny", 1)]
    assert every["site"] == [("mlp_out", 1), ("resid_post", 3)] and every["layer"] == [("1", 3), ("2", 1)]
    assert every["width"] == [("256", 1), ("16384", 2), ("24576", 1)]
    assert every["source"] == [("trained", 1), ("hub", 3)] and every["curation"] == [("draft", 3), ("reviewed", 1)]
    assert every["state"] == [("here", 1), ("none", 3)]
    one = counts("?model=gemma-2-2b")
    assert one["model"] == every["model"], "its own filter does not narrow a facet"
    assert one["site"] == [("mlp_out", 1), ("resid_post", 1)] and one["layer"] == [("1", 1), ("2", 1)]
    assert one["state"] == [("none", 2)] and one["source"] == [("hub", 2)]
    two = counts("?model=gemma-2-2b&site=mlp_out")
    assert two["model"] == [("gemma-2-2b", 1)] and two["layer"] == [("2", 1)]
    assert counts("?layer=2")["model"] == [("gemma-2-2b", 1)], "the layer narrows the others too"
    assert counts("?layer=2")["layer"] == every["layer"]
    assert names("?model=gpt2-small&model=tiny") == ["mine", "c"], "several values of a facet are either of them"


def test_facets_agree_with_the_rows_under_every_single_choice(counts: Any, client_of: Any) -> None:
    (
        an_sae("a", layer=None, site="embed"),
        an_sae("b", d_sae=None, architecture=""),
        an_sae("c", layer=12, model_name=""),
    )
    with_job("d", State.QUEUED), with_job("e", State.FAILED), with_job("f", State.CANCELLED), trained("g")
    seen = 0
    for key, options in counts().items():
        for value, n in options:
            answer = client_of("viewer").get(reverse("saes:sae_list"), {key: value})
            assert len(answer.context["page"].object_list) == answer.context["total"] == n, (key, value)
            seen += 1
    assert seen > 15


def test_states_tell_what_a_download_is_doing(names: Any, counts: Any, client_of: Any) -> None:
    with_job("queued", State.QUEUED), with_job("running", State.RUNNING), with_job("failed", State.FAILED)
    with_job("cancelled", State.CANCELLED), an_sae("far"), trained("mine")
    assert counts()["state"] == [("here", 1), ("coming", 2), ("failed", 1), ("none", 2)]
    assert set(names("?state=coming")) == {"queued", "running"} and names("?state=failed") == ["failed"]
    assert set(names("?state=none")) == {"cancelled", "far"} and names("?state=here") == ["mine"]
    html = client_of("viewer").get(reverse("saes:sae_list") + "?state=coming&q=running").content.decode()
    assert "30 %" in html and "every 3s" in html
    assert "every 3s" not in client_of("viewer").get(reverse("saes:sae_list") + "?state=none").content.decode()


def test_the_cell_of_a_download_is_asked_for_alone(client_of: Any) -> None:
    row = with_job("running", State.RUNNING)
    url = reverse("saes:sae_state", args=[row.pk])
    html = client_of("viewer").get(url).content.decode()
    assert html.strip().startswith("<td") and f'hx-get="{url}"' in html and "30 %" in html
    SAE.objects.update(ready_at=timezone.now())
    assert "hx-get" not in client_of("viewer").get(url).content.decode()


def test_words_begin_parts_of_names_ids_and_paths(names: Any, client_of: Any) -> None:
    an_sae("one", repo_id="google/gemma-scope-2-1b-pt", repo_path="resid_post/layer_13_width_262k_l0_small")
    an_sae(
        "two",
        repo_id="org/other",
        neuronpedia_id="gpt2-small/8-res-jb",
        aliases=["old-release/blocks.8"],
        notes="Pinned",
    )
    assert names("?q=scope+262k") == ["one"] and names("?q=GEMMA-scope-2") == ["one"]
    assert names("?q=scope+262k") == ["one"] and names("?q=width_262") == ["one"]
    assert names("?q=8-res-jb") == ["two"] and names("?q=old-release") == ["two"] and names("?q=pin") == ["two"]
    assert names("?q=scope+pinned") == [] and names("?q=%27%29%3B+%3A%2A+%7C+%26") == []
    assert names("?q=%26%7C%21") == [], "what has no letter or digit finds nothing, and is no error"
    for odd in ("É", "ß²½", "日本語", "a\u0301", "ª", "٣", "\u200d", "x" * 3000, "'\\"):
        assert client_of("viewer").get(reverse("saes:sae_list"), {"q": odd}).status_code == 200, odd


def test_the_l0_range_takes_the_measured_or_else_the_published(names: Any, counts: Any) -> None:
    an_sae("published", published_l0=82.0)
    trained("measured", l0=20.0, published_l0=82.0)
    trained("unknown", l0=None)
    assert names("?l0_min=50") == ["published"] and names("?l0_max=50") == ["measured"]
    assert names("?l0_min=10&l0_max=100&sort=l0") == ["measured", "published"]
    assert counts("?l0_min=50")["source"] == [("hub", 1)]
    assert len(names("?l0_min=nonsense&l0_max=nan")) == 3


def test_published_and_measured_are_told_apart(client_of: Any) -> None:
    an_sae("remote", published_l0=82.0, published_variance=0.5)
    trained("mine", l0=20.5, published_l0=21.0, explained_variance=0.75)
    trained("bare", l0=None, explained_variance=None, size_bytes=0)
    html = client_of("viewer").get(reverse("saes:sae_list") + "?sort=name").content.decode()
    cells = [row.split("<td") for row in html.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]]
    dash = 'class="n">–</td>'
    bare, mine, remote = (
        [re.sub(r"</?data[^>]*>|</?abbr[^>]*>", "", " ".join(cell.split())) for cell in row] for row in cells
    )
    assert 'class="n">20.5<small>' in mine[6] and "publ. 21.0" in mine[6]
    assert 'class="n">–<small>' in remote[6] and "publ. 82.0" in remote[6] and "publ. 0.500" in remote[7]
    assert bare[6].startswith(dash) and bare[7].startswith(dash.replace('"n"', '"n ev"')), "not known is no 0"
    assert bare[8].startswith(dash)
    assert html.count("As its name says") == 1, "a width is nominal until the files were read"


def test_sorting_keeps_the_unknown_last(names: Any) -> None:
    trained("a", l0=8.0), trained("b", l0=200.0), an_sae("c", d_sae=None)
    assert names("?sort=-l0") == ["b", "a", "c"] and names("?sort=l0") == ["a", "b", "c"]
    assert names("?sort=name") == ["a", "b", "c"] and names("?sort=-name") == ["c", "b", "a"]
    assert names("?sort=-features")[-1] == "c" and names("?sort=password&page=99&layer=x&width=9999999999") == []
    assert names("?sort=password&page=99&q=%00&state=nonsense") == []


SORTS = [f"{way}{column.key}" for column in COLUMNS if column.by for way in ("", "-")]


@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_shows_each_row_once_over_its_pages_and_the_unknown_last(sort: str, names: Any) -> None:
    for n in range(30):
        known = {"l0": n % 4, "explained_variance": n % 5 / 8, "d_sae": 2 ** (n % 3)} if n % 6 else {}
        nothing = {"l0": None, "explained_variance": None, "d_sae": None}
        trained(f"s{n:02}", **nothing | known, model_name=f"m{n % 4}", architecture="ab"[n % 2], size_bytes=n % 7)
    shown = names(f"?sort={sort}") + names(f"?sort={sort}&page=2")
    assert sorted(shown) == sorted(SAE.objects.values_list("name", flat=True))
    rows = {row.name: row for row in SAE.objects.all()}
    by = {"model": "model_name", "features": "d_sae", "ev": "explained_variance", "size": "size_bytes"}
    key = sort.removeprefix("-")
    values = [getattr(rows[name], by.get(key, key)) for name in shown]
    there = [value for value in values if value is not None]
    assert there == sorted(there, reverse=sort.startswith("-")) and values[: len(there)] == there


@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_walks_an_index(sort: str) -> None:
    """Also of a hundred thousand: nothing is sorted but the rows of equal values."""
    order, _ = sorting(sort, COLUMNS)
    page = _ordered(Filters(), order)[:25]
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute("SET LOCAL enable_sort = off")
        cursor.execute("SET LOCAL enable_bitmapscan = off")
    plan = re.findall(r"[A-Z]\w+(?: \w+)*(?=  \(cost)", page.explain(costs=True))
    assert "Sort" not in plan and [node for node in plan if node.startswith("Index")], plan


def test_it_has_25_rows_a_page(names: Any, client_of: Any) -> None:
    SAE.objects.bulk_create(SAE(name=f"s{n:02}", source="hub", repo_id="o/r", repo_path=str(n)) for n in range(26))
    assert len(names()) == 25 and names("?sort=name&page=2") == ["s25"] == names("?sort=name&page=99")
    html = client_of("viewer").get(reverse("saes:sae_list") + "?sort=name&page=2&source=hub").content.decode()
    assert "26–26 of 26" in html and "sort=name&amp;page=1&amp;source=hub" in html, "the URL keeps everything"


def test_a_fragment_is_only_the_rows(client_of: Any) -> None:
    trained("one")
    html = client_of("viewer").get(reverse("saes:sae_list"), headers={"HX-Request": "true"}).content.decode()
    assert html.strip().startswith('<div id="rows"') and "<html" not in html


def test_who_may_not_download_gets_no_boxes(client_of: Any) -> None:
    an_sae("far")
    assert 'name="sae"' not in client_of("viewer").get(reverse("saes:sae_list")).content.decode()
    html = client_of("researcher").get(reverse("saes:sae_list")).content.decode()
    assert 'name="sae"' in html and 'action="/saes/basket/"' in html and 'value="add"' in html
    assert client_of("stranger").get(reverse("saes:sae_list")).status_code == 403


def test_an_empty_list_names_the_next_action(client_of: Any) -> None:
    html = client_of("researcher").get(reverse("saes:sae_list")).content.decode()
    assert reverse("training:run_create") in html and reverse("saes:sae_download") in html
    assert "Ask a researcher" in client_of("viewer").get(reverse("saes:sae_list")).content.decode()


def test_what_left_the_directory_says_so(client_of: Any) -> None:
    an_sae("old", gone_at=timezone.now())
    assert "gone from the directory" in client_of("viewer").get(reverse("saes:sae_list")).content.decode()


def test_a_separator_in_a_foreign_name_shifts_nothing(counts: Any, names: Any) -> None:
    an_sae("odd", model_name="a\x1fb\x1fc")
    assert counts()["site"] == [("resid_post", 1)] and counts()["model"] == [("a\x1fb\x1fc", 1)]
    assert names("?model=a%1Fb%1Fc") == ["odd"]
