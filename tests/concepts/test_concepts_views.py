"""The pages of features: who may see and harvest, what the lists and one feature show, and what bad input gets."""

from __future__ import annotations

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.urls import reverse

from concepts.models import FeatureView, known_features
from saehub.jobs.models import Job, State
from tests.steering_rows import DEAD, Rows

LIST_QUERIES = 9


def features(rows: Rows, query: str = "") -> str:
    return reverse("concepts:feature_list", args=[rows.sae.pk]) + query


def feature(rows: Rows, index: int, query: str = "") -> str:
    return reverse("concepts:feature_detail", args=[rows.sae.pk, index]) + query


# -- before there is a view
def test_an_sae_without_a_view_offers_the_harvest(rows: Rows, client_of: Any) -> None:
    page = client_of("researcher").get(features(rows)).content.decode()
    assert "No features harvested yet" in page and "Harvest features" in page and rows.capture.name in page
    page = client_of("viewer").get(features(rows)).content.decode()
    assert "No features harvested yet" in page and "Harvest features" not in page


def test_harvest_is_queued_once_and_shown(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    for _ in range(2):
        response = client.post(features(rows), {"capture": rows.capture.pk})
        view = FeatureView.objects.get()
        assert response.status_code == 302 and response.url == features(rows, f"?view={view.pk}")
    job = Job.objects.get()
    assert (job.kind, job.queue, job.params) == ("harvest", "gpu", {"sae": rows.sae.pk, "view": view.pk})
    page = client.get(response.url).content.decode()
    assert f'id="job-{job.pk}"' in page and 'hx-trigger="every 2s' in page
    assert "are being harvested already" in page
    Job.objects.filter(pk=job.pk).update(state=State.FAILED, error="The disk is full.")
    page = client.get(response.url).content.decode()
    assert "The disk is full." in page and 'hx-trigger="every 2s' not in page, "at rest nothing polls"


def test_harvesting_needs_its_permission(rows: Rows, client_of: Any) -> None:
    assert client_of("annotator").post(features(rows), {"capture": rows.capture.pk}).status_code == 403
    assert not Job.objects.exists()


def test_somebody_elses_view_is_not_harvested_over(rows: Rows, client_of: Any, user_of: Any) -> None:
    FeatureView.objects.create(name="theirs", sae=rows.sae, capture=rows.capture, owner=user_of("curator"))
    assert client_of("researcher").post(features(rows), {"capture": rows.capture.pk}).status_code == 403
    assert not Job.objects.exists()


@pytest.mark.parametrize("given", ["", "12345", "x"])
def test_a_capture_that_cannot_be_used_is_an_error_at_the_field(rows: Rows, client_of: Any, given: str) -> None:
    response = client_of("researcher").post(features(rows), {"capture": given})
    assert response.status_code == 422 and not Job.objects.exists()
    page = response.content.decode()
    assert "Choose the capture" in page if not given else "That capture does not hold blocks.1.hook_resid_post" in page


def test_a_capture_of_another_width_is_refused(rows: Rows, client_of: Any) -> None:
    rows.model.hook_points[0]["d"] = 64
    rows.model.save()
    response = client_of("researcher").post(features(rows), {"capture": rows.capture.pk})
    assert response.status_code == 422
    assert (
        "This SAE reads vectors of 32 numbers, but blocks.1.hook_resid_post of tiny-llama gives 64"
        in response.content.decode()
    )


# -- the list
def shown(response: Any) -> list[int]:
    return [row.feature for row in response.context["page"]]


def test_the_list_sorts_filters_and_pages(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    columns = view.opened()
    assert shown(client.get(features(rows))) == list(range(25))
    assert shown(client.get(features(rows, "?page=4&size=25"))) == list(range(75, 96))
    assert shown(client.get(features(rows, "?size=50"))) == list(range(50))
    by_max = shown(client.get(features(rows, "?sort=-max")))
    assert by_max == columns.sorted("max", True)[:25].tolist()
    dead = client.get(features(rows, "?state=dead"))
    assert DEAD in shown(dead) and "never fired" in dead.content.decode()
    assert DEAD not in shown(client.get(features(rows, "?state=alive&size=50")))
    low = float(np.median(columns.summary["density"])) * 100
    dense = client.get(features(rows, f"?density_low={low}&size=50"))
    assert shown(dense) and all(columns.summary["density"][i] * 100 >= low for i in shown(dense))
    some = columns.feature(by_max[0]).top_tokens[0].text
    with_token = client.get(features(rows, "?size=50"), {"token": some, "size": 50})
    assert by_max[0] in columns.sorted("feature", False, {"token": some})
    assert all(i in columns.sorted("feature", False, {"token": some}) for i in shown(with_token))
    nothing = client.get(features(rows, "?max_low=1e9"))
    assert "No feature matches these filters" in nothing.content.decode()


def test_a_filter_that_makes_no_sense_says_so_and_is_left_out(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    response = client.get(features(rows, "?density_low=abc&state=dead&sort=nonsense&size=7"))
    assert response.status_code == 200 and DEAD in shown(response)
    assert "Enter a number." in response.content.decode() and 'value="abc"' in response.content.decode()
    response = client.get(features(rows, "?max_low=nan"))
    assert len(shown(response)) == 25 and "This filter is left out" in response.content.decode()
    response = client.get(features(rows, "?max_low=5&max_high=1"))
    assert "The largest maximum is below the smallest." in response.content.decode()


def test_fragments_for_htmx(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    table = client.get(features(rows), headers={"HX-Request": "true", "HX-Target": "rows"}).content.decode()
    assert table.strip().startswith('<div id="rows"') and "<svg" not in table
    live = client.get(features(rows), headers={"HX-Request": "true", "HX-Target": "live"}).content.decode()
    assert live.strip().startswith('<div id="live"') and "<svg" in live and "every 2s" not in live


@pytest.mark.parametrize("n", [1, 3])
def test_the_list_asks_the_same_queries_for_one_and_three_views(
    n: int, rows: Rows, view: FeatureView, client_of: Any, django_assert_num_queries: Any
) -> None:
    for i in range(n - 1):
        FeatureView.objects.create(name=f"v{i}", sae=rows.sae, capture=rows.capture, owner=rows.owner)
    client = client_of("viewer")
    client.get(features(rows))
    with django_assert_num_queries(LIST_QUERIES):
        assert client.get(features(rows)).status_code == 200


def test_jumping_to_a_feature(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    assert client.get(features(rows, "?feature=12&around=full")).url == feature(rows, 12, "?around=full")
    assert client.get(features(rows, "?feature=1,0")).url == feature(rows, 10)
    for wrong in ("96", "99999999"):
        page = client.get(features(rows, f"?feature={wrong}"), follow=True)
        assert page.status_code == 404
        assert f"There is no feature {wrong}; tiny-sae has features 0 to 95." in page.content.decode()
    assert client.get(features(rows, "?feature=-1")).status_code == 404
    assert client.get(features(rows, "?feature=" + "9" * 30)).status_code == 404
    assert client.get(features(rows, "?view=12345")).status_code == 404


def test_a_damaged_view_says_what_is_wrong(rows: Rows, view: FeatureView, client_of: Any) -> None:
    (view.folder / "view.json").unlink()
    page = client_of("researcher").get(features(rows))
    assert page.status_code == 200
    assert (
        "it was not finished; harvest it again" in page.content.decode() and "Harvest features" in page.content.decode()
    )
    page = client_of("researcher").get(feature(rows, 3)).content.decode()
    assert "This view cannot be shown" in page and "it was not finished" in page


@pytest.mark.parametrize(
    ("column", "harm", "sentence"),
    [
        ("maximum", "unlink", "lost its column maximum"),
        ("activation_value", "truncate", "activation_value of the feature"),
    ],
)
def test_a_column_that_is_lost_or_cut_is_a_sentence_on_the_page(
    rows: Rows, view: FeatureView, client_of: Any, column: str, harm: str, sentence: str
) -> None:
    file = view.folder / f"{column}.npy"
    if harm == "unlink":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    for address in (features(rows), feature(rows, 3)):
        response = client_of("researcher").get(address)
        assert response.status_code == 200 and sentence in response.content.decode()


# -- one feature
def test_a_feature_shows_what_its_view_holds(rows: Rows, view: FeatureView, client_of: Any) -> None:
    columns = view.opened()
    index = int(columns.sorted("n_fires")[0])
    record = columns.feature(index)
    response = client_of("viewer").get(feature(rows, index))
    page = response.content.decode()
    assert f"{record.n_fires:,}" in page and f"{record.n_tokens:,}" in page
    assert page.count('class="t ') > 10 and page.count("peak") >= len(record.top)
    for other in record.neighbours:
        assert feature(rows, other.feature) in page
    shown_ranges = [group.interval.low for group in response.context["groups"] if group.interval]
    assert shown_ranges == [interval.low for interval in record.intervals]
    values = [snippet.example.value for snippet in response.context["groups"][0].shown]
    assert values[0] == record.top[0].value and values == sorted(values, reverse=True)
    assert set(values) <= {example.value for example in record.top}
    assert feature(rows, index - 1) in page and feature(rows, index + 1) in page
    assert "/steering/new/" not in page, "a viewer may not"
    page = client_of("researcher").get(feature(rows, index)).content.decode()
    value = known_features(rows.sae, [index])[index].usual
    assert value == pytest.approx(0.5 * view.layer_norm / record.decoder_norm), "half of the layer's norm"
    assert f"?sae={rows.sae.pk}&feature={index}&mode=add&value={value:.4g}" in page.replace("&amp;", "&")


def test_the_window_and_the_scale_are_in_the_url(rows: Rows, view: FeatureView, client_of: Any) -> None:
    columns = view.opened()
    index = int(columns.sorted("n_fires")[0])
    client = client_of("viewer")
    for around, width in (("stacked", 11), ("snippet", 33), ("full", 32), ("nonsense", 33)):
        groups = client.get(feature(rows, index, f"?around={around}")).context["groups"]
        tokens = [len(snippet.tokens) for group in groups for snippet in group.shown]
        assert max(tokens) <= width and (around != "full" or set(tokens) == {32})
        for snippet in groups[0].shown:
            assert snippet.activations[snippet.peak] == snippet.example.value
            assert snippet.maximum == columns.feature(index).maximum
    for snippet in client.get(feature(rows, index, "?scale=snippet")).context["groups"][0].shown:
        assert snippet.maximum == snippet.example.value


def test_a_dead_feature_says_so_with_n(rows: Rows, view: FeatureView, client_of: Any) -> None:
    page = client_of("researcher").get(feature(rows, DEAD)).content.decode()
    assert f"dead in {view.n_tokens:,} tokens" in page
    assert f"Feature {DEAD} did not fire in {view.n_tokens:,} tokens of {rows.capture.name}" in page
    assert "Neighbours" in page and "Reproduce in Python" not in page


def test_a_feature_out_of_range_names_the_range(rows: Rows, client_of: Any) -> None:
    response = client_of("viewer").get(feature(rows, 96))
    assert response.status_code == 404
    assert "There is no feature 96; tiny-sae has features 0 to 95." in response.content.decode()


def test_a_feature_has_its_page_and_can_be_named_before_a_harvest(rows: Rows, client_of: Any) -> None:
    client = client_of("researcher")
    page = client.get(feature(rows, 3)).content.decode()
    assert "Not harvested yet" in page and features(rows) in page and "Your own text" in page
    assert (
        client.post(reverse("concepts:label_create", args=[rows.sae.pk, 3]), {"text": "about cats"}).status_code == 302
    )
    response = client.get(feature(rows, 3))
    assert response.context["accepted"].text == "about cats"
    assert set(response.context["step"]) == {"previous", "next", "random"}
    found = client.get(feature(rows, 3, "?format=json")).json()
    assert found["labels"][0]["text"] == "about cats" and "density" not in found


def test_the_python_on_the_page_finds_the_same_number(
    rows: Rows, view: FeatureView, client_of: Any, tmp_path: Path
) -> None:
    columns = view.opened()
    index = int(columns.sorted("max")[0])
    code = client_of("viewer").get(feature(rows, index)).context["python"]
    script = tmp_path / "page.py"
    script.write_text(code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script))
    assert float(printed.getvalue().removeprefix("tensor(").rstrip(")\n")) == pytest.approx(
        columns.feature(index).maximum, abs=1e-4
    )


def test_a_feature_as_json(rows: Rows, view: FeatureView, client_of: Any) -> None:
    columns = view.opened()
    index = int(columns.sorted("n_fires")[0])
    record = columns.feature(index)
    found = client_of("viewer").get(feature(rows, index, "?format=json")).json()
    assert (found["feature"], found["n_fires"], found["maximum"]) == (index, record.n_fires, record.maximum)
    assert found["neighbours"][0]["feature"] == record.neighbours[0].feature
    assert found["layer_norm"] == rows.capture.manifest["norms"]["blocks.1.hook_resid_post"]
    dead = client_of("viewer").get(feature(rows, DEAD, "?format=json")).json()
    assert dead["maximum"] is None and dead["mean"] is None and dead["n_fires"] == 0


def test_known_features(rows: Rows, view: FeatureView) -> None:
    columns = view.opened()
    known = known_features(rows.sae, [3, 95, 96, -1])
    assert sorted(known) == [3, 95] and known[3].maximum == columns.feature(3).maximum
    norm = rows.capture.manifest["norms"]["blocks.1.hook_resid_post"]
    assert known[3].per_norm == pytest.approx(columns.feature(3).decoder_norm / norm)
    view.ready_at = None
    view.save()
    assert known_features(rows.sae, [3]) == {}


def test_the_admin_lists_views_and_links_to_the_page(rows: Rows, view: FeatureView, client_of: Any) -> None:
    page = client_of("admin").get(reverse("admin:concepts_featureview_changelist") + "?q=view").content.decode()
    assert view.get_absolute_url() in page
    page = client_of("admin").get(reverse("admin:concepts_featureview_change", args=[view.pk])).content.decode()
    assert 'name="name"' in page and 'name="n_tokens"' not in page
    assert client_of("admin").get(reverse("admin:concepts_featureview_add")).status_code == 403


def test_examples_that_read_the_same_are_shown_once(rows: Rows, view: FeatureView, client_of: Any) -> None:
    """The texts are rotations of one another, so their snippets repeat."""
    columns = view.opened()
    client, repeated = client_of("viewer"), 0
    for i in columns.sorted("n_fires")[:5].tolist():
        for around in ("stacked", "full"):
            response = client.get(reverse("concepts:feature_detail", args=[rows.sae.pk, i]), {"around": around})
            group, top = response.context["groups"][0], columns.feature(i).top
            shown = [(one.peak, tuple(one.tokens)) for one in (*group.shown, *group.folded)]
            assert len(set(shown)) == len(shown) and group.n == len(top)
            repeated += sum(one.same for one in (*group.shown, *group.folded))
            assert (
                "read the same" in response.content.decode() or "reads the same" in response.content.decode()
            ) == any(one.same for part in response.context["groups"] for one in (*part.shown, *part.folded))
    assert repeated


def test_line_breaks_and_all_logits_are_shown_where_asked(rows: Rows, view: FeatureView, client_of: Any) -> None:
    i = int(view.opened().summary["n_fires"][:-1].argmax())
    client, address = client_of("viewer"), reverse("concepts:feature_detail", args=[rows.sae.pk, i])
    plain = client.get(address).content.decode()
    assert 'class="tokens lines"' not in plain and 'class="tokens "' in plain
    assert "Logit effects" not in plain and "Histogram of all" in plain
    shown = client.get(f"{address}?lines=broken&logits=all").content.decode()
    assert 'class="tokens lines"' in shown and "Logit effects" in shown
    beside = reverse("concepts:feature_detail", args=[rows.sae.pk, i + 1])
    assert f"{beside}?lines=broken&amp;logits=all" in shown, "the choice goes along"
    assert client.get(f"{address}?lines=nonsense&logits=1").status_code == 200
