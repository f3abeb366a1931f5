"""A harvest as files others read, held against files of the packages that invented them and against the codes themselves."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from django.urls import reverse

from concepts.exports import FORMATS, text_of
from concepts.models import FeatureView, Label
from saes.numerics.formats import load_sae
from tests.api_calls import problem
from tests.steering_rows import DEAD, Rows
from tests.tiny_models import RESID
from training.numerics.shards import open_capture

FILES = Path(__file__).parent / "files"  # mi_crow_top_texts.*: written by mi_crow 1.0.0.post10 itself
# keys of sae-dashboard 0.8's NeuronpediaDashboardBatch, Feature and Activation, in their order
BATCH_KEYS = ["model_id", "layer", "sae_set", "sae_id_suffix", "features"]
FEATURE_KEYS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist",
    "activations", "vector",
}  # fmt: skip
ACTIVATION_KEYS = ["bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"]


def download(client: Any, rows: Rows, query: str = "") -> bytes:
    response = client.get(reverse("concepts:feature_export", args=[rows.sae.pk]) + query)
    assert response.status_code == 200 and response["Content-Disposition"].startswith("attachment")
    return b"".join(response.streaming_content)


def dense(rows: Rows) -> np.ndarray:
    """Codes (contexts, positions, features) of the capture by the SAE's own encode, 0 where nothing is stored."""
    capture, sae = open_capture(rows.capture.folder), load_sae(rows.sae.files)
    codes = np.zeros((*capture.contexts().shape, 96), np.float32)
    with torch.inference_mode():
        for x, context, position in capture.rows(RESID):
            codes[context, position] = sae.encode(x).numpy()
    return codes


def test_mi_crow_json_has_its_shape_and_the_values_of_the_codes(
    rows: Rows, view: FeatureView, client_of: Any, tiny_model_dir: Path
) -> None:
    from saes.numerics.lm import load_lm

    theirs = json.loads((FILES / "mi_crow_top_texts.json").read_text())
    found = json.loads(download(client_of("viewer"), rows, "?format=mi_crow"))
    assert list(found) == [str(i) for i in range(96)] and found[str(DEAD)] == []
    assert list(theirs) == [str(i) for i in range(6)] and theirs["5"] == []
    (keys,) = {tuple(one) for texts in theirs.values() for one in texts}
    assert {tuple(one) for texts in found.values() for one in texts} == {keys}
    codes, contexts = dense(rows), open_capture(rows.capture.folder).contexts()
    tokenizer = load_lm(tiny_model_dir).tokenizer
    for i in range(96):
        peaks = np.sort(codes[:, :, i].max(1))[::-1][:12]
        np.testing.assert_allclose([one["score"] for one in found[str(i)]], peaks[peaks > 0], rtol=1e-4)
        for one in found[str(i)]:
            same = np.flatnonzero(np.isclose(codes[:, one["token_idx"], i], one["score"], rtol=1e-4))
            assert one["text"] in [tokenizer.decode(ids[ids > 1]) for ids in contexts[same]], "without control tokens"


