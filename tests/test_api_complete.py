"""Everything that the pages do can be done by scripts: for each page that changes something, the operation that does it."""

from __future__ import annotations

from typing import Any

import pytest
from django.urls import get_resolver

pytestmark = pytest.mark.django_db
LOOKS = {  # pages that only show; their figures are those of GET operations
    "saes:model_list", "saes:model_detail", "saes:sae_list", "saes:sae_state", "saes:sae_detail", "training:corpus_list",
    "training:corpus_detail", "training:capture_list", "training:capture_detail", "training:run_list", "training:run_detail",
    "training:sweep_list", "training:sweep_detail", "concepts:feature_search", "concepts:feature_detail",
    "concepts:label_files", "concepts:dictionary_list", "concepts:dictionary_detail", "concepts:concept_detail",
    "concepts:explanation_detail", "concepts:config_list", "concepts:config_detail", "inference:inference_list", "inference:inference_detail",
    "inference:promptbatch_list", "inference:promptbatch_detail", "inference:generation_list", "inference:edit_suggest",
    "inference:generation_detail", "inference:sweep_detail", "jobs:job_list", "jobs:job_detail", "jobs:job_running",
    "jobs:worker_list",
}  # fmt: skip
OWN = {"jobs:job_probe"}  # tries the workers
DOES = {
    "jobs:job_log": "get /jobs/{pk}/lines",
    "jobs:job_cancel": "post /jobs/{pk}/cancel", "jobs:job_retry": "post /jobs/{pk}/retry",
    "saes:model_create": "post /models", "saes:sae_download": "post /saes/download-hf",
    "saes:sae_basket": "post /saes/download-hf", "saes:catalogue_sync": "post /catalogue/sync",
    "saes:sae_import": "post /saes/import", "saes:sae_start": "post /saes/{pk}/verify",
    "saes:sae_tag": "post /saes/tags", "saes:sae_star": "put /saes/{pk}/star",
    "saes:sae_facts": "post /saes/{pk}/facts", "saes:sae_curate": "patch /saes/{pk}", "saes:sae_delete": "delete /saes/{pk}",
    "saes:sae_export": "post /saes/{pk}/export", "saes:sae_upload": "post /saes/{pk}/upload",
    "saes:sae_recommended": "get /saes/recommended", "saes:hub_cache": "post /cache/prune",
    "saes:sae_access": "get /saes/{pk}/access", "saes:sae_archive": "get /saes/{pk}/export/{format}",
    "training:corpus_create": "post /corpora", "training:capture_create": "post /activations/save",
    "training:capture_yaml": "get /activations/{pk}/document",
    "training:capture_action": "post /activations/{pk}/verify", "training:run_create": "post /train",
    "training:run_stop": "post /train/{pk}/stop", "training:run_pause": "post /train/{pk}/pause",
    "training:run_resume": "post /train/{pk}/resume", "training:run_points": "get /train/{pk}/points",
    "training:run_yaml": "get /train/{pk}/document", "training:sweep_yaml": "get /train/sweeps/{pk}/document",
    "training:sweep_stop": "post /train/sweeps/{pk}/stop", "training:sweep_pause": "post /train/sweeps/{pk}/pause",
    "training:sweep_resume": "post /train/sweeps/{pk}/resume", "training:evaluation_create": "post /saes/{pk}/evaluate",
    "training:evaluation_saebench": "get /evaluations/{pk}/saebench", "training:sae_compare": "get /saes/compare",
    "concepts:feature_list": "post /saes/{pk}/harvest", "concepts:feature_export": "get /saes/{pk}/features/export",
    "concepts:explanation_create": "post /saes/{pk}/explanations",
    "concepts:label_create": "post /saes/{pk}/features/{index}/labels", "concepts:label_import": "post /concepts/load",
    "concepts:label_export": "get /saes/{pk}/labels/export", "concepts:label_accept": "post /labels/{pk}/accept",
    "concepts:label_delete": "delete /labels/{pk}", "concepts:label_describe": "patch /labels/{pk}",
    "concepts:label_undo": "post /labels/changes/{pk}/undo", "concepts:member_add": "post /saes/{pk}/features/{index}/concepts",
    "concepts:dictionary_create": "post /concepts/dictionaries",
    "concepts:dictionary_edit": "patch /concepts/dictionaries/{pk}",
    "concepts:dictionary_delete": "delete /concepts/dictionaries/{pk}",
    "concepts:dictionary_history": "post /concepts/dictionaries/{pk}/revert", "concepts:dictionary_import": "post /concepts/load",
    "concepts:dictionary_export": "get /concepts/dictionaries/{pk}/export",
    "concepts:concept_create": "post /concepts/dictionaries/{pk}/concepts", "concepts:concept_edit": "patch /concepts/concepts/{pk}",
    "concepts:import_detail": "post /concepts/load/{pk}/apply", "concepts:config_create": "post /concepts/manipulate",
    "concepts:config_read": "post /concepts/manipulate", "inference:inference_create": "post /infer",
    "inference:promptbatch_create": "post /infer/batches", "inference:promptbatch_file": "get /infer/batches/{pk}/file",
    "inference:text_contrast": "get /infer/{pk}/contrast",
    "inference:text_search": "get /infer/{pk}/features", "inference:feature_text": "post /infer",
    "inference:generation_create": "post /generate", "inference:sweep_create": "post /generate/{pk}/sweep",
}  # fmt: skip


def pages() -> set[str]:
    """The URL names of the apps' own pages. Those of accounts make secrets, and stay with the browser."""
    spaces = get_resolver().namespace_dict
    return {
        f"{space}:{name}"
        for space in ("jobs", "saes", "training", "concepts", "inference")
        for name in spaces[space][1].reverse_dict
        if isinstance(name, str)
    }


def test_what_pages_do_scripts_can_do(client_of: Any) -> None:
    schema = client_of("viewer").get("/api/v1/openapi.json").json()
    operations = {
        f"{method} {path.removeprefix('/api/v1')}" for path, methods in schema["paths"].items() for method in methods
    }
    assert {page: wanted for page, wanted in DOES.items() if wanted not in operations} == {}
    known = {*DOES, *LOOKS, *OWN}
    assert pages() - known == set(), "say here which operation does what a new page does"
    assert known - pages() == set()
