"""Datasets of the Hub as corpora: which files are meant, and streaming them through the real client library."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saehub.jobs.models import State
from tests.mini_hub import COMMIT, MiniHub
from tests.training.chats import CHATS, chatting
from training import hub_dataset
from training.models import Capture, Corpus
from training.numerics.documents import CorpusError
from training.numerics.shards import open_capture

REPO = "lab/sentences"
TEXTS = [f"Number {i}. An exception is raised when the key is missing." for i in range(300)]


def parquet(texts: list[Any], field: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({field: texts, "id": list(range(len(texts)))}), sink, row_group_size=50)
    return sink.getvalue()


@pytest.mark.parametrize(
    "path, place",
    [
        ("default/train/0000.parquet", ("default", "train")),
        ("default/partial-train/0003.parquet", ("default", "train")),
        ("wikitext-2-v1/validation/0000.parquet", ("wikitext-2-v1", "validation")),
        ("data/train-00000-of-00002.parquet", ("default", "train")),
        ("en/test-00000-of-00001.parquet", ("en", "test")),
        ("train.parquet", ("default", "train")),
        ("a/b/train/0000.parquet", ("a/b", "train")),
    ],
)
def test_a_path_tells_its_subset_and_split(path: str, place: tuple[str, str]) -> None:
    assert hub_dataset.place_of(path) == place


PLACES = [("default", "train"), ("default", "test"), ("de", "validation")]


@pytest.mark.parametrize(
    "subset, split, chosen",
    [("", "", ("default", "train")), ("", "test", ("default", "test")), ("de", "", ("de", "validation"))],
)
def test_what_is_not_said_is_filled_in(subset: str, split: str, chosen: tuple[str, str]) -> None:
    assert hub_dataset.choose("x", PLACES, subset, split) == chosen


@pytest.mark.parametrize(
    "places, subset, split, says",
    [
        (PLACES, "fr", "", "x has no subset fr; name one of de, default."),
        (PLACES, "", "dev", "x has no split dev in default; name one of test, train."),
        ([("a", "train"), ("b", "train")], "", "", "x has 2 subsets; name one of a, b."),
        ([("a", "one"), ("a", "two")], "", "", "x has 2 splits in a; name one of one, two."),
    ],
)
def test_what_cannot_be_meant_is_listed(places: Any, subset: str, split: str, says: str) -> None:
    with pytest.raises(CorpusError) as error:
        hub_dataset.choose("x", places, subset, split)
    assert str(error.value) == says


@pytest.fixture
def dataset(hub: MiniHub) -> MiniHub:
    """In the layout of the Hub's own conversion: two files of one split, and another split."""
    hub.revisions.add(hub_dataset.CONVERTED)
    hub.repos[f"datasets/{REPO}"] = {
        "default/train/0000.parquet": parquet(TEXTS[:200]),
        "default/train/0001.parquet": parquet(TEXTS[200:]),
        "default/test/0000.parquet": parquet(["not this"]),
    }
    return hub


@pytest.fixture
def add(run_job: Any, user_of: Any) -> Any:
    def call(**fields: Any) -> Any:
        row = Corpus.objects.create(
            name="hub", source="hub", owner=user_of("researcher"), **{"location": REPO} | fields
        )
        job = run_job(row.start(row.owner))
        row.refresh_from_db()
        return row, job

    return call


@pytest.mark.django_db
def test_a_dataset_is_found_counted_and_pinned(dataset: MiniHub, add: Any) -> None:
    row, job = add()
    assert job.state == State.DONE, job.traceback
    assert (row.n_documents, row.n_characters) == (300, None), "counted from the footers; the text was not downloaded"
    assert (row.revision, row.subset, row.split) == (COMMIT, "default", "train")
    assert row.sample.startswith(TEXTS[0]) and len(row.sha256) == 64
    assert row.size_bytes == sum(
        len(data) for name, data in dataset.repos[f"datasets/{REPO}"].items() if "train" in name
    )


@pytest.mark.django_db
def test_the_stream_is_every_document_in_order(dataset: MiniHub) -> None:
    part = hub_dataset.find_part(REPO, "", "", "")
    assert list(hub_dataset.stream_documents(part, "")) == TEXTS


@pytest.mark.django_db
def test_a_capture_reads_the_stream(dataset: MiniHub, add: Any, model: Any, run_job: Any) -> None:
    corpus, _ = add()
    row = Capture.objects.create(
        name="c", model=model, corpus=corpus, hook_names=["blocks.0.hook_resid_post"], context_length=32, max_tokens=500
    )
    job = run_job(row.start(None))
    assert job.state == State.DONE, job.traceback
    shards = open_capture(row.folder)
    from saes.numerics.lm import load_lm

    text = load_lm(model.load_from).tokenizer.decode(shards.contexts()[0][1:])
    assert "<eos>".join(TEXTS).startswith(text) and len(text) > 20
    assert shards.manifest["dataset"]["revision"] == COMMIT


