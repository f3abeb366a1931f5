"""Gemma Scope: paths to variants, the hook point of each site, facets, the nearest L0, the live tree and the catalogue."""

from typing import Any

import pytest

from saehub.jobs.progress import JobError
from saes import repository
from saes.fetching import row_at
from saes.gemma_scope import counts, is_gemma_scope, narrowed, nearest, nearest_each, of_tree, parse, width_of
from saes.models import SAE
from tests.mini_hub import MiniHub

RES, SCOPE_2 = "google/gemma-scope-2b-pt-res", "google/gemma-scope-2-1b-pt"


@pytest.mark.parametrize(
    "repo, path, site, layer, hook, out, d_sae, model",
    [
        (
            RES,
            "layer_12/width_16k/average_l0_82",
            "resid_post",
            12,
            "blocks.12.hook_resid_post",
            "",
            16384,
            "gemma-2-2b",
        ),
        (RES, "embedding/width_4k/average_l0_21", "embed", None, "hook_embed", "", 4096, "gemma-2-2b"),
        (
            "google/gemma-scope-9b-it-res",
            "layer_9/width_1m/average_l0_9/params.npz",
            "resid_post",
            9,
            "blocks.9.hook_resid_post",
            "",
            1048576,
            "gemma-2-9b-it",
        ),
        (
            "google/gemma-scope-9b-pt-att",
            "layer_0/width_131k/average_l0_5",
            "hook_z",
            0,
            "blocks.0.attn.hook_z",
            "",
            131072,
            "gemma-2-9b",
        ),
        (
            "google/gemma-scope-27b-pt-mlp",
            "layer_3/width_524k/average_l0_5",
            "mlp_out",
            3,
            "blocks.3.hook_mlp_out",
            "",
            524288,
            "gemma-2-27b",
        ),
        (
            "google/gemma-scope-2b-pt-transcoders",
            "layer_3/width_16k/average_l0_54",
            "transcoder",
            3,
            "blocks.3.ln2.hook_normalized",
            "blocks.3.hook_mlp_out",
            16384,
            "gemma-2-2b",
        ),
        (
            SCOPE_2,
            "resid_post/layer_13_width_262k_l0_medium_seed_1",
            "resid_post",
            13,
            "blocks.13.hook_resid_post",
            "",
            262144,
            "google/gemma-3-1b-pt",
        ),
        (
            SCOPE_2,
            "resid_post_all/layer_13_width_16k_l0_small",
            "resid_post",
            13,
            "blocks.13.hook_resid_post",
            "",
            16384,
            "google/gemma-3-1b-pt",
        ),
        (
            SCOPE_2,
            "attn_out/layer_7_width_65k_l0_big/params.safetensors",
            "hook_z",
            7,
            "blocks.7.attn.hook_z",
            "",
            65536,
            "google/gemma-3-1b-pt",
        ),
        (
            "google/gemma-scope-2-270m-pt",
            "mlp_out/layer_5_width_1m_l0_big",
            "mlp_out",
            5,
            "blocks.5.hook_mlp_out",
            "",
            1048576,
            "google/gemma-3-270m",
        ),
        (
            "google/gemma-scope-2-270m-it",
            "transcoder_all/layer_5_width_16k_l0_big_affine",
            "transcoder",
            5,
            "blocks.5.mlp.hook_in",
            "blocks.5.hook_mlp_out",
            16384,
            "google/gemma-3-270m-it",
        ),
        (
            SCOPE_2,
            "clt/width_262k_l0_big/params_layer_3.safetensors",
            "clt",
            3,
            "blocks.3.mlp.hook_in",
            "blocks.3.hook_mlp_out",
            262144,
            "google/gemma-3-1b-pt",
        ),
        (
            SCOPE_2,
            "crosscoder/layer_5_9_12_15_width_1m_l0_big",
            "crosscoder",
            None,
            "",
            "",
            1048576,
            "google/gemma-3-1b-pt",
        ),
    ],
)
def test_a_path_says_where_its_sae_reads(
    repo: str, path: str, site: str, layer: int | None, hook: str, out: str, d_sae: int, model: str
) -> None:
    found = parse(repo, path)
    assert found is not None
    assert (found.site, found.layer, found.hook_name, found.hook_name_out) == (site, layer, hook, out)
    assert (found.d_sae, found.model_name) == (d_sae, model)


