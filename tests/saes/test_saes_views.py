"""Pages of language models and of the registry: what they show, what a form refuses, who may what."""

import shutil
from typing import Any

import pytest
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel

pytestmark = pytest.mark.django_db
# session, user, two of permissions, one a facet, count, rows, running jobs
LIST_QUERIES = {"model_list": 9}


def a_model(name: str = "tiny", **fields: Any) -> LanguageModel:
    points = [
        {"name": f"blocks.{i}.hook_resid_{place}", "module": f"model.layers.{i}", "side": side, "d": 32, "layer": i}
        for i in range(2)
        for place, side in (("pre", "in"), ("post", "out"))
    ]
    given = {
        "source": "folder", "location": "/models/tiny", "architecture": "LlamaForCausalLM", "n_layers": 2, "d_model": 32,
        "vocabulary": 400, "context_length": 256, "n_parameters": 12345, "size_bytes": 54321, "hook_points": points,
        "ready_at": timezone.now(),
    }  # fmt: skip
    return LanguageModel.objects.create(name=name, **given | fields)


def an_sae(name: str = "one", **fields: Any) -> SAE:
    given = {
        "source": "trained", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "architecture": "topk",
        "d_in": 32, "d_sae": 256, "k": 8, "path": f"sae/tiny/{name}", "size_bytes": 1000, "ready_at": timezone.now(),
    }  # fmt: skip
    return SAE.objects.create(name=name, **given | fields)