def test_mi_crow_csv_has_its_header_and_the_rows_of_the_json(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    theirs = list(csv.reader(io.StringIO((FILES / "mi_crow_top_texts.csv").read_text(), newline="")))
    found = list(csv.reader(io.StringIO(download(client, rows, "?format=mi_crow_csv").decode(), newline="")))
    assert found[0] == theirs[0] == ["neuron_idx", "text", "score", "token_str", "token_idx"]
    texts = json.loads(download(client, rows, "?format=mi_crow"))
    assert len(found) - 1 == sum(len(one) for one in texts.values())
    first = texts[found[1][0]][0]
    assert found[1][1].lstrip("'") == first["text"] and float(found[1][2]) == first["score"]


def test_the_servers_file_has_its_names_and_statistics(rows: Rows, view: FeatureView, client_of: Any) -> None:
    found = json.loads(download(client_of("viewer"), rows))
    named = {"sae_path", "sae_id", "layer", "prompts", "outputs", "top_neurons", "neuron_texts", "concept_config_path"}
    assert named <= set(found) and found["layer"] == RESID and found["n_tokens"] == view.n_tokens
    codes = dense(rows)
    for i in (0, 50, DEAD):
        stats = found["neuron_stats"][str(i)]
        fires = codes[:, :, i] > 0
        assert stats["n_fires"] == fires.sum() and stats["density"] == fires.sum() / view.n_tokens
        assert stats["maximum"] == pytest.approx(codes[:, :, i].max(), rel=1e-4)
        assert (stats["mean"] is None) == (not fires.any())
        assert [set(one) for one in found["neuron_texts"][str(i)]] == [
            {"text", "score", "token_idx", "token_str"} for _ in found["neuron_texts"][str(i)]
        ]


def test_neuronpedia_features_have_its_keys_and_the_numbers_of_the_page(
    rows: Rows, view: FeatureView, client_of: Any
) -> None:
    alive = int(view.opened().sorted("n_fires")[0])
    rows.sae.neuronpedia_id = "tiny/1-res-x"
    rows.sae.save()
    found = json.loads(download(client_of("viewer"), rows, f"?format=neuronpedia&feature={alive}&feature={DEAD}"))
    assert list(found) == BATCH_KEYS and (found["model_id"], found["layer"], found["sae_set"]) == ("tiny", 1, "res-x")
    found["features"].sort(key=lambda one: one["feature_index"] == DEAD)
    assert [one["feature_index"] for one in found["features"]] == [alive, DEAD]
    record = view.opened().feature(alive)
    one, dead = found["features"]
    assert set(one) == set(dead) == FEATURE_KEYS
    assert one["frac_nonzero"] == record.density and one["pos_str"] == [logit.text for logit in record.raised]
    assert sum(one["freq_hist_data_bar_heights"]) == record.n_fires and len(one["freq_hist_data_bar_values"]) == 50
    assert len(one["logits_hist_data_bar_values"]) == len(one["logits_hist_data_bar_heights"]) == 50
    assert one["logits_hist_data_bar_values"][0] < one["neg_values"][9] < one["pos_values"][9]
    assert len(one["activations"]) == len(record.top) + sum(len(part.examples) for part in record.intervals)
    for activation in one["activations"]:
        assert list(activation) == ACTIVATION_KEYS and len(activation["tokens"]) == len(activation["values"]) == 32
        assert activation["values"][activation["qualifying_token_index"]] == max(activation["values"])
    assert dead["activations"] == [] and dead["frac_nonzero"] == 0 and len(dead["pos_str"]) == 10


def test_selected_and_filtered_features(rows: Rows, view: FeatureView, client_of: Any) -> None:
    client = client_of("viewer")
    assert list(json.loads(download(client, rows, "?format=mi_crow&feature=9&feature=3"))) == ["3", "9"]
    dead = json.loads(download(client, rows, "?format=mi_crow&state=dead"))
    assert str(DEAD) in dead and len(dead) == view.dead
    url = reverse("concepts:feature_export", args=[rows.sae.pk])
    for query in ("?format=xls", "?feature=96", "?feature=-1", "?feature=x", "?view=99999"):
        assert client.get(url + query).status_code == 404
    assert client_of("stranger").get(url).status_code == 403


def test_without_a_view_there_is_nothing_to_download(rows: Rows, client_of: Any) -> None:
    response = client_of("viewer").get(reverse("concepts:feature_export", args=[rows.sae.pk]))
    assert response.status_code == 404 and "no harvested features yet" in response.content.decode()


def test_cells_that_a_spreadsheet_would_compute_are_neutralised(rows: Rows, view: FeatureView, client_of: Any) -> None:
    """A corpus may hold a formula: the token texts of the view are replaced by one."""
    columns = view.opened()
    start = np.load(columns.path / "vocabulary_start.npy")
    raw = np.load(columns.path / "vocabulary_bytes.npy")
    raw[start[2:-1]] = ord("=")  # every token now begins with an equals sign
    np.save(columns.path / "vocabulary_bytes.npy", raw)
    (columns.path / "view.json").touch()
    found = list(
        csv.reader(
            io.StringIO(
                download(client_of("viewer"), rows, "?format=mi_crow_csv").decode("utf-8", "replace"), newline=""
            )
        )
    )
    assert len(found) > 100 and all(row[1].startswith("'=") and row[3].startswith("'=") for row in found[1:])


def test_characters_over_several_tokens_are_whole_again(view: FeatureView) -> None:
    example = next(one for i in range(96) for one in view.opened().top(i))
    changed = type(example)(
        **{
            **vars(example),
            "tokens": ["a", "<0xC3>", "<0xA9>", "<0xE2>", "<0x41>"] + [""] * 27,
            "special": np.zeros(32, bool),
        }
    )
    assert text_of(changed) == "aé<0xE2><0x41>"


def test_a_page_that_needs_nothing_else(
    rows: Rows, view: FeatureView, client_of: Any, django_assert_max_num_queries: Any
) -> None:
    columns = view.opened()
    alive, other = [int(i) for i in columns.sorted("n_fires") if columns.companions(int(i))][:2]
    Label.objects.name_feature(rows.sae, alive, "</style><script>alert(1)</script>", rows.owner)
    client, query = client_of("viewer"), f"?format=html&feature={alive}&feature={DEAD}"
    one = download(client, rows, f"?format=html&feature={other}").decode()
    with django_assert_max_num_queries(9):
        page = download(client, rows, query).decode()
    assert page.count("<!doctype html>") == page.count("</html>") == 1
    assert "<table" in page and f'<a href="#f{alive}">' in page and f'<a href="#f{other}">' not in one
    assert "alert(1)" in page and "<script>alert" not in page
    addresses = re.findall(r'\b(?:href|src|action|hx-\w+|ws-connect)\s*=\s*"([^"]*)"', page)
    assert addresses and all(address.startswith("#") for address in addresses), "nothing in it asks a server"
    assert (
        "url(" not in page
        and "@import" not in page
        and " from " not in page.partition("</script>")[0].split("<script")[1]
    )
    record, dead = columns.feature(alive), page.partition(f'<section id="f{DEAD}"')[2].partition("<section id=")[0]
    best = record.top[0]
    assert f'title="context {best.context}, document {best.document}"' in page
    assert f"{record.n_fires:,} tokens in {record.n_contexts:,} contexts" in page and 'role="img"' in page
    assert f"correlation over {view.n_tokens:,} tokens" in page and "correlation over" not in dead
    assert "dead in" in dead and "It never fired." in dead and 'class="ex' not in dead


def test_a_page_holds_so_many_features(
    rows: Rows, view: FeatureView, client_of: Any, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "html", replace(FORMATS["html"], most=3))
    client, url = client_of("viewer"), reverse("concepts:feature_export", args=[rows.sae.pk])
    said = "holds at most 3 features, and these are 96; choose fewer."
    refused = client.get(url + "?format=html")
    assert refused.status_code == 404 and said in refused.content.decode()
    assert said in problem(api("viewer", "get", f"/saes/{rows.sae.pk}/features/export?format=html"), 422)["detail"]
    answer = api("viewer", "get", f"/saes/{rows.sae.pk}/features/export?format=html&feature=3")
    assert answer["Content-Type"] == "text/html; charset=utf-8" and answer["Content-Disposition"].startswith(
        "attachment"
    )
    listed = client.get(reverse("concepts:feature_list", args=[rows.sae.pk])).content.decode()
    links = listed[listed.index('id="exports"') :]
    assert "format=html" not in links and "format=mi_crow" in links
