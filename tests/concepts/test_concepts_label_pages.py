"""The pages of labels: named from the feature's page, described, undone; who may, and what others said."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import reverse

from concepts.models import FeatureView, Label, LabelChange
from tests.sae_rows import a_trained_sae
from tests.steering_rows import DEAD, Rows

pytestmark = pytest.mark.django_db


def url(name: str, *args: Any) -> str:
    return reverse(f"concepts:{name}", args=args)


def test_a_feature_is_named_from_its_page_with_one_field(
    rows: Rows, view: FeatureView, client_of: Any, user_of: Any
) -> None:
    page = url("feature_detail", rows.sae.pk, 3)
    client = client_of("annotator")
    shown = client.get(f"{page}?around=full").content.decode()
    assert 'data-key="l"' in shown and f'action="{page}label/?around=full"' in shown
    response = client.post(f"{page}label/?around=full", {"text": "  cats \n and dogs "})
    assert response.status_code == 302 and response.url == f"{page}?around=full"
    label = Label.objects.get()
    assert (label.text, label.owner, label.accepted, label.source) == (
        "cats and dogs", user_of("annotator"), True, "person",
    )  # fmt: skip
    assert "cats and dogs" in client.get(page).content.decode()
    assert client.get(f"{page}?format=json").json()["labels"][0]["text"] == "cats and dogs"
    listed = client.get(url("feature_list", rows.sae.pk)).content.decode()
    assert "cats and dogs" in listed
    neighbours = view.opened().feature(3).neighbours
    back = next(i for i in range(96) if 3 in [n.feature for n in view.opened().feature(i).neighbours] and i != DEAD)
    assert neighbours and "cats and dogs" in client.get(url("feature_detail", rows.sae.pk, back)).content.decode()


def test_a_viewer_sees_labels_and_gives_none(rows: Rows, view: FeatureView, client_of: Any, user_of: Any) -> None:
    label = Label.objects.name_feature(rows.sae, 3, "cats", user_of("annotator"))
    client = client_of("viewer")
    page = client.get(url("feature_detail", rows.sae.pk, 3)).content.decode()
    assert "cats" in page and 'name="text"' not in page and "Accept" not in page
    for path in (
        url("label_create", rows.sae.pk, 3),
        url("label_accept", label.pk),
        url("label_delete", label.pk),
    ):
        assert client.post(path, {"text": "x"}).status_code == 403
        assert client_of("stranger").post(path, {"text": "x"}).status_code == 403
        assert client_of("annotator").get(path).status_code == 405
    assert Label.objects.count() == 1


def test_another_persons_label_is_put_aside_only_by_who_may(client_of: Any, user_of: Any) -> None:
    sae = a_trained_sae()
    mine = Label.objects.name_feature(sae, 3, "cats", user_of("researcher"))
    client_of("annotator").post(url("label_create", sae.pk, 3), {"text": "dogs"})
    theirs = Label.objects.get(text="dogs")
    assert not theirs.accepted
    assert client_of("annotator").post(url("label_accept", theirs.pk)).status_code == 403
    assert client_of("annotator").post(url("label_delete", mine.pk)).status_code == 403
    assert client_of("curator").post(url("label_accept", theirs.pk)).status_code == 302
    assert Label.objects.accepted_of(sae, [3]) == {3: "dogs"}
    assert client_of("annotator").post(url("label_delete", theirs.pk)).status_code == 302
    assert list(Label.objects.all()) == [mine]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Write what this feature stands for."),
        (" \n ", "Write what this feature stands for."),
        ("x" * 10_000, "at most 500 characters"),
        ("a\x00b", "Null characters are not allowed"),
        ("a\x07b", "U+0007, which cannot be shown"),
    ],
)
def test_a_label_that_cannot_be_kept_says_why(
    rows: Rows, view: FeatureView, client_of: Any, text: str, sentence: str
) -> None:
    response = client_of("annotator").post(url("label_create", rows.sae.pk, 3), {"text": text}, follow=True)
    assert sentence in response.content.decode() and not Label.objects.exists()


def test_a_feature_out_of_range_has_no_label(client_of: Any) -> None:
    sae = a_trained_sae()
    assert client_of("annotator").post(url("label_create", sae.pk, 256), {"text": "x"}).status_code == 404


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "../../etc/passwd", "=cmd|' /C calc'!A0", "‮gnp.exe", "مرحبا", "猫😀"]
)
def test_any_words_are_shown_as_words(rows: Rows, view: FeatureView, client_of: Any, text: str) -> None:
    client = client_of("annotator")
    client.post(url("label_create", rows.sae.pk, 3), {"text": text})
    from django.utils.html import escape

    for page in (url("feature_detail", rows.sae.pk, 3), url("feature_list", rows.sae.pk)):
        body = client.get(page).content.decode()
        assert escape(text) in body and "<script>alert" not in body


def test_the_list_finds_features_by_label(rows: Rows, view: FeatureView, client_of: Any, user_of: Any) -> None:
    for feature, text in ((3, "cats"), (4, "Black CATS"), (5, "dogs")):
        Label.objects.name_feature(rows.sae, feature, text, user_of("annotator"))
    Label.objects.create(sae=rows.sae, feature=6, text="cats, proposed")
    Label.objects.create(sae=a_trained_sae(), feature=8, text="cats elsewhere", accepted=True)

    def found(query: str) -> list[int]:
        page = client_of("viewer").get(url("feature_list", rows.sae.pk) + query).context["page"]
        return [row.feature for row in page]

    assert found("?label=cats") == [3, 4, 6]
    assert found("?named=named") == [3, 4, 5] and found("?named=unnamed")[:5] == [0, 1, 2, 6, 7]
    assert found("?label=cats&named=unnamed") == [6] and found("?label=%25") == []
    assert found("?sort=label")[:4] == [4, 3, 5, 0] and found("?sort=-label")[:4] == [5, 3, 4, 0], (
        "those without come last"
    )
    assert len(found("?named=nonsense")) == 25


# -- what is said about a label, and its history
def test_a_label_is_described_and_a_change_undone_from_the_page(client_of: Any, user_of: Any) -> None:
    sae = a_trained_sae()
    label = Label.objects.name_feature(sae, 3, "cats", user_of("annotator"))
    page, mine = url("feature_detail", sae.pk, 3), client_of("annotator")
    shown = mine.post(
        url("label_describe", label.pk), {"confidence": "0.75", "notes": "<b>not</b> lions"}, follow=True
    ).content.decode()
    assert (
        'confidence <data value="0.75"' in shown
        and "&lt;b&gt;not&lt;/b&gt; lions" in shown
        and "Described cats" in shown
    )
    for wrong in ("1.5", "nan", "much"):
        told = mine.post(url("label_describe", label.pk), {"confidence": wrong}, follow=True).content.decode()
        assert "The confidence must be a number from 0 to 1." in told
    label.refresh_from_db()
    assert (label.confidence, label.notes) == (0.75, "<b>not</b> lions")
    change = LabelChange.objects.first()
    for path, data in ((url("label_describe", label.pk), {"notes": "x"}), (url("label_undo", change.pk), {})):
        assert client_of("viewer").post(path, data).status_code == 403
        assert client_of("researcher").post(path, data).status_code == 403, "it is another person's"
        assert client_of("stranger").post(path, data).status_code == 403
        assert mine.get(path).status_code == 405
    assert mine.post(f"{url('label_undo', change.pk)}?around=full").url == f"{page}?around=full"
    label.refresh_from_db()
    assert (label.confidence, label.notes) == (None, "")
    assert "label-history" in client_of("viewer").get(page).content.decode()


def test_many_labels_are_folded_behind_the_accepted_and_the_newest(
    rows: Rows, view: FeatureView, client_of: Any, user_of: Any
) -> None:
    for number in range(9):
        Label.objects.create(
            sae=rows.sae, feature=3, text=f"name {number}", accepted=number == 0, source="file", by="x"
        )
    page = client_of("viewer").get(reverse("concepts:feature_detail", args=[rows.sae.pk, 3]))
    html = page.content.decode()
    assert next(label.text for label in page.context["labels"]) == "name 0" and len(page.context["labels"]) == 6
    assert '<details id="more-labels"><summary>3 more</summary>' in html
    assert all(f"name {number}" in html for number in range(9))
    Label.objects.filter(text__in=["name 5", "name 6", "name 7"]).delete()
    assert 'id="more-labels"' not in client_of("viewer").get(page.request["PATH_INFO"]).content.decode()
