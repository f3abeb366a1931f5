"""From text to an SAE: corpora, captures of activations, training runs, evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.db import models, transaction
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.made import Made
from saehub.jobs.models import Job, State
from saes.models import SAE, LanguageModel
from training.samples import Sampled, sampled


class Corpus(Made):
    """Texts or conversations to run a model on: a file, a folder of the server, pasted text, or a Hub dataset."""

    KIND = "read_corpus"
    FOLDER = "corpora"

    class Source(models.TextChoices):
        UPLOAD = "upload", "uploaded file"
        TEXT = "text", "pasted text"
        PATH = "path", "path on the server"
        HUB = "hub", "Hugging Face dataset"

    name = models.CharField(max_length=120, unique=True)
    source = models.CharField(max_length=10, choices=Source.choices)
    location = models.CharField(max_length=400, help_text="File name, path on the server, or dataset id")
    subset = models.CharField(max_length=120, blank=True, help_text="Configuration of a Hub dataset")
    split = models.CharField(max_length=60, blank=True)
    text_field = models.CharField(max_length=80, blank=True, help_text="Column or key that holds the text")
    revision = models.CharField(max_length=80, blank=True)

    n_documents = models.PositiveIntegerField(null=True, editable=False)
    n_characters = models.BigIntegerField(null=True, editable=False)
    size_bytes = models.BigIntegerField(null=True, editable=False)
    sha256 = models.CharField(max_length=64, blank=True, editable=False)
    sample = models.TextField(blank=True, editable=False)
    chats = models.BooleanField(
        default=False, editable=False, help_text="Its documents are conversations: lists of messages"
    )

    class Meta:
        ordering = ("name",)
        verbose_name_plural = "corpora"

    @property
    def file(self) -> Path:
        """The file or folder that is read; a Hub dataset has none."""
        own = self.source in (self.Source.UPLOAD, self.Source.TEXT)
        return self.folder / self.location if own else Path(self.location)

    @property
    def sampled(self) -> Sampled:
        """How it begins."""
        return sampled(self.sample, self.chats)

    def get_absolute_url(self) -> str:
        return reverse("training:corpus_detail", args=[self.pk])


class Capture(Made):
    """Activations of one model on one corpus, stored as shards."""

    KIND = "capture"
    FOLDER = "captures"

    class Storage(models.TextChoices):
        FP32 = "float32", "float32 (exact)"
        BF16 = "bfloat16", "bfloat16 (half the disk)"
        FP16 = "float16", "float16"

    class Compute(models.TextChoices):
        FP32 = "float32", "float32 (exact)"
        BF16 = "bfloat16", "bfloat16 autocast (faster)"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="captures")
    corpus = models.ForeignKey(Corpus, on_delete=models.PROTECT, related_name="captures")
    hook_names = models.JSONField(default=list)
    context_length = models.PositiveIntegerField(default=128)
    prepend_bos = models.BooleanField(default=True)
    store_special = models.BooleanField(default=False)
    dtype = models.CharField(max_length=10, choices=Storage.choices, default=Storage.FP32)
    max_tokens = models.BigIntegerField(null=True, blank=True)
    packed = models.BooleanField(
        default=True, help_text="Contexts filled without padding; else one document, padded and masked"
    )
    chat_template = models.BooleanField(default=False, help_text="Documents go through the model's chat template first")
    plain_chats = models.BooleanField(
        default=False, help_text="Messages of conversations are joined plainly, as role: content"
    )
    roles = models.JSONField(
        default=list, blank=True, help_text="Of conversations, only tokens of these roles are kept; empty for all"
    )
    compute_dtype = models.CharField(max_length=10, choices=Compute.choices, default=Compute.FP32)
    max_norm_ratio = models.FloatField(
        null=True, blank=True, help_text="Rows whose norm is so many times the median are left out (attention sinks)"
    )
    stored = models.BooleanField(default=True, help_text="False: nothing is kept, runs stream from the model itself")
    location = models.CharField(max_length=400, blank=True, help_text="Path of a mi_crow LocalStore run that was read")
    parts = models.PositiveSmallIntegerField(default=1, help_text="Jobs that share the work, on as many workers")

    n_masked = models.BigIntegerField(null=True, editable=False, help_text="Rows left out for their norm")
    n_tokens = models.BigIntegerField(null=True, editable=False)
    n_contexts = models.BigIntegerField(null=True, editable=False)
    size_bytes = models.BigIntegerField(null=True, editable=False)
    seconds = models.FloatField(null=True, editable=False)
    manifest = models.JSONField(default=dict, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("training:capture_detail", args=[self.pk])

    @property
    def ended_early(self) -> bool:
        """The corpus held fewer tokens than were asked for."""
        found = (self.n_tokens or 0) + (self.n_masked or 0)
        return bool(self.ready and self.max_tokens and not self.location and found < self.max_tokens)

    @property
    def tokens_per_second(self) -> int | None:
        return round(self.n_tokens / self.seconds) if self.n_tokens and self.seconds else None

    def start(self, user: Any, *, title: str = "") -> Any:
        """Queue the job that makes it, or one for each of its parts; the row shows the first."""
        if self.parts == 1 or self.location:
            return super().start(user, title=title)
        from saehub.jobs.models import enqueue

        jobs = [
            enqueue(
                self.KIND, user, title=f"Capture activations: {self.name}, part {part + 1} of {self.parts}",
                capture=self.pk, part=part,
            )
            for part in range(self.parts)
        ]  # fmt: skip
        self.job = jobs[0]
        self.save(update_fields=["job"])
        return self.job

    def making(self) -> list[Job]:
        """The jobs that make it, one for each of its parts."""
        rows = Job.objects.filter(kind=self.KIND, subject_id=self.pk).order_by("-pk")
        return list({job.params.get("part", 0): job for job in reversed(rows)}.values())

    def d_in(self, hook_name: str) -> int | None:
        row = self.model.hook(hook_name)
        return row["d"] if row else None


class Sweep(Made):
    """Several runs on one capture, trained side by side on one stream of activations."""

    KIND = "train_sweep"
    FOLDER = "sweeps"

    capture = models.ForeignKey(Capture, on_delete=models.PROTECT, related_name="sweeps")
    grid = models.JSONField(default=dict, help_text="Values of each axis: k or a coefficient, d_sae, hook point, seed")
    config = models.JSONField(default=dict, help_text="What all of its runs share")
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("training:sweep_detail", args=[self.pk])

    def start(self, user: Any, *, title: str = "") -> Job:
        """Queue the job that trains all of its runs that are not over; theirs is the same job."""
        job = super().start(user, title=title)
        self.waiting().update(job=job)
        return job

    @property
    def state(self) -> str:
        """As of every row that a job makes, and `paused`: pausing took its job out of the queue."""
        found = super().state
        return "paused" if found == "new" else found

    def pause(self) -> int:
        """Let every run that goes on rest at its next step, and at once where they still wait; how many."""
        paused = sum(run.pause() for run in self.waiting().filter(stop_at=None).select_related("job", "sweep"))
        if self.job and not self.waiting().exists() and self.job.withdraw():
            self.job = None
            self.save(update_fields=["job"])
        return paused

    def stop(self, user: Any) -> int:
        """Let every run that goes on end at its next step and become an SAE; how many have something to keep."""
        return sum(run.stop(user) for run in self.waiting().filter(stop_at=None).select_related("job"))

    def resume(self, user: Any) -> int:
        """Let its paused runs go on together, or one by one beside a job that is still at the others; how many."""
        paused = [run for run in self.runs.select_related("job") if run.state == "paused"]
        self.runs.filter(pk__in=[run.pk for run in paused]).update(pause_at=None)
        if self.job and self.job.is_live:
            for run in paused:
                run.pause_at = None
                if run.job_id != self.job_id:
                    run.start(user)
        elif paused:
            self.ready_at = None
            self.save(update_fields=["ready_at"])
            self.start(user)
        return len(paused)

    def waiting(self) -> Any:
        """Its runs that its job is to train: not ready, not failed, not paused."""
        return self.runs.filter(ready_at=None, error="", pause_at=None)


class Run(Made):
    """One training of one SAE on one hook point of a capture."""

    KIND = "train"
    FOLDER = "runs"

    capture = models.ForeignKey(Capture, on_delete=models.PROTECT, related_name="runs")
    sweep = models.ForeignKey(
        Sweep, null=True, blank=True, on_delete=models.CASCADE, related_name="runs", editable=False
    )
    hook_name = models.CharField(max_length=200)
    hook_name_out = models.CharField(
        max_length=200, blank=True, help_text="Transcoders: where their output is compared"
    )
    architecture = models.CharField(max_length=40)
    config = models.JSONField(default=dict, help_text="What the trainer is given, and d_sae, k or the L1 coefficient")
    sae = models.OneToOneField(
        SAE, null=True, blank=True, on_delete=models.SET_NULL, related_name="run", editable=False
    )
    evaluate_after = models.BooleanField(default=True)
    harvest_after = models.BooleanField(default=True)
    processes = models.PositiveSmallIntegerField(
        default=1, help_text="Devices, or CPU processes, that share each batch"
    )
    stop_at = models.DateTimeField(
        null=True, editable=False, help_text="When somebody asked to stop here and keep what is trained."
    )
    pause_at = models.DateTimeField(
        null=True, editable=False, help_text="When somebody asked to pause; a paused run goes on from its checkpoint."
    )
    seconds = models.FloatField(null=True, editable=False)
    tokens = models.BigIntegerField(null=True, editable=False)
    error = models.TextField(blank=True, editable=False, help_text="Why it ended without the others of its sweep")

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("training:run_detail", args=[self.pk])

    @property
    def hooks(self) -> str | tuple[str, str]:
        """What it is trained on: a hook point, or the two of a transcoder."""
        return (self.hook_name, self.hook_name_out) if self.hook_name_out else self.hook_name

    @property
    def place(self) -> str:
        """The same in words."""
        return f"{self.hook_name} → {self.hook_name_out}" if self.hook_name_out else self.hook_name

    @property
    def sae_architecture(self) -> str:
        """Of the SAE that it trains: a transcoder with a skip is of a class of its own."""
        return self.architecture.replace(
            "_transcoder", "_skip_transcoder" if self.config.get("skip") else "_transcoder"
        )

    @property
    def state(self) -> str:
        """As of every row that a job makes, and `paused`: it has a checkpoint and no job."""
        found = super().state
        if self.error and not self.ready:
            return "failed"
        return "paused" if found == State.DONE or (self.pause_at and found in ("new", State.CANCELLED)) else found

    @property
    def busy(self) -> bool:
        return not self.error and super().busy

    @property
    def has_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.safetensors"))

    @property
    def keepable(self) -> bool:
        """Whether it rests, paused, failed or cancelled, on a checkpoint that could be an SAE."""
        return not (self.ready or self.busy) and self.has_checkpoint

    @property
    def stoppable(self) -> bool:
        """Whether it goes on and has something to keep, or will have at its next step; one that waits may have neither."""
        return self.busy and (self.state == State.RUNNING or self.has_checkpoint)

    def stop(self, user: Any) -> bool:
        """End at the next step and keep what is trained; one that rests is kept as its checkpoint has it, by a job of its
        own. False, changing nothing, where there is nothing to keep."""
        if not (self.stoppable or self.keepable):
            return False
        rests = not self.busy
        self.stop_at = self.stop_at or timezone.now()
        self.save(update_fields=["stop_at"])
        if rests:
            self.resume(user)
        return True

    def pause(self) -> bool:
        """End at the next step with a checkpoint; one that waits leaves the queue at once. False, changing nothing, where
        nothing goes on."""
        if not self.busy or self.job is None:
            return False
        asked = Run.objects.filter(pk=self.pk, ready_at=None, pause_at=None, stop_at=None).update(
            pause_at=timezone.now()
        )
        waits = self.job.state == State.QUEUED
        with_others = self.sweep is not None and self.sweep.job_id == self.job_id
        if asked and waits and (with_others or self.job.withdraw()):
            Run.objects.filter(pk=self.pk).update(job=None)
            self.job = None
        self.refresh_from_db(fields=["pause_at"])
        return True

    def resume(self, user: Any) -> None:
        """Go on from the checkpoint, by a job of its own unless the one that was to pause is still there."""
        with transaction.atomic():  # of two that press at once, one starts it
            now = Run.objects.select_for_update().get(
                pk=self.pk
            )  # its job in a query of its own: a join would be older
            self.job, self.pause_at, self.error = now.job, None, ""
            self.save(update_fields=["pause_at", "error"])
            if not (self.job and self.job.is_live):
                self.start(user)


class RunPoint(models.Model):
    """What a run looked like at one step: a point of its curves."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="points")
    step = models.PositiveIntegerField()
    tokens = models.BigIntegerField()
    values = models.JSONField(default=dict)

    class Meta:
        ordering = ("step",)
        constraints = [models.UniqueConstraint(fields=["run", "step"], name="one_point_per_step")]

    def __str__(self) -> str:
        return f"run {self.run_id} step {self.step}"


