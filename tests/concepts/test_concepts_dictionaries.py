"""Dictionaries: every change is kept and can be undone; labels: at most one accepted; configs: versions never change."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, transaction

from concepts.compile import ConfigError
from concepts.models import Concept, ConceptConfig, ConceptDictionary, Label, LabelChange
from tests.sae_rows import a_trained_sae

pytestmark = pytest.mark.django_db


@pytest.fixture
def dictionary(user_of: Any) -> ConceptDictionary:
    return ConceptDictionary.objects.create(sae=a_trained_sae(), name="kinship", owner=user_of("researcher"))


def state(*members: list[Any], description: str = "") -> dict[str, Any]:
    return {"description": description, "members": list(members)}


FAMILY = state([3, 1.0, 1, 0.9], [17, 0.5, -1, None], description="kin")


def test_a_change_is_read_back_and_kept_as_a_revision(dictionary: ConceptDictionary, user_of: Any) -> None:
    user = user_of("researcher")
    revision = dictionary.change({"family": FAMILY, "tools": state([5, 1.0, 1, None])}, user, "first")
    assert revision is not None and (revision.number, revision.added, revision.owner) == (1, 2, user)
    assert dictionary.states()["family"] == FAMILY and dictionary.states(["family"]).keys() == {"family"}
    assert dictionary.change({"family": FAMILY}, user, "the same again") is None, "nothing changed, nothing is kept"
    pk = Concept.objects.get(name="family").pk
    less = state([3, 2.0, 1, 0.9])
    second = dictionary.change({"family": less, "tools": None}, user, "second")
    assert second is not None and (second.number, second.changed, second.removed) == (2, 1, 1)
    assert dictionary.states() == {"family": less} and Concept.objects.get(name="family").pk == pk


def test_reverting_leads_to_any_earlier_state_and_back(dictionary: ConceptDictionary) -> None:
    dictionary.change({"family": FAMILY}, None, "one")
    dictionary.change({"family": state([3, 9.0, 1, None]), "tools": state([5, 1.0, 1, None])}, None, "two")
    dictionary.change({"kin": FAMILY, "family": None}, None, "renamed", renamed=("family", "kin"))
    three = dictionary.states()
    dictionary.revert(1, None)
    assert dictionary.states() == {"family": FAMILY}
    dictionary.revert(0, None)
    assert dictionary.states() == {}
    dictionary.revert(3, None)
    assert dictionary.states() == three
    assert [r.number for r in dictionary.revisions.all()] == [6, 5, 4, 3, 2, 1]
    assert dictionary.revert(6, None) is None, "already there"


def test_a_renamed_concept_keeps_its_address(dictionary: ConceptDictionary) -> None:
    dictionary.change({"family": FAMILY}, None, "one")
    pk = Concept.objects.get().pk
    dictionary.change({"family": None, "kin": FAMILY}, None, "renamed", renamed=("family", "kin"))
    assert Concept.objects.get().pk == pk and dictionary.states() == {"kin": FAMILY}


@pytest.mark.parametrize(("weight", "sign"), [(-1.0, 1), (1.0, 0), (1.0, 2)])
def test_the_database_refuses_a_member_that_makes_no_sense(
    dictionary: ConceptDictionary, weight: float, sign: int
) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        dictionary.change({"family": state([3, weight, sign, None])}, None, "wrong")
    assert dictionary.states() == {} and not dictionary.revisions.exists()


# -- labels
def test_one_label_is_accepted_and_a_person_is_not_overruled(user_of: Any) -> None:
    sae = a_trained_sae()
    machine = Label.objects.create(sae=sae, feature=3, text="noun", source="model", by="some-model", accepted=True)
    mine = Label.objects.name_feature(sae, 3, "cats", user_of("annotator"))
    machine.refresh_from_db()
    assert mine.accepted and not machine.accepted, "a person's name goes before a model's"
    theirs = Label.objects.name_feature(sae, 3, "dogs", user_of("curator"))
    assert not theirs.accepted and Label.objects.accepted_of(sae, [3, 4]) == {3: "cats"}
    again = Label.objects.name_feature(sae, 3, "felines", user_of("annotator"))
    assert again.accepted, "one's own name is one's own to change"
    theirs.accept(user_of("curator"))
    assert Label.objects.accepted_of(sae, [3]) == {3: "dogs"} and Label.objects.filter(feature=3).count() == 4
    with pytest.raises(IntegrityError), transaction.atomic():
        Label.objects.filter(pk=mine.pk).update(accepted=True)


def test_naming_twice_with_the_same_words_is_one_label(user_of: Any) -> None:
    sae = a_trained_sae()
    labels = {Label.objects.name_feature(sae, 3, "cats", user_of(who)).pk for who in ("annotator", "curator")}
    assert len(labels) == 1


def test_the_longest_labels_fit_their_index() -> None:
    import random

    letters = random.Random(0)
    text, by, method = ("".join(chr(letters.randrange(0x20000, 0x2A000)) for _ in range(n)) for n in (500, 80, 40))
    label = Label.objects.create(sae=a_trained_sae(), feature=1, text=text, by=by, method=method)
    assert Label.objects.get(text=text) == label


# -- configs
def test_versions_are_numbered_and_never_change(user_of: Any) -> None:
    sae, user = a_trained_sae(), user_of("researcher")
    first = ConceptConfig.next_version(sae, "polite", [{"feature": 3, "mode": "add", "value": 2.0}], user)
    second = ConceptConfig.next_version(sae, "polite", [{"feature": 4, "mode": "ablate", "value": 0.0}], user)
    assert [str(first), str(second)] == ["polite v1", "polite v2"]
    assert first.compiled() == [{"feature": 3, "mode": "add", "value": 2.0}]
    first.edits = []
    with pytest.raises(ValueError, match="does not change"):
        first.save()
    with pytest.raises(ConfigError):
        ConceptConfig.next_version(sae, "polite", [{"feature": 3, "mode": "explode", "value": 2.0}], user)
    assert ConceptConfig.objects.count() == 2


def test_a_version_keeps_the_members_a_concept_had(dictionary: ConceptDictionary) -> None:
    dictionary.change({"family": FAMILY}, None, "one")
    edit = Concept.objects.get().edit("add", 4.0)
    config = ConceptConfig.next_version(dictionary.sae, "kin", [edit], None)
    dictionary.change({"family": None}, None, "gone")
    config.refresh_from_db()
    assert config.compiled() == [
        {"feature": 3, "mode": "add", "value": 4.0},
        {"feature": 17, "mode": "add", "value": -2.0},
    ]


# -- history of labels
def test_every_change_of_a_features_labels_is_kept_and_can_be_undone(user_of: Any) -> None:
    sae, ada = a_trained_sae(), user_of("annotator")

    def labels() -> list[tuple[str, bool, float | None, str]]:
        rows = Label.objects.filter(sae=sae, feature=3).order_by("text")
        return list(rows.values_list("text", "accepted", "confidence", "notes"))

    Label.objects.create(sae=sae, feature=3, text="noun", source="model", by="some-model", accepted=True, score=0.7)
    seen = [labels()]
    cats = Label.objects.name_feature(sae, 3, "cats", ada, confidence=0.8, notes="seldom dogs")
    seen.append(labels())
    assert seen[1] == [("cats", True, 0.8, "seldom dogs"), ("noun", False, None, "")]
    cats.describe(ada, confidence=None, notes="always")
    seen.append(labels())
    Label.objects.get(text="noun").accept(ada)
    seen.append(labels())
    cats.remove(ada)
    assert labels() == [("noun", True, None, "")]
    changes = list(LabelChange.objects.filter(sae=sae, feature=3))
    assert [change.what for change in changes] == ["Deleted cats", "Accepted noun", "Described cats", "Named cats"]
    for change, before in zip(changes, reversed(seen), strict=True):
        change.undo(ada)
        assert labels() == before, change.what
    noun = Label.objects.get()
    assert (noun.by, noun.score, noun.source) == ("some-model", 0.7, "model")
    LabelChange.objects.first().undo(ada)
    assert labels() == seen[1], "undoing is a change that can be undone"
    assert Label.objects.get(text="cats").owner == ada


def test_undoing_leaves_what_others_did_meanwhile(user_of: Any) -> None:
    sae = a_trained_sae()
    Label.objects.name_feature(sae, 3, "cats", user_of("annotator"))
    dogs = Label.objects.name_feature(sae, 3, "dogs", user_of("curator"))
    dogs.accept(user_of("curator"))
    named, accepted = LabelChange.objects.get(what="Named cats"), LabelChange.objects.get(what="Accepted dogs")
    assert named.rival is None and accepted.rival == dogs
    named.undo(user_of("annotator"))
    assert list(Label.objects.values_list("text", "accepted")) == [("dogs", True)]
    Label.objects.name_feature(sae, 3, "dogs", user_of("curator"))
    assert LabelChange.objects.count() == 4, "what changes nothing is no change"


def test_nobody_describes_a_label_of_another_by_naming(user_of: Any) -> None:
    sae = a_trained_sae()
    mine = Label.objects.name_feature(sae, 3, "cats", user_of("annotator"), confidence=0.5)
    Label.objects.name_feature(sae, 3, "cats", user_of("curator"), confidence=0.9, notes="no")
    mine.refresh_from_db()
    assert (mine.confidence, mine.notes) == (0.5, "")
    assert Label.objects.name_feature(sae, 3, "cats", user_of("annotator"), notes="yes").notes == "yes"