def test_the_rest_of_the_name_is_read_too() -> None:
    one = parse(SCOPE_2, "transcoder_all/layer_5_width_16k_l0_big_affine")
    assert (
        one and one.affine and one.every_layer and one.size == "big" and one.architecture == "jumprelu_skip_transcoder"
    )
    two = parse(SCOPE_2, "resid_post/layer_13_width_262k_l0_medium_seed_1")
    assert two and two.seed == 1 and not two.affine and two.l0 is None, "its L0 is a word"
    three = parse(RES, "layer_12/width_16k/average_l0_82/params.npz")
    assert three and three.l0 == 82.0 and three.path == "layer_12/width_16k/average_l0_82"
    four = parse(SCOPE_2, "crosscoder/layer_5_9_12_15_width_1m_l0_big")
    assert four and four.layers == (5, 9, 12, 15) and four.architecture == "causal_crosscoder"
    five = parse(SCOPE_2, "crosscoder/layer_5_9_12_15_width_65k_l0_medium_seed_1")
    assert five and (five.seed, five.size) == (1, "medium")


@pytest.mark.parametrize(
    "repo, path",
    [
        ("org/name", "layer_12/width_16k/average_l0_82"), (RES, "layer_12/width_16k"), (RES, "README.md"),
        ("google/gemma-scope-2b-pt-mlp", "embedding/width_4k/average_l0_21"), (RES, "layer_1/width_16k/average_l0_5/../6"),
        (SCOPE_2, "resid_post/layer_13_width_16k_l0_huge"), (SCOPE_2, "layer_12/width_16k/average_l0_82"),
    ],
)  # fmt: skip
def test_other_paths_are_none_of_it(repo: str, path: str) -> None:
    assert parse(repo, path) is None


def test_repositories_are_known_by_name() -> None:
    assert is_gemma_scope(RES) and is_gemma_scope(SCOPE_2)
    assert not is_gemma_scope("google/gemma-scope") and not is_gemma_scope("org/gemma-scope-2b-pt-res-mine")


def test_widths_are_powers_of_two_where_one_is_near() -> None:
    words = {
        "4k": 4096,
        "16k": 16384,
        "65k": 65536,
        "131k": 131072,
        "524k": 524288,
        "1m": 2**20,
        "80k": 81920,
        "128k": 131072,
    }
    assert {word: width_of(word) for word in words} == words


TREE = {
    "README.md": 100,
    **{f"layer_{layer}/width_16k/average_l0_{l0}/params.npz": 1000 for layer in (9, 10) for l0 in (22, 82, 117)},
    "layer_10/width_65k/average_l0_72/params.npz": 4000,
    "embedding/width_4k/average_l0_21/params.npz": 50,
    "layer_10/width_16k/average_l0_22/notes.txt": 5,
}


def test_a_tree_becomes_variants_in_the_order_of_numbers() -> None:
    found = of_tree(RES, TREE)
    assert len(found) == 8 and found[0].site == "embed" and found[0].size_bytes == 50
    assert [(one.layer, one.width, one.l0) for one in found[1:]] == [
        (9, "16k", 22), (9, "16k", 82), (9, "16k", 117), (10, "16k", 22), (10, "16k", 82), (10, "16k", 117), (10, "65k", 72),
    ]  # fmt: skip
    assert {(one.layer, one.width): one.l0 for one in found if one.canonical} == {
        (None, "4k"): 21, (9, "16k"): 117, (10, "16k"): 117, (10, "65k"): 72,
    }, "the authors' rule: L0 nearest to 100"  # fmt: skip


def test_examples_and_layers_of_a_clt() -> None:
    files = {f"clt/width_262k_l0_big/params_layer_{n}.safetensors": 10 for n in range(3)} | {
        "clt/width_262k_l0_big/config.json": 1,
        "crosscoder/layer_5_9_width_1m_l0_big/params_layer_0.safetensors": 7,
        "crosscoder/layer_5_9_width_1m_l0_big/params_layer_1.safetensors": 7,
        "resid_post/layer_5_width_16k_l0_small/params.safetensors": 3,
        "resid_post/layer_5_width_16k_l0_small/examples.safetensors": 900_000_000,
    }
    found = of_tree(SCOPE_2, files)
    assert [(one.site, one.layer, one.size_bytes) for one in found] == [
        ("clt", 0, 10), ("clt", 1, 10), ("clt", 2, 10), ("crosscoder", None, 14), ("resid_post", 5, 3),
    ]  # fmt: skip