METRICS = {
    "explained_variance": {
        "value": 0.829, "definition": "explained_variance", "formula": "1 - E|x - x_hat|^2 / V", "n": 3172, "data": "docs",
    },
    "ce_recovered": {"value": None, "definition": "ce_recovered", "formula": "a ratio", "n": 0, "data": "docs"},
    "density_histogram": {
        "value": {"edges": [-4.0, -3.0, -2.0, -1.0, 0.0], "counts": [3, 50, 9, 1], "dead": 13},
        "definition": "density_histogram", "formula": "counts", "n": 3172, "data": "docs",
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("page", LIST_QUERIES)
def test_a_list_asks_as_often_for_three_rows_as_for_one(
    page: str, client_of: Any, django_assert_num_queries: Any, user_of: Any
) -> None:
    client, owner = client_of("viewer"), user_of("curator")

    def make(name: str) -> None:
        a_model(name, owner=owner, job=Job.objects.create(kind="add_model", queue="io", title=name))

    make("first")
    client.get(reverse(f"saes:{page}"))
    with django_assert_num_queries(LIST_QUERIES[page]):
        client.get(reverse(f"saes:{page}"))
    make("second"), make("third")
    with django_assert_num_queries(LIST_QUERIES[page]):
        html = client.get(reverse(f"saes:{page}")).content.decode()
    assert all(name in html for name in ("first", "second", "third"))


def test_empty_lists_name_the_next_action(client_of: Any) -> None:
    for page, action in (("model_list", "saes:model_create"),):
        assert reverse(action) in client_of("researcher").get(reverse(f"saes:{page}")).content.decode()
        viewer = client_of("viewer").get(reverse(f"saes:{page}")).content.decode()
        assert reverse(action) not in viewer and "Ask a researcher" in viewer


# ---------------------------------------------------------------------------------------------------- adding a model


def test_a_folder_is_queued(client_of: Any, user_of: Any, tiny_model_dir: Any, settings: Any) -> None:
    folder = shutil.copytree(tiny_model_dir, settings.IMPORT_DIRS[0] / "tiny")
    response = client_of("researcher").post(reverse("saes:model_create"), {"source": "folder", "location": str(folder)})
    row = LanguageModel.objects.get()
    assert response.status_code == 302 and response.url == row.get_absolute_url()
    assert (row.name, row.location, row.owner) == ("tiny", str(folder), user_of("researcher"))
    assert (row.job.kind, row.job.params, row.job.state) == ("add_model", {"model": row.pk}, State.QUEUED)
    page = client_of("viewer").get(response.url).content.decode()
    assert f'id="job-{row.job.pk}"' in page and "every 2s" in page


@pytest.mark.parametrize(
    "source, location, says",
    [
        ("hub", "not an id!", "not an id! is not a repository id"),
        ("hub", "a/b/c", "a/b/c is not a repository id"),
        ("hub", "", "This field is required."),
        ("folder", "/etc", "Pages may read only under"),
        ("folder", "IMPORT/../..", "Pages may read only under"),
        ("folder", "IMPORT/link", "Pages may read only under"),
        ("folder", "models/tiny", "Give the whole path on the server"),
        ("folder", "~nobody-of-this-name/tiny", "Give the whole path on the server"),
        ("folder", "IMPORT/missing", "There is nothing at"),
        ("folder", "IMPORT/" + 256 * "a", "There is nothing at"),
        ("folder", "IMPORT/circle", "lead in a circle"),
        ("folder", "IMPORT/empty", "holds no config.json"),
        ("folder", "IMPORT/noweights", "holds no .safetensors weights"),
        ("folder", "IMPORT/text.gguf", "is a file; give the folder it is in"),
        ("gguf", "IMPORT/text.gguf", "text.gguf is not a GGUF file"),
        ("gguf", "IMPORT/empty", "is a folder; give the .gguf file itself"),
    ],
)
def test_a_location_that_cannot_be_used_is_an_error_at_the_field(
    source: str, location: str, says: str, client_of: Any, settings: Any
) -> None:
    imports = settings.IMPORT_DIRS[0]
    (imports / "empty").mkdir(), (imports / "noweights").mkdir()
    (imports / "noweights" / "config.json").write_text("{}")
    (imports / "text.gguf").write_text("this is text")
    (imports / "link").symlink_to("/etc")
    (imports / "circle").symlink_to("circle")
    given = {"source": source, "location": location.replace("IMPORT", str(imports)), "name": "kept"}
    response = client_of("researcher").post(reverse("saes:model_create"), given)
    assert response.status_code == 422 and says in response.context["form"].errors["location"][0]
    html = response.content.decode()
    assert 'value="kept"' in html and 'aria-invalid="true"' in html, "what was typed is kept"
    assert not LanguageModel.objects.exists() and not Job.objects.exists()


def test_a_revision_belongs_to_the_hub(client_of: Any, tiny_model_dir: Any, settings: Any) -> None:
    folder = shutil.copytree(tiny_model_dir, settings.IMPORT_DIRS[0] / "tiny")
    given = {"source": "folder", "location": str(folder), "revision": "main"}
    response = client_of("researcher").post(reverse("saes:model_create"), given)
    assert response.status_code == 422 and "details" in response.content.decode()
    assert "Only a repository on the Hub has revisions" in response.context["form"].errors["revision"][0]


def test_a_hub_address_is_taken_for_its_id(client_of: Any) -> None:
    given = {"source": "hub", "location": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M/", "revision": "main"}
    client_of("researcher").post(reverse("saes:model_create"), given)
    row = LanguageModel.objects.get()
    assert (row.location, row.revision, row.name) == ("HuggingFaceTB/SmolLM2-135M", "main", "SmolLM2-135M")


def test_a_name_is_taken_over_only_from_ones_own_failure(
    client_of: Any, user_of: Any, django_capture_on_commit_callbacks: Any
) -> None:
    given = {"source": "hub", "location": "org/right", "name": "mine"}
    failed = Job.objects.create(kind="add_model", queue="io", title="x", state=State.FAILED)
    old = a_model("mine", ready_at=None, owner=user_of("researcher"), job=failed)
    old.folder.mkdir(parents=True)
    response = client_of("curator").post(reverse("saes:model_create"), given)
    assert response.status_code == 422 and "already one named mine" in response.context["form"].errors["name"][0]
    with django_capture_on_commit_callbacks(execute=True):
        assert client_of("researcher").post(reverse("saes:model_create"), given).status_code == 302
    row = LanguageModel.objects.get()
    assert row.location == "org/right" and not old.folder.exists()
    LanguageModel.objects.update(ready_at=timezone.now())
    assert client_of("researcher").post(reverse("saes:model_create"), given).status_code == 422


def test_a_viewer_may_look_but_not_add(client_of: Any) -> None:
    model = a_model()
    client = client_of("viewer")
    assert client.get(reverse("saes:model_create")).status_code == 403
    page = client.get(model.get_absolute_url()).content.decode()
    assert "blocks.1.hook_resid_post" in page and "New capture" not in page
    assert "New capture" in client_of("researcher").get(model.get_absolute_url()).content.decode()


def test_a_model_that_stands_where_its_row_would_keep_files_is_not_removed(
    client_of: Any, tiny_model_dir: Any, settings: Any
) -> None:
    last = a_model("last")
    number = last.pk
    last.delete()
    theirs = shutil.copytree(tiny_model_dir, settings.DATA_DIR / "models" / str(number + 1))
    litter = settings.DATA_DIR / "models" / str(number + 2)
    litter.mkdir()
    client = client_of("researcher")
    client.post(reverse("saes:model_create"), {"source": "folder", "location": str(theirs), "name": "theirs"})
    assert LanguageModel.objects.get().folder == theirs and (theirs / "config.json").exists()
    client.post(reverse("saes:model_create"), {"source": "hub", "location": "org/name"})
    assert LanguageModel.objects.get(name="name").folder == litter and not litter.exists()


# ---------------------------------------------------------------------------------------------------- details


def test_a_model_page_shows_its_facts_and_stops_polling(client_of: Any) -> None:
    page = client_of("viewer").get(a_model().get_absolute_url()).content.decode()
    for fact in ("LlamaForCausalLM", "12.3k", "54.3 kB", "blocks.0.hook_resid_pre", "model.layers.1"):
        assert fact in page, fact
    assert "every 2s" not in page


def test_a_model_that_failed_says_so_and_offers_retry(client_of: Any, user_of: Any) -> None:
    job = Job.objects.create(
        kind="add_model", queue="io", title="x", state=State.FAILED, error="It is gated.", owner=user_of("researcher")
    )
    model = a_model(ready_at=None, job=job)
    page = client_of("researcher").get(model.get_absolute_url()).content.decode()
    assert "It is gated." in page and "Retry" in page and "every 2s" not in page


def test_a_live_fragment_brings_the_title_along(client_of: Any) -> None:
    html = client_of("viewer").get(a_model().get_absolute_url(), headers={"HX-Request": "true"}).content.decode()
    assert html.strip().startswith('<div id="live"') and 'id="title" hx-swap-oob="true"' in html


def test_hostile_names_are_escaped(client_of: Any) -> None:
    sae = an_sae("<script>alert(1)</script>", notes="<b>bold</b>", hook_name="<i>hook</i>")
    for url in (sae.get_absolute_url(), reverse("saes:sae_list")):
        page = client_of("viewer").get(url).content.decode()
        assert "<script>alert" not in page and "<i>hook" not in page and "<b>bold" not in page


def test_the_admin_shows_and_guards_them(client_of: Any) -> None:
    model, sae = a_model(), an_sae(metrics=METRICS)
    client = client_of("curator")
    for row, name in ((model, "languagemodel"), (sae, "sae")):
        assert client.get(reverse(f"admin:saes_{name}_changelist") + "?q=tiny").status_code == 200
        page = client.get(reverse(f"admin:saes_{name}_change", args=[row.pk])).content.decode()
        assert row.get_absolute_url() in page and 'name="name"' in page and 'name="location"' not in page
        assert client_of("researcher").get(reverse(f"admin:saes_{name}_changelist")).status_code == 403


def test_deleting_in_the_admin_takes_the_files_along(client_of: Any) -> None:
    model, sae = a_model(source="gguf"), an_sae()
    for folder in (model.folder, sae.files):
        folder.mkdir(parents=True)
    client = client_of("curator")
    for row, name in ((model, "languagemodel"), (sae, "sae")):
        given = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
        assert client.post(reverse(f"admin:saes_{name}_changelist"), given).status_code == 302
    assert not model.folder.exists() and not sae.files.exists()
    assert not LanguageModel.objects.exists() and not SAE.objects.exists()
