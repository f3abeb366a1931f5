"""The table of job kinds: what can be queued, what does it, where, and who may ask for it.

A kind's function lives in `<app>/jobs.py` and is imported late, in the process that runs it, so that the web process never
reaches torch. It is called as `function(progress, **ids)` and returns a dict of JSON scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A line of the table of jobs: what runs it, where, for whom, and what it works on."""

    name: str  # one verb, also the function's name
    module: str  # imported late
    title: str  # what a person calls it
    queue: str  # io | gpu | live
    permission: str  # who may start, cancel and retry it
    page: str  # URL name of the page of what it works on ...
    subject: str  # ... whose primary key is this parameter
    in_child: bool = True  # a process of its own: cancel and out-of-memory end only it
    attempts: int = 3  # how often a job whose worker died is taken up again

    def function(self) -> Callable[..., dict[str, Any]]:
        return getattr(import_module(self.module), self.name)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("probe", "saehub.jobs.probe", "Check the workers", "io", "jobs.add_job", "jobs:job_detail", "job"),
        Kind("add_model", "saes.jobs", "Add a language model", "io", "saes.add_languagemodel", "saes:model_detail", "model"),
        Kind("download", "saes.jobs", "Download an SAE", "io", "saes.add_sae", "saes:sae_detail", "sae"),
        Kind("adopt", "saes.jobs", "Import an SAE", "io", "saes.add_sae", "saes:sae_detail", "sae"),
        Kind("inspect", "saes.jobs", "Read an SAE's config", "io", "saes.add_sae", "saes:sae_detail", "sae"),
        Kind("verify", "saes.jobs", "Verify an SAE's files", "io", "saes.change_sae", "saes:sae_detail", "sae"),
        Kind("export_sae", "saes.jobs", "Export an SAE", "io", "saes.add_sae", "saes:sae_detail", "sae"),
        Kind("upload_sae", "saes.jobs", "Upload an SAE to the Hub", "io", "saes.add_sae", "saes:sae_detail", "sae"),
        Kind("sync", "saes.jobs", "Sync the catalogue", "io", "saes.change_sae", "jobs:job_detail", "job"),
        Kind("read_corpus", "training.jobs", "Read a corpus", "io", "training.add_corpus", "training:corpus_detail", "corpus"),
        Kind("capture", "training.capture_jobs", "Capture activations", "gpu", "training.add_capture", "training:capture_detail", "capture"),
        Kind("verify_capture", "training.capture_jobs", "Verify a capture's files", "io", "training.add_capture", "training:capture_detail",
             "capture"),
        Kind("export_capture", "training.capture_jobs", "Export a capture", "io", "training.add_capture", "training:capture_detail", "capture"),
        Kind("train", "training.jobs", "Train an SAE", "gpu", "training.add_run", "training:run_detail", "run"),
        Kind("train_sweep", "training.jobs", "Train a sweep", "gpu", "training.add_sweep", "training:sweep_detail", "sweep"),
        Kind("evaluate", "training.jobs", "Evaluate", "gpu", "training.add_evaluation", "saes:sae_detail", "sae"),
        Kind("harvest", "concepts.jobs", "Harvest features", "gpu", "concepts.add_featureview", "saes:sae_detail", "sae"),
        Kind("explain", "concepts.jobs", "Name features", "gpu", "concepts.add_explanation", "concepts:explanation_detail", "explanation"),
        Kind("look_concepts", "concepts.jobs", "Look at a file of concepts", "io", "concepts.add_conceptimport", "concepts:import_detail",
             "imported"),
        Kind("import_concepts", "concepts.jobs", "Import concepts", "io", "concepts.add_conceptimport", "concepts:import_detail", "imported"),
        Kind("generate", "inference.jobs", "Generate", "live", "inference.add_generation", "inference:generation_detail", "generation",
             in_child=False, attempts=1),
        Kind("sweep", "inference.jobs", "Sweep strengths", "gpu", "inference.add_generation", "inference:sweep_detail", "sweep"),
        Kind("infer", "inference.jobs", "Read a text", "live", "inference.add_inference", "inference:inference_detail", "inference",
             in_child=False, attempts=1),
        Kind("infer_prompts", "inference.jobs", "Read prompts", "gpu", "inference.add_promptbatch", "inference:promptbatch_detail", "batch"),
    )
}  # fmt: skip