class Evaluation(Made):
    """Metrics of one SAE on the held-out contexts of one capture, each with its definition and n."""

    KIND = "evaluate"
    FOLDER = "evaluations"

    sae = models.ForeignKey(SAE, on_delete=models.CASCADE, related_name="evaluations")
    capture = models.ForeignKey(Capture, null=True, blank=True, on_delete=models.CASCADE, related_name="evaluations")
    corpus = models.ForeignKey(
        Corpus, null=True, blank=True, on_delete=models.PROTECT, related_name="evaluations",
        help_text="A corpus of choice, instead of a capture's held-out contexts",
    )  # fmt: skip
    max_tokens = models.BigIntegerField(null=True, blank=True, help_text="Of the corpus of choice")
    max_contexts = models.PositiveIntegerField(
        default=64, help_text="Held-out contexts run through the model for CE and KL"
    )
    metrics = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return self.sae.get_absolute_url()

    @property
    def saebench(self) -> Path:
        """SAEBench's core JSON of a finished evaluation; transcoders have none."""
        return self.folder / "saebench_core.json"

    @property
    def source(self) -> Capture | Corpus | None:
        """On what it is measured."""
        return self.capture or self.corpus

    def start(self, user: Any, *, title: str = "") -> Any:
        from saehub.jobs.models import enqueue

        self.job = enqueue(
            "evaluate", user, title=title or f"Evaluate {self.sae.name}", sae=self.sae_id, evaluation=self.pk
        )
        self.save(update_fields=["job"])
        return self.job