@pytest.mark.django_db
@pytest.mark.parametrize(
    "fields, says",
    [
        ({"split": "dev"}, f"{REPO} has no split dev in default; name one of test, train."),
        ({"text_field": "body"}, 'default/train/0000.parquet: no field "body" in its columns (there are: text, id)'),
        ({"text_field": "id"}, "default/train/0000.parquet row 1 holds a value of type int, not text or messages."),
        ({"location": "lab/none"}, "There is no repository lab/none on the Hub"),
        ({"location": "lab/texts"}, "lab/texts has no Parquet files"),
        ({"location": "lab/broken"}, "is not a readable Parquet file"),
        ({"location": "lab/blank"}, "The first documents of lab/blank are empty"),
    ],
)
def test_each_refusal_is_one_sentence(dataset: MiniHub, add: Any, fields: dict[str, str], says: str) -> None:
    dataset.repos |= {
        "datasets/lab/texts": {"README.md": b"# nothing"},
        "datasets/lab/broken": {"default/train/0000.parquet": b"PAR1 this is not a table PAR1"},
        "datasets/lab/blank": {"default/train/0000.parquet": parquet(["", " ", "\n"])},
    }
    row, job = add(**fields)
    assert job.state == State.FAILED and not row.ready
    assert says in job.error, job.traceback


@pytest.mark.django_db
def test_without_a_conversion_the_repository_itself_is_read(hub: MiniHub, add: Any) -> None:
    hub.repos[f"datasets/{REPO}"] = {"data/train-00000-of-00001.parquet": parquet(TEXTS[:5])}
    row, job = add()
    assert job.state == State.DONE, job.traceback
    assert row.n_documents == 5


@pytest.mark.django_db
def test_a_documents_null_is_empty_text(hub: MiniHub) -> None:
    hub.repos[f"datasets/{REPO}"] = {"train.parquet": parquet(["a", None, "b"])}
    assert list(hub_dataset.stream_documents(hub_dataset.find_part(REPO, "main", "", ""), "text")) == ["a", "b"]


@pytest.mark.django_db
def test_conversations_are_streamed_and_end_early(
    hub: MiniHub, add: Any, tiny_model_dir: Any, tmp_path: Any, run_job: Any
) -> None:
    from saes.models import LanguageModel
    from saes.numerics.lm import load_lm

    hub.repos[f"datasets/{REPO}"] = {
        "data/train-00000-of-00002.parquet": parquet(CHATS[:25], "messages"),
        "data/train-00001-of-00002.parquet": parquet(CHATS[25:], "messages"),
    }
    corpus, job = add()
    assert job.state == State.DONE, job.traceback
    assert corpus.chats and corpus.n_documents == len(CHATS) and corpus.revision == COMMIT
    assert [list(chat.messages) for chat in corpus.sampled.chats][:2] == CHATS[:2]
    model = LanguageModel.objects.create(name="m", source="folder", location=str(chatting(tiny_model_dir, tmp_path)))
    run_job(model.start(None))
    given = {
        "context_length": 32,
        "max_tokens": 10**6,
        "chat_template": True,
        "hook_names": ["blocks.0.hook_resid_post"],
    }
    row = Capture.objects.create(name="c", model=model, corpus=corpus, **given)
    job = run_job(row.start(None))
    assert job.state == State.DONE, job.traceback
    row.refresh_from_db()
    assert row.ended_early and row.manifest["dataset"]["revision"] == COMMIT
    tokenizer = load_lm(model.load_from).tokenizer
    own = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    read = tokenizer.decode(open_capture(row.folder).contexts()[0])
    assert own[0].startswith(read) and len(read) > 40


@pytest.mark.django_db
@pytest.mark.parametrize(
    "values, field, says",
    [
        (
            [[{"role": "user", "content": "a"}], [{"role": "user", "content": None}], [{"role": None, "content": "b"}]],
            "messages",
            'train.parquet row 3: message 1 has no "role" (it has: content)',
        ),
        ([{"body": "a", "n": 1}], "text", "train.parquet row 1 holds several fields (body, n), not text or messages"),
        ([["a", "b"]], "messages", 'train.parquet row 1: message 1 is a str, not an object with "role" and "content".'),
    ],
)
def test_each_row_that_is_no_document_is_named(hub: MiniHub, add: Any, values: Any, field: str, says: str) -> None:
    hub.repos[f"datasets/{REPO}"] = {"train.parquet": parquet(values, field)}
    row, job = add()
    assert job.state == State.FAILED and not row.ready and says in job.error, job.traceback


@pytest.mark.django_db
def test_files_of_two_kinds_are_refused_where_the_second_begins(hub: MiniHub) -> None:
    hub.repos[f"datasets/{REPO}"] = {
        "data/train-00000-of-00002.parquet": parquet(["a", "b"]),
        "data/train-00001-of-00002.parquet": parquet(CHATS[:2], "text"),
    }
    stream = hub_dataset.stream_documents(hub_dataset.find_part(REPO, "main", "", ""), "")
    assert [next(stream), next(stream)] == ["a", "b"]
    with pytest.raises(CorpusError, match=r"00001-of-00002.parquet row 1 holds a conversation and .* row 1 text; keep"):
        next(stream)