def test_facets_and_the_nearest() -> None:
    found = of_tree(RES, TREE)
    assert counts(found, {})["layer"] == [("–", 1), ("9", 3), ("10", 4)] and counts(found, {})["size"] == []
    assert counts(found, {"width": "16k"})["layer"] == [("9", 3), ("10", 3)]
    assert counts(found, {"width": "16k"})["width"] == [("4k", 1), ("16k", 6), ("65k", 1)]
    ten = narrowed(found, {"layer": "10", "width": "16k"})
    assert [one.l0 for one in ten] == [22, 82, 117]
    best = nearest(ten, 100)
    assert best is not None and best.l0 == 117 and nearest(ten, 99).l0 == 82  # type: ignore[union-attr]
    assert [(one.layer, one.l0) for one in nearest_each(found, 80)] == [(None, 21), (9, 82), (10, 82), (10, 72)]
    unknown = of_tree(SCOPE_2, {"resid_post/layer_5_width_16k_l0_small/params.safetensors": 3})
    assert nearest(unknown, 100) is None, "an L0 that is not known is near to nothing"


def a_row(path: str, repo: str = RES, **fields: Any) -> SAE:
    return SAE.objects.create(name=path, source="hub", repo_id=repo, repo_path=path, **fields)


@pytest.mark.django_db
def test_the_live_tree_with_what_the_catalogue_knows(hub: MiniHub) -> None:
    repository._asked.clear()
    hub.repos[f"models/{SCOPE_2}"] = {
        "resid_post/layer_5_width_16k_l0_small/params.safetensors": b"123",
        "README.md": b"x",
    }
    a_row("resid_post/layer_5_width_16k_l0_small", SCOPE_2, published_l0=17.0)
    a_row("resid_post/layer_7_width_16k_l0_small", SCOPE_2)
    (one,), source = repository.variants(SCOPE_2, wait=20)
    assert source == "the Hub" and (one.l0, one.size_bytes, one.layer) == (17.0, 3, 5)


@pytest.mark.django_db
def test_without_the_hub_the_catalogue_stands_in(hub: MiniHub) -> None:
    repository._asked.clear()
    hub.close()
    a_row("layer_9/width_16k/average_l0_82", aliases=["x-canonical/layer_9/width_16k/canonical"], published_l0=82.0)
    a_row("layer_9/width_16k/average_l0_117")
    found, source = repository.variants(RES, wait=60)
    assert source == "the catalogue" and [(one.l0, one.canonical) for one in found] == [(82, True), (117, False)]
    assert hub.asked == [] and repository.variants(RES, live=False)[1] == "the catalogue"
    with pytest.raises(JobError):
        repository.variants("google/gemma-scope-9b-pt-res", wait=60)


@pytest.mark.django_db
def test_a_hub_that_takes_long_is_not_waited_for(hub: MiniHub) -> None:
    repository._asked.clear()
    hub.repos[f"models/{RES}"] = {"layer_9/width_16k/average_l0_82/params.npz": b"1"}
    with pytest.raises(repository.StillAsking):
        repository.listing_of(RES, wait=0)
    assert len(repository.listing_of(RES, wait=30).files) == 1, "the answer came in the meantime"
    asked = len(hub.asked)
    assert repository.listing_of(RES, wait=0).repo_id == RES and len(hub.asked) == asked


@pytest.mark.django_db
def test_a_file_of_gemma_scope_is_the_row_of_its_folder(user_of: Any) -> None:
    known = a_row("layer_9/width_16k/average_l0_82", published_l0=82.0)
    assert row_at(user_of("researcher"), RES, "layer_9/width_16k/average_l0_82/params.npz") == known
    several = row_at(user_of("researcher"), SCOPE_2, "crosscoder/layer_7_13_17_22_width_65k_l0_medium")
    assert (several.format, several.site, several.architecture) == ("gemma_scope_2", "crosscoder", "causal_crosscoder")
    assert (several.model_name, several.d_sae, several.layer) == ("google/gemma-3-1b-pt", 65536, None)
    one = row_at(user_of("researcher"), SCOPE_2, "clt/width_262k_l0_big/params_layer_3.safetensors")
    assert (one.site, one.layer, one.d_sae) == ("clt", 3, None), "its name counts the features of all layers"
