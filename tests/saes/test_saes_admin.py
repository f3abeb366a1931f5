"""The curator's desk: bulk actions, filters, history, and lists that do not ask a query a row."""

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.models import SAE, Release
from tests.sae_rows import a_catalogue_row, a_model, a_trained_sae, write_sae

pytestmark = pytest.mark.django_db
LIST = "admin:saes_sae_changelist"
# session, user, two of permissions, owners to choose from, the values of all filters, the believed count, the exact one,
# rows
LIST_QUERIES = 9


def act(client: Any, action: str, *rows: Any, page: str = LIST, **more: Any) -> str:
    data = {"action": action, "_selected_action": [row.pk for row in rows], **more}
    return str(client.post(reverse(page), data, follow=True).content.decode())


@pytest.mark.parametrize(
    "action, curation",
    [("publish", "published"), ("review", "reviewed"), ("deprecate", "deprecated"), ("draft", "draft")],
)
def test_bulk_curation_with_history(action: str, curation: str, client_of: Any) -> None:
    start = "reviewed" if curation == "draft" else "draft"
    rows = [a_catalogue_row(name, curation=start) for name in ("a", "b")]
    same = a_catalogue_row("c", curation=curation)
    assert f"2 SAEs are {curation} now." in act(client_of("curator"), action, *rows, same)
    assert set(SAE.objects.values_list("curation", flat=True)) == {curation}
    assert LogEntry.objects.count() == 2, "what was so already has no line"
    page = client_of("viewer").get(rows[0].get_absolute_url() + "?tab=history").content.decode()
    assert f"{start} → {curation}" in page and "a-curator" in page


def test_a_whole_release_is_curated(client_of: Any) -> None:
    release = Release.objects.create(name="scope", repo_id="org/scope", format="saelens")
    row, other = a_catalogue_row("a", release=release), a_catalogue_row("b")
    assert "1 SAE is published now." in act(
        client_of("curator"), "publish", release, page="admin:saes_release_changelist"
    )
    row.refresh_from_db(), other.refresh_from_db()
    assert (row.curation, other.curation) == ("published", "draft")


def test_verify_and_reread_queue_jobs_and_say_what_was_left_out(client_of: Any) -> None:
    here, there = a_trained_sae(), a_catalogue_row()
    page = act(client_of("curator"), "verify_files", here, there)
    assert "1 job was queued" in page and "1 was left out" in page and "has no files on this machine" in page
    page = act(client_of("curator"), "reread_config", here, there)
    assert "1 job was queued" in page and '<li class="warn warning">' in page and "has no repository on the Hub" in page
    assert set(Job.objects.values_list("kind", "subject_id")) == {("verify", here.pk), ("inspect", there.pk)}


def test_rows_are_given_to_somebody(client_of: Any, user_of: Any) -> None:
    rows = [a_catalogue_row(name) for name in ("a", "b")]
    act(client_of("curator"), "set_owner", *rows, owner=str(user_of("researcher").pk))
    assert set(SAE.objects.values_list("owner__username", flat=True)) == {"a-researcher"}
    assert LogEntry.objects.filter(change_message="Given to a-researcher").count() == 2
    act(client_of("curator"), "set_owner", *rows, owner="")
    assert set(SAE.objects.values_list("owner", flat=True)) == {None}
    act(client_of("curator"), "set_owner", *rows, owner="99999")
    assert set(SAE.objects.values_list("owner", flat=True)) == {None}, "there is no such user"


def test_the_list_is_narrowed_and_searched(client_of: Any) -> None:
    release = Release.objects.create(name="scope", repo_id="org/scope", format="saelens")
    failed = Job.objects.create(kind="download", queue="io", title="t", state=State.FAILED)
    a_trained_sae("alpha", site="resid_post", curation="published")
    a_catalogue_row("beta", release=release, site="mlp_out", notes="a rare word")
    a_catalogue_row("gamma", job=failed)

    def names(query: str) -> set[str]:
        found = client_of("curator").get(reverse(LIST) + query)
        assert found.status_code == 200
        return {row.name for row in found.context["cl"].result_list}

    assert names("") == {"alpha", "beta", "gamma"}
    assert names("?curation__exact=published") == {"alpha"} and names("?source__exact=hub") == {"beta", "gamma"}
    assert (
        names("?here=yes") == {"alpha"}
        and names("?here=no") == {"beta", "gamma"}
        and names("?here=failed") == {"gamma"}
    )
    assert names("?architecture=topk") == {"alpha"} and names("?model_name=tiny") == {"alpha"}
    assert names("?site=mlp_out") == {"beta"} and names(f"?release__id__exact={release.pk}") == {"beta"}
    assert names("?q=bet") == {"beta"} and names("?q=rare+word") == {"beta"} and names("?q=nothing") == set()


