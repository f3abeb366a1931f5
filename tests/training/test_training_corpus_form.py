"""The form of a corpus: what it takes, stores and refuses."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from saehub.jobs.models import Job
from tests.training.rows import errors
from training.models import Corpus

pytestmark = pytest.mark.django_db


def add_corpus(client: Any, **given: Any) -> Any:
    return client.post(reverse("training:corpus_create"), given)


def test_an_upload_is_stored_and_queued(client_of: Any, user_of: Any) -> None:
    file = SimpleUploadedFile("../../my docs.txt", "Grüße\n".encode())
    response = add_corpus(client_of("researcher"), source="upload", file=file)
    row = Corpus.objects.get()
    assert response.status_code == 302 and response.url == row.get_absolute_url()
    assert (row.name, row.location, row.owner) == ("my docs", "my_docs.txt", user_of("researcher"))
    assert row.file == row.folder / "my_docs.txt" and row.file.read_text() == "Grüße\n"
    assert (row.job.kind, row.job.params) == ("read_corpus", {"corpus": row.pk})


def test_pasted_text_is_stored_as_it_is(client_of: Any) -> None:
    add_corpus(client_of("researcher"), source="text", text="  First.\n\n\nSecond.  ", name="two documents")
    row = Corpus.objects.get()
    assert row.name == "two documents" and row.file.read_text().replace("\r\n", "\n") == "  First.\n\n\nSecond.  "


def test_a_path_under_the_import_folder_is_read_in_place(client_of: Any, settings: Any) -> None:
    file = settings.IMPORT_DIRS[0] / "book.txt"
    file.write_text("Once upon a time.")
    add_corpus(client_of("researcher"), source="path", path=str(file))
    row = Corpus.objects.get()
    assert (row.location, row.name) == (str(file), "book") and not row.folder.exists()


def test_a_dataset_is_known_by_its_id(client_of: Any) -> None:
    given = {
        "dataset": "https://huggingface.co/datasets/Salesforce/wikitext",
        "subset": "wikitext-2-v1",
        "split": "train",
    }
    add_corpus(client_of("researcher"), source="hub", **given)
    row = Corpus.objects.get()
    assert (row.location, row.name) == ("Salesforce/wikitext", "wikitext wikitext-2-v1 train")
    assert (row.subset, row.split) == ("wikitext-2-v1", "train")


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("photo.txt", b"\x89PNG\r\n\x1a\n\xff\xd8", "photo.txt is not UTF-8 text"),
        ("zeros.txt", b"text\0text", "zeros.txt is not UTF-8 text"),
        ("blank.txt", b"  \n\n ", "blank.txt is empty"),
        ("empty.txt", b"", "The file is empty"),
        ("table.parquet", b"not parquet at all", "table.parquet is not a Parquet file"),
        ("data.json", b'"text"', "data.json is not a JSON array"),
    ],
)
def test_a_file_that_is_not_text_is_refused(client_of: Any, name: str, content: bytes, says: str) -> None:
    response = add_corpus(client_of("researcher"), source="upload", file=SimpleUploadedFile(name, content), name="kept")
    assert says in errors(response)["file"]
    assert 'value="kept"' in response.content.decode()
    assert not Corpus.objects.exists() and not Job.objects.exists()


def test_a_character_cut_by_the_sniffing_is_no_error(client_of: Any) -> None:
    content = b"x" * 65535 + "ü".encode()
    assert (
        add_corpus(client_of("researcher"), source="upload", file=SimpleUploadedFile("a.txt", content)).status_code
        == 302
    )


def test_a_file_above_the_limit_is_refused(client_of: Any, settings: Any) -> None:
    settings.UPLOAD_LIMIT = 2**20
    file = SimpleUploadedFile("big.txt", b"x" * (2**20 + 1))
    assert "larger than 1 MB" in errors(add_corpus(client_of("researcher"), source="upload", file=file))["file"]


@pytest.mark.parametrize(
    "given, field, says",
    [
        ({"source": "upload"}, "file", "Choose a file to upload."),
        ({"source": "text", "text": " \n"}, "text", "Paste some text."),
        ({"source": "text", "text": "a\0b"}, "text", "Null characters are not allowed."),
        ({"source": "path", "path": ""}, "path", "Give the path of a file or folder"),
        ({"source": "path", "path": "/etc/passwd"}, "path", "Pages may read only under"),
        ({"source": "path", "path": "IMPORT"}, "path", "is empty; choose a file with text"),
        ({"source": "hub", "dataset": "a b"}, "dataset", "Give the dataset's id as on the Hub"),
        ({"source": "elsewhere"}, "source", "Select a valid choice"),
    ],
)
def test_a_corpus_that_cannot_be_is_an_error_at_its_field(
    client_of: Any, settings: Any, given: dict[str, str], field: str, says: str
) -> None:
    given = {key: value.replace("IMPORT", str(settings.IMPORT_DIRS[0])) for key, value in given.items()}
    found = errors(add_corpus(client_of("researcher"), **given))
    assert list(found) == [field] and says in found[field]
    assert not Corpus.objects.exists()


def test_a_folder_with_a_link_that_leads_elsewhere_is_refused(client_of: Any, settings: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("Not for everybody.")
    folder = Path(settings.IMPORT_DIRS[0]) / "texts"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("Some text.")
    (folder / "link.txt").symlink_to(folder / "mine.txt")
    try:
        assert add_corpus(client_of("researcher"), source="path", path=str(folder), name="good").status_code == 302
        (folder / "other.txt").symlink_to(tmp_path / "elsewhere.txt")
        found = errors(add_corpus(client_of("researcher"), source="path", path=str(folder), name="bad"))
        assert "leads out of the folders" in found["path"]
    finally:
        shutil.rmtree(folder)


def test_the_secret_key_is_out_of_reach(client_of: Any, settings: Any) -> None:
    (settings.DATA_DIR / "secret_key").write_text("secret")
    found = errors(add_corpus(client_of("researcher"), source="path", path=str(settings.DATA_DIR / "secret_key")))
    assert "Pages may read only under" in found["path"]


def test_nothing_is_left_when_storing_fails(client_of: Any, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.models.Corpus.start", full)
    with pytest.raises(OSError):
        add_corpus(client_of("researcher"), source="text", text="Some text.")
    assert not Corpus.objects.exists()
    assert not any((Corpus(pk=1).folder.parent).glob("*"))


def test_a_failed_corpus_stays_whole_when_storing_what_replaces_it_fails(client_of: Any, monkeypatch: Any) -> None:
    add_corpus(client_of("researcher"), source="text", text="Some text.", name="mine")
    old = Corpus.objects.get()
    Job.objects.filter(pk=old.job_id).update(state="failed")
    files = sorted(old.folder.rglob("*"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("training.models.Corpus.start", full)
        add_corpus(client_of("researcher"), source="text", text="Other text.", name="mine")
    assert Corpus.objects.get() == old and files and sorted(old.folder.parent.rglob("*")) == [old.folder, *files]


def test_two_splits_of_a_dataset_get_names_of_their_own(client_of: Any) -> None:
    client = client_of("researcher")
    for more in ({}, {"split": "test"}, {"subset": "de", "split": "test", "revision": "v1"}):
        add_corpus(client, source="hub", dataset="lab/news", **more)
    assert sorted(Corpus.objects.values_list("name", flat=True)) == ["news", "news de test v1", "news test"]
