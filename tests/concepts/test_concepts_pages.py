"""Pages of dictionaries, concepts and configs: who may, what they show, what bad input gets."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from django.urls import reverse

from concepts.models import Concept, ConceptConfig, ConceptDictionary, FeatureView, Label
from tests.sae_rows import a_trained_sae
from tests.steering_rows import DEAD, Rows

pytestmark = pytest.mark.django_db
LIST_QUERIES = {"dictionary_list": 9, "config_list": 9}
DICTIONARY_QUERIES = 12
CONCEPT_QUERIES = 13


@pytest.fixture
def dictionary(user_of: Any) -> ConceptDictionary:
    return ConceptDictionary.objects.create(sae=a_trained_sae(), name="kinship", owner=user_of("researcher"))


def put(dictionary: ConceptDictionary, name: str, *members: list[Any]) -> Concept:
    held = [[*member, 1.0, 1, None][:4] if len(member) == 1 else member for member in members]
    dictionary.change({name: {"description": "", "members": held}}, dictionary.owner, f"New concept {name}")
    return dictionary.concepts.get(name=name)


def url(name: str, *args: Any) -> str:
    return reverse(f"concepts:{name}", args=args)


# -- lists
@pytest.mark.parametrize("n", [1, 3])
def test_lists_ask_the_same_queries_for_one_and_three_rows(
    n: int, user_of: Any, client_of: Any, django_assert_num_queries: Any
) -> None:
    for i in range(n):
        sae = a_trained_sae(f"sae-{i}")
        dictionary = ConceptDictionary.objects.create(sae=sae, name="kin", owner=user_of("researcher"))
        put(dictionary, "family", [3])
        ConceptConfig.next_version(sae, "polite", [{"feature": 3, "mode": "add", "value": 1.0}], user_of("curator"))
    client = client_of("viewer")
    for name, queries in LIST_QUERIES.items():
        client.get(url(name))
        with django_assert_num_queries(queries):
            assert len(client.get(url(name)).context["page"].object_list) == n


@pytest.mark.parametrize("n", [1, 3])
def test_a_dictionary_and_a_concept_ask_the_same_queries_however_many(
    n: int, dictionary: ConceptDictionary, client_of: Any, django_assert_num_queries: Any
) -> None:
    for i in range(n):
        concept = put(dictionary, f"c{i}", *([j] for j in range(n)))
    client = client_of("viewer")
    client.get(dictionary.get_absolute_url())
    with django_assert_num_queries(DICTIONARY_QUERIES):
        assert client.get(dictionary.get_absolute_url()).status_code == 200
    with django_assert_num_queries(CONCEPT_QUERIES):
        assert client.get(concept.get_absolute_url()).status_code == 200


def test_empty_lists_say_what_they_are_for(client_of: Any) -> None:
    assert "No dictionary yet" in client_of("viewer").get(url("dictionary_list")).content.decode()
    assert "No config yet" in client_of("viewer").get(url("config_list")).content.decode()
    assert "No SAE is here yet" in client_of("researcher").get(url("dictionary_create")).content.decode()
    assert "No SAE is here yet" in client_of("researcher").get(url("config_create")).content.decode()


# -- dictionaries
def test_a_dictionary_is_made_and_only_its_owner_and_curators_change_it(client_of: Any, user_of: Any) -> None:
    sae = a_trained_sae()
    client = client_of("researcher")
    data = {"sae": sae.pk, "name": "kinship", "source": "a paper", "notes": "n"}
    assert client_of("annotator").post(url("dictionary_create"), data).status_code == 403
    response = client.post(url("dictionary_create"), data)
    dictionary = ConceptDictionary.objects.get()
    assert response.url == dictionary.get_absolute_url() and dictionary.owner == user_of("researcher")
    again = client.post(url("dictionary_create"), data)
    assert again.status_code == 422 and "has a dictionary of this name" in again.content.decode()
    other = client_of("annotator")
    from tests.conftest import make_user

    stranger = make_user("another-researcher", "researcher")
    other.force_login(stranger, backend="django.contrib.auth.backends.ModelBackend")
    for name in ("dictionary_edit", "dictionary_delete", "concept_create", "dictionary_import"):
        assert other.get(url(name, dictionary.pk)).status_code == 403, name
    assert other.post(url("dictionary_history", dictionary.pk), {"revision": "0"}).status_code == 403
    assert client_of("curator").get(url("dictionary_edit", dictionary.pk)).status_code == 200
    client.post(url("dictionary_edit", dictionary.pk), {"name": "kin", "source": "", "notes": ""})
    dictionary.refresh_from_db()
    assert dictionary.name == "kin" and dictionary.sae == sae
    client.post(url("dictionary_delete", dictionary.pk))
    assert not ConceptDictionary.objects.exists()


def test_a_concept_is_written_edited_renamed_deleted_and_brought_back(
    dictionary: ConceptDictionary, client_of: Any
) -> None:
    client = client_of("researcher")
    data = {"name": "family", "description": "kin", "members": "3\n17 -0.5\n\n20, 2, 0.9"}
    response = client.post(url("concept_create", dictionary.pk), data)
    concept = Concept.objects.get()
    assert response.url == concept.get_absolute_url()
    held = {"description": "kin", "members": [[3, 1.0, 1, None], [17, 0.5, -1, None], [20, 2.0, 1, 0.9]]}
    assert dictionary.states() == {"family": held}
    form = client.get(url("concept_edit", concept.pk)).context["form"]
    assert form["members"].value() == "3\n17 -0.5\n20 2.0 0.9"
    same = client.post(url("concept_edit", concept.pk), form.initial)
    assert same.status_code == 302 and dictionary.revisions.count() == 1, "saving what is there changes nothing"
    client.post(url("concept_edit", concept.pk), data | {"name": "kin", "members": "3"})
    concept.refresh_from_db()
    assert concept.name == "kin" and dictionary.states()["kin"]["members"] == [[3, 1.0, 1, None]]
    client.post(url("concept_edit", concept.pk), {"delete": "1"})
    assert dictionary.states() == {}
    page = client.get(url("dictionary_history", dictionary.pk) + "?revision=2").content.decode()
    assert "Concept kin changed" in page and "not there" in page
    client.post(url("dictionary_history", dictionary.pk), {"revision": "1"})
    assert dictionary.states() == {"family": held}
    assert client.post(url("dictionary_history", dictionary.pk), {"revision": "99"}).status_code == 404
    assert client.post(url("dictionary_history", dictionary.pk), {"revision": "x"}).status_code == 404


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"members": "256"}, "Line 1: There is no feature 256; this SAE has features 0 to 255."),
        ({"members": "3\n-4"}, "Line 2: There is no feature -4"),
        ({"members": "3\n3 2"}, "Line 2: Feature 3 is there twice; keep one line of it."),
        ({"members": "cat"}, "Line 1: &quot;cat&quot; is not the number of a feature."),
        ({"members": "3 nan"}, "Line 1: The weight is nan; it must be a finite number."),
        ({"members": "3 x"}, "Line 1: The weight &quot;x&quot; is not a number."),
        ({"members": "3 1 1 1"}, "Line 1: It has more than a feature, a weight and a score."),
        ({"name": "x" * 10_000}, "The name has 10,000 characters; at most 500 are kept."),
        ({"name": "taken"}, "kinship has a concept of this name; choose another name."),
        ({"description": "x" * 10_000}, "The description has 10,000 characters; at most 5,000 are kept."),
    ],
)
def test_a_concept_that_cannot_be_keeps_what_was_typed(
    dictionary: ConceptDictionary, client_of: Any, changes: dict[str, str], sentence: str
) -> None:
    put(dictionary, "taken", [1])
    data = {"name": "family", "description": "", "members": "3"} | changes
    response = client_of("researcher").post(url("concept_create", dictionary.pk), data)
    body = response.content.decode()
    assert response.status_code == 422 and sentence in body and Concept.objects.count() == 1
    assert all(str(value)[:100] in body for value in changes.values())


def test_a_concept_shows_the_top_texts_of_its_members_and_leads_to_steering(
    rows: Rows, view: FeatureView, client_of: Any, user_of: Any
) -> None:
    dictionary = ConceptDictionary.objects.create(sae=rows.sae, name="kin", owner=rows.owner)
    index = int(view.opened().sorted("max")[0])
    concept = put(dictionary, "family", [index, 1.0, 1, 0.9], [DEAD, 0.5, -1, None])
    Label.objects.name_feature(rows.sae, index, "cats", user_of("annotator"))
    record = view.opened().feature(index)
    response = client_of("researcher").get(concept.get_absolute_url() + "?mode=add&value=4")
    page = response.content.decode()
    assert "cats" in page and page.count('class="t ') > 5 and "never fired in" in page
    assert [s.example.value for s in response.context["page"].object_list[0].texts] == [e.value for e in record.top[:2]]
    query = response.context["steer"]
    assert f"/steering/new/?{query}".replace("&", "&amp;") in page
    form = client_of("researcher").get(f"/steering/new/?{query}")
    low, high = sorted([(index, 4.0), (DEAD, -2.0)])
    filled = [
        (r["feature"].value(), r["mode"].value(), float(r["value"].value())) for r in form.context["rows"].forms[:2]
    ]
    assert filled == [(str(low[0]), "add", low[1]), (str(high[0]), "add", high[1])]
    assert "Use in steering" not in client_of("viewer").get(concept.get_absolute_url()).content.decode()
    moved = response.context["moved"]
    assert [m.at_maximum for m in moved if m.move.feature == index] == [pytest.approx(record.maximum + 4)]
    for bad in ("nan", "x", "1e9"):
        page = client_of("viewer").get(concept.get_absolute_url() + f"?value={bad}")
        assert page.status_code == 200 and "strength" in page.context["fault"]
    assert (
        "There is no mode"
        in client_of("viewer").get(concept.get_absolute_url() + "?mode=explode&value=1").context["fault"]
    )


def test_too_many_features_for_the_steering_page_are_not_cut_short(rows: Rows, client_of: Any) -> None:
    dictionary = ConceptDictionary.objects.create(sae=rows.sae, name="kin", owner=rows.owner)
    concept = put(dictionary, "family", *([i] for i in range(25)))
    response = client_of("researcher").get(concept.get_absolute_url())
    assert response.context["steer"] == "" and len(response.context["moved"]) == 25
    assert "The steering page takes 24 edits at a time" in response.content.decode()


# -- configs
def posted(*edits: tuple[Any, str, Any], **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"name": "polite", "note": "", "edits-TOTAL_FORMS": 16, "edits-INITIAL_FORMS": 0}
    for i in range(16):
        target, mode, value = edits[i] if i < len(edits) else ("", "add", "")
        data |= {f"edits-{i}-target": target, f"edits-{i}-mode": mode, f"edits-{i}-value": value}
    return data | changes


def test_a_config_is_previewed_and_saved_as_a_version(dictionary: ConceptDictionary, client_of: Any) -> None:
    put(dictionary, "family", [3], [17, 0.5, -1, None])
    page = url("config_create") + f"?sae={dictionary.sae.pk}"
    client = client_of("researcher")
    edits = (("family", "add", "4"), ("5", "ablate", ""), ("3", "add", "1"))
    preview = client.post(page, posted(*edits, name="", preview="1"))
    assert preview.status_code == 200 and not ConceptConfig.objects.exists()
    assert [(m.move.feature, m.move.mode, m.move.value) for m in preview.context["moved"]] == [
        (3, "add", 5.0), (5, "ablate", 0.0), (17, "add", -2.0),
    ]  # fmt: skip
    assert preview.context["moved"][0].asked == ["family", "feature 3"]
    wrong = client.post(page, posted(("3", "add", "nan"), name="", preview="1"))
    assert "finite number" in wrong.content.decode() and "This field is required" not in wrong.content.decode()
    response = client.post(page, posted(*edits))
    config = ConceptConfig.objects.get()
    assert response.url == config.get_absolute_url() and (config.name, config.number) == ("polite", 1)
    shown = client.get(response.url)
    assert shown.status_code == 200 and "version 1" in shown.content.decode()
    form = client.get(url("config_create") + f"?from={config.pk}").context["rows"]
    assert [form.forms[i]["target"].value() for i in range(3)] == ["kinship/family", "5", "3"]
    client.post(url("config_create") + f"?from={config.pk}", posted(("5", "ablate", "")))
    assert list(ConceptConfig.objects.values_list("number", flat=True)) == [2, 1]
    assert [c.number for c in client.get(url("config_list")).context["page"]] == [2], "the newest of each"


def test_somebody_elses_config_gets_no_version_of_mine(
    dictionary: ConceptDictionary, client_of: Any, user_of: Any
) -> None:
    ConceptConfig.next_version(dictionary.sae, "polite", [], user_of("curator"))
    page = url("config_create") + f"?sae={dictionary.sae.pk}"
    assert client_of("researcher").post(page, posted(("5", "ablate", ""))).status_code == 403
    assert client_of("annotator").get(page).status_code == 403 and ConceptConfig.objects.count() == 1


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ([("256", "add", "1")], "There is no feature 256; this SAE has features 0 to 255."),
        ([("-1", "add", "1")], "There is no feature -1"),
        ([("nobody", "add", "1")], "There is no concept &quot;nobody&quot;"),
        ([("5", "add", "nan")], "The value must be a finite number"),
        ([("5", "add", "")], "Give the value v of this edit."),
        ([("5", "add", "-2e6")], "The value must lie between -1,000,000 and 1,000,000."),
        ([("", "add", "2")], "Of what? Give a feature&#x27;s number"),
        (
            [("5", "add", "1"), ("5", "clamp", "2")],
            "Feature 5 is moved by add 1 and by clamp 2, which contradict each other",
        ),
        ([("5", "explode", "1")], "Select a valid choice."),
        ([("family", "add", "1")], "Several dictionaries have a concept"),
    ],
)
def test_a_config_that_cannot_be_is_an_error_at_its_row(
    dictionary: ConceptDictionary, client_of: Any, edits: list[Any], sentence: str
) -> None:
    put(dictionary, "family", [3])
    put(ConceptDictionary.objects.create(sae=dictionary.sae, name="other"), "family", [4])
    response = client_of("researcher").post(url("config_create") + f"?sae={dictionary.sae.pk}", posted(*edits))
    assert response.status_code == 422 and sentence in response.content.decode()
    assert not ConceptConfig.objects.exists()


def test_a_config_leaves_and_enters_as_json(dictionary: ConceptDictionary, client_of: Any) -> None:
    put(dictionary, "family", [3], [17, 0.5, -1, None])
    client, sae = client_of("researcher"), dictionary.sae
    client.post(url("config_create") + f"?sae={sae.pk}", posted(("kinship/family", "add", "4"), ("5", "scale", "2")))
    config = ConceptConfig.objects.get()
    ours = client.get(config.get_absolute_url() + "?format=json").json()
    assert ours["compiled"] == config.compiled() and ours["n_features"] == 256
    theirs = client.get(config.get_absolute_url() + "?format=mi_crow").json()
    assert theirs == {"weights": {"5": 2.0}, "bias": {"3": 4.0, "17": -2.0}}
    page = url("config_read") + f"?sae={sae.pk}"
    preview = client.post(page, {"text": json.dumps(ours), "preview": "1"})
    assert preview.status_code == 200 and ConceptConfig.objects.count() == 1
    assert preview.context["name"]["name"].value() == "polite"
    client.post(page, {"text": json.dumps(ours), "name": "read"})
    assert ConceptConfig.objects.get(name="read").edits == config.edits, "nothing is lost"
    client.post(page, {"text": json.dumps(theirs), "name": "theirs"})
    assert ConceptConfig.objects.get(name="theirs").compiled() == config.compiled()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Paste a config."),
        ("{", "This is not JSON."),
        ("[" * 100_000, "This is not JSON."),
        ("[1]", "A config is a JSON object"),
        (
            '{"edits": [{"concept": "a\\u0000", "mode": "add", "value": 1}]}',
            "Texts may hold neither the zero character",
        ),
        (
            '{"edits": [{"concept": "a", "dictionary": "\\udfff", "mode": "add", "value": 1}]}',
            "halves of surrogate pairs",
        ),
        ("{}", "A config has &quot;edits&quot;"),
        ('{"edits": [5]}', "Every edit needs a feature or a concept and a mode"),
        ('{"edits": [{"feature": 256, "mode": "add", "value": 1}]}', "There is no feature 256"),
        ('{"edits": [{"feature": 5, "mode": "add", "value": NaN}]}', "The value of an edit is nan"),
        ('{"edits": [{"mode": "add", "value": 1}]}', "There is no concept"),
        ('{"edits": [{"concept": "x", "members": [5], "mode": "add", "value": 1}]}', "A member needs a feature"),
        ('{"n_features": 5000, "edits": []}', "The config is for an SAE of 5000 features"),
        ('{"weights": {"5": 2.0}, "bias": {}}', "mi_crow then adds 1 to every feature"),
        ('{"weights": {"999": 2.0}}', "There is no feature 999"),
    ],
)
def test_json_that_is_no_config_says_why(client_of: Any, text: str, sentence: str) -> None:
    sae = a_trained_sae()
    response = client_of("researcher").post(url("config_read") + f"?sae={sae.pk}", {"text": text, "name": "x"})
    assert response.status_code == 422 and sentence in response.content.decode()
    assert not ConceptConfig.objects.exists()


def test_an_empty_bias_of_mi_crow_is_answered_by_the_person(client_of: Any) -> None:
    page = url("config_read") + f"?sae={a_trained_sae().pk}"
    text = '{"weights": {"5": 2.0}, "bias": {}}'
    client_of("researcher").post(page, {"text": text, "name": "x", "ones": "no"})
    assert ConceptConfig.objects.get().compiled() == [{"feature": 5, "mode": "scale", "value": 2.0}]
    made = client_of("researcher").post(page, {"text": text, "name": "y", "ones": "yes"}, follow=True)
    edits = ConceptConfig.objects.get(name="y").compiled()
    on_5 = [(edit["mode"], edit["value"]) for edit in edits if edit["feature"] == 5]
    assert len(edits) == 257 and on_5 == [("scale", 2.0), ("add", 1.0)]
    assert re.search(r"<td>scale <data[^>]*>2.000</data>, then add <data[^>]*>1.000</data></td>", made.content.decode())


def test_a_cap_is_nothing_that_mi_crow_can_say(dictionary: ConceptDictionary, client_of: Any) -> None:
    edits = [{"feature": 3, "mode": "cap", "value": 2.0}]
    config = ConceptConfig.next_version(dictionary.sae, "calm", edits, dictionary.owner)
    page = client_of("viewer").get(config.get_absolute_url() + "?format=mi_crow", follow=True)
    assert page.redirect_chain and "it cannot cap feature 3" in page.content.decode()


def test_the_admin_lists_them_all(dictionary: ConceptDictionary, client_of: Any) -> None:
    put(dictionary, "family", [3])
    Label.objects.create(sae=dictionary.sae, feature=3, text="cats")
    ConceptConfig.next_version(dictionary.sae, "polite", [], None)
    client = client_of("admin")
    for model in (
        "conceptdictionary",
        "concept",
        "conceptfeature",
        "label",
        "conceptconfig",
        "conceptimport",
        "dictionaryrevision",
    ):
        assert client.get(reverse(f"admin:concepts_{model}_changelist")).status_code == 200, model
    config = ConceptConfig.objects.get()
    assert (
        'name="edits"'
        not in client.get(reverse("admin:concepts_conceptconfig_change", args=[config.pk])).content.decode()
    )
    label = Label.objects.get()
    assert 'name="text"' in client.get(reverse("admin:concepts_label_change", args=[label.pk])).content.decode()


# -- into a concept from the feature's page
def test_a_feature_goes_into_a_concept_from_its_page(client_of: Any, user_of: Any) -> None:
    sae = a_trained_sae()
    add, client = url("member_add", sae.pk, 5), client_of("researcher")

    def told(text: str) -> str:
        return client.post(add, {"concept": text}, follow=True).content.decode()

    assert "no dictionary over the features" in told("cats") and "Write the concept&#x27;s name." in told(" ")
    one = ConceptDictionary.objects.create(sae=sae, name="animals", owner=user_of("researcher"))
    assert "Feature 5 is in big cats of animals" in told("  big   cats ")
    assert "is in big cats already" in told("animals/big cats")
    client.post(url("member_add", sae.pk, 3), {"concept": "big cats"})
    assert one.states() == {"big cats": {"description": "", "members": [[3, 1.0, 1, None], [5, 1.0, 1, None]]}}
    two = ConceptDictionary.objects.create(sae=sae, name="others", owner=user_of("curator"))
    assert "Several dictionaries could be meant" in told("dogs")
    assert client.post(add, {"concept": "others/dogs"}).status_code == 403, "it is another person's"
    assert two.states() == {} and "at most 500 are kept" in told("animals/" + "x" * 900)
    told("animals/a/b <script>")
    assert "a/b <script>" in one.states() and one.revisions.count() == 3
    assert client_of("viewer").post(add, {"concept": "x"}).status_code == 403
    assert client.post(url("member_add", sae.pk, 256), {"concept": "big cats"}).status_code == 404
    assert client.get(add).status_code == 405