def test_the_list_asks_as_often_for_three_rows_as_for_one(client_of: Any, user_of: Any) -> None:
    client = client_of("curator")

    def make(name: str) -> None:
        a_trained_sae(
            name, owner=user_of("researcher"), model=a_model(name),
            release=Release.objects.create(name=name, repo_id="o/r", format="x"),
        )  # fmt: skip

    make("first")
    client.get(reverse(LIST))
    counts = []
    for names in ((), ("second", "third")):
        for name in names:
            make(name)
        with CaptureQueriesContext(
            connection,
        ) as asked:
            page = client.get(reverse(LIST)).content.decode()
        counts.append(len(asked))
    assert counts == [LIST_QUERIES, LIST_QUERIES]
    assert all(f">{name}<" in page for name in ("first", "second", "third"))


def test_a_large_table_is_counted_by_what_the_database_believes(
    client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saes.admin import Estimated

    SAE.objects.bulk_create(SAE(name=f"sae {n}", source="hub", repo_id="org/r", repo_path=str(n)) for n in range(300))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE saes_sae")
    monkeypatch.setattr(Estimated, "LIMIT", 100)
    with CaptureQueriesContext(connection) as asked:
        found = client_of("curator").get(reverse(LIST))
    assert found.context["cl"].paginator.count == 300 and len(found.context["cl"].result_list) == 50
    assert not any("COUNT(*)" in query["sql"] and "saes_sae" in query["sql"] for query in asked)
    narrowed = client_of("curator").get(reverse(LIST) + "?q=sae+29")
    assert narrowed.context["cl"].paginator.count == 11, "a narrowed list is counted exactly"


def test_the_form_changes_what_people_say_and_nothing_else(client_of: Any) -> None:
    sae = a_trained_sae(model=a_model(), repo_id="org/r", repo_path="p")
    url = reverse("admin:saes_sae_change", args=[sae.pk])
    page = client_of("curator").get(url).content.decode()
    for name in ("name", "curation", "notes", "owner", "model"):
        assert f'name="{name}"' in page, name
    for name in ("d_sae", "path", "sha256", "config", "release", "repo_id"):
        assert f'name="{name}"' not in page, name
    data = {"name": "new", "curation": "reviewed", "notes": "words", "owner": "", "d_sae": "1", "path": "/etc"}
    assert client_of("curator").post(url, data).status_code == 302
    sae.refresh_from_db()
    assert (sae.name, sae.curation, sae.notes, sae.d_sae, sae.path) == ("new", "reviewed", "words", 256, "sae/tiny/one")
    history = client_of("viewer").get(sae.get_absolute_url() + "?tab=history").content.decode()
    assert "Changed Name, Curation" in history or "Changed" in history
    assert client_of("researcher").get(url).status_code == 403


def test_deleting_leaves_what_is_in_use(client_of: Any) -> None:
    free, used = a_trained_sae("free"), a_trained_sae("used")
    write_sae(free.files), write_sae(used.files)
    Job.objects.create(kind="evaluate", queue="gpu", title="Evaluate used", subject_id=used.pk, state=State.RUNNING)
    page = act(client_of("curator"), "delete_selected", free, used, post="yes")
    assert "Used stays: Evaluate used" in page and "Successfully deleted 1 SAE." in page
    assert list(SAE.objects.values_list("name", flat=True)) == ["used"]
    assert used.files.exists() and not free.files.exists()
    client_of("curator").post(reverse("admin:saes_sae_delete", args=[used.pk]), {"post": "yes"})
    assert SAE.objects.filter(name="used").exists()


def test_who_may_open_the_desk(client_of: Any) -> None:
    for role in ("viewer", "annotator", "researcher", "stranger"):
        assert client_of(role).get(reverse(LIST)).status_code == 403
        assert client_of(role).get(reverse("admin:saes_release_changelist")).status_code == 403
    assert client_of("curator").get(reverse("admin:saes_release_changelist")).status_code == 200
    assert client_of("curator").get(reverse("admin:saes_release_add")).status_code == 403


def test_times_that_are_not_known_stay_unknown(client_of: Any) -> None:
    row = a_catalogue_row(verified_at=None, ready_at=None, created_at=timezone.now())
    page = client_of("curator").get(reverse("admin:saes_sae_change", args=[row.pk])).content.decode()
    assert '<div class="readonly">0.0</div>' not in page
