"""Counts of the list are remembered, and never of other rows than those that are there."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction
from django.http import QueryDict
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.counting import MOST_CHANGES, facets_of, list_version
from saes.filters import Filters
from saes.listing import PAGE
from saes.models import SAE
from saes.registry import registry
from tests.sae_rows import a_catalogue_row

pytestmark = pytest.mark.django_db


def total(query: str = "") -> int:
    return facets_of(Filters.of(QueryDict(query)))[1]


def states() -> dict[str, int]:
    facet = next(facet for facet in facets_of(Filters())[0] if facet.key == "state")
    return {option.value: option.n for option in facet.options}


def test_a_second_look_counts_nothing() -> None:
    a_catalogue_row("one", model_name="a")
    asked = []
    for query in ("", "", "model=a", "model=a", "q=one", "q=one"):
        with CaptureQueriesContext(connection) as seen:
            assert total(query) == 1
        asked.append(len(seen))
    assert asked == [
        3,
        1,
        4,
        1,
        7,
        1,
    ]  # version, counts, pending; once the texts of facets; a setting within a savepoint


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (lambda: a_catalogue_row("two"), {"none": 2}),
        (lambda: SAE.objects.bulk_create([SAE(name="b", source="hub")]), {"none": 2}),
        (lambda: SAE.objects.update(ready_at=timezone.now()), {"here": 1}),
        (lambda: SAE.objects.all().delete(), {}),
        (lambda: SAE.objects.update(job=Job.objects.create(kind="download", queue="io")), {"coming": 1}),
    ],
)
def test_every_write_is_counted_at_once(change: Callable[[], Any], after: dict[str, int]) -> None:
    a_catalogue_row("one")
    assert states() == {"none": 1}
    change()
    assert states() == after


def test_the_state_of_a_job_is_counted_at_once() -> None:
    job = Job.objects.create(kind="download", queue="io")
    a_catalogue_row("one", job=job)
    assert states() == {"coming": 1} and total("state=failed") == 0
    job.state = State.FAILED
    job.save(update_fields=["state"])
    assert states() == {"failed": 1} and total("state=failed") == 1


def test_what_was_rolled_back_is_never_remembered_for_what_comes_after() -> None:
    class Back(Exception):
        pass

    with pytest.raises(Back), transaction.atomic():
        a_catalogue_row("gone", model_name="gone")
        assert total("model=gone") == 1
        raise Back
    assert total("model=gone") == 0
    a_catalogue_row("stays", model_name="stays")
    assert (total("model=gone"), total("model=stays")) == (0, 1)


def test_changes_are_folded_and_their_sum_kept() -> None:
    a_catalogue_row("one")
    before = list_version()
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO saes_listchange (weight) SELECT 1 FROM generate_series(1, %s)", [MOST_CHANGES])
        seen = list_version()
        cursor.execute("SELECT count(*), sum(weight) FROM saes_listchange")
        assert cursor.fetchone() == (1, before[0] + MOST_CHANGES)
    assert before != seen != list_version()
    assert total() == 1


@pytest.mark.parametrize("sort", ["", "name", "-name", "l0", "-l0", "features", "-size", "model"])
def test_pages_beyond_the_middle_are_those_of_the_whole_order(sort: str) -> None:
    SAE.objects.bulk_create(
        SAE(
            name=f"sae {n % 40}", source="hub", l0=n % 7 or None, d_sae=n % 5 or None, size_bytes=n % 3, model_name=f"m{n % 4}",
            ready_at=timezone.now() if n % 3 else None,
        )
        for n in range(4 * PAGE + 7)
    )  # fmt: skip
    seen = []
    for number in range(1, 6):
        page = registry(QueryDict(f"sort={sort}&page={number}"))["page"]
        assert (page.number, page.paginator.num_pages) == (number, 5)
        seen += [row.sae.pk for row in page]
    assert len(seen) == len(set(seen)) == 4 * PAGE + 7
    forward = registry(QueryDict(f"sort={sort}"))["page"].paginator.object_list
    assert seen == list(forward)
