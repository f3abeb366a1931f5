"""One row per job. The row is the truth; queue and sockets only hurry it."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import models, transaction
from django.db.models import Count, F, OuterRef, Q, Subquery
from django.urls import reverse
from django.utils import timezone

from saehub.jobs.kinds import KINDS, Kind
from saehub.plain import plain


class State(models.TextChoices):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


LIVE = (State.QUEUED, State.RUNNING)
UNATTENDED = timedelta(seconds=20)  # a queue where nothing runs takes a job up within a second or two
UNHEARD = timedelta(seconds=20)  # of a worker, which says every five that it is there
LOG_TAIL = 8  # lines of the log on a card


class JobQuerySet(models.QuerySet["Job"]):
    """Jobs by how they stand, and the claim by which exactly one worker gets one."""

    def live(self) -> JobQuerySet:
        return self.filter(state__in=LIVE)

    def stale(self) -> JobQuerySet:
        """Running jobs whose worker has not renewed its lease: it is dead, or cut off."""
        return self.filter(state=State.RUNNING, lease_until__lt=timezone.now())

    def placed(self) -> JobQuerySet:
        """With their places in the queue, asked in the same query: see `Job.queue_position`."""
        before = Job.objects.filter(state=State.QUEUED, queue=OuterRef("queue"), pk__lt=OuterRef("pk")).order_by()
        return self.annotate(n_before=Subquery(before.values("queue").annotate(n=Count("pk")).values("n")))

    def claim(self, pk: int, worker: str) -> Job | None:
        """Take a queued job, or None when somebody else has it or it is over. One conditional UPDATE decides."""
        token = uuid.uuid4()
        now = timezone.now()
        taken = self.filter(pk=pk, state=State.QUEUED).update(
            state=State.RUNNING,
            token=token,
            worker=worker,
            attempt=F("attempt") + 1,
            started_at=now,
            changed_at=now,
            lease_until=lease(),
            rate=None,
        )
        return self.select_related("owner").filter(pk=pk).first() if taken else None


def ended_early(result: dict[str, Any]) -> bool:
    """Whether a job that did what it was asked says that this was less than all: it was paused, or stopped and kept."""
    return bool(result.get("paused") or result.get("ended_early"))


def lease() -> Any:
    return timezone.now() + timedelta(seconds=settings.JOB_LEASE_SECONDS)


class Job(models.Model):
    """One piece of work: what is to be done, for whom, how it stands, who works on it, and how it ended."""

    kind = models.CharField(max_length=40, help_text="A name in the table of kinds.")
    queue = models.CharField(max_length=10)
    params = models.JSONField(default=dict)
    subject_id = models.BigIntegerField(null=True)
    title = models.CharField(max_length=200)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="jobs"
    )

    state = models.CharField(max_length=10, choices=State.choices, default=State.QUEUED)
    attempt = models.PositiveIntegerField(default=0)
    token = models.UUIDField(null=True, help_text="Who holds the lease; a write with another token is refused.")
    worker = models.CharField(max_length=120, blank=True)
    lease_until = models.DateTimeField(null=True)
    cancel_at = models.DateTimeField(null=True, help_text="When somebody asked to cancel it.")

    created_at = models.DateTimeField(auto_now_add=True)
    offered_at = models.DateTimeField(null=True, help_text="When the queue was last told of it.")
    started_at = models.DateTimeField(null=True)
    changed_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    done = models.BigIntegerField(default=0)
    total = models.BigIntegerField(null=True)
    unit = models.CharField(max_length=20, default="steps")
    step = models.CharField(max_length=200, blank=True)
    rate = models.FloatField(null=True, help_text="Units a second, over the last seconds.")
    memory = models.BigIntegerField(null=True, help_text="Resident bytes of the process that does it.")

    result = models.JSONField(default=dict)
    error = models.TextField(blank=True, help_text="One plain sentence.")
    hint = models.TextField(blank=True)
    traceback = models.TextField(blank=True)

    objects = JobQuerySet.as_manager()
    n_before: int | None  # queued jobs before this one, where `placed` asked for it

    class Meta:
        ordering = ("-pk",)
        indexes = [
            models.Index(fields=["state", "queue"]),
            models.Index(fields=["kind", "subject_id"]),
        ]
        permissions = [("cancel_job", "Can cancel and retry jobs")]

    def __str__(self) -> str:
        return f"{self.title} (job {self.pk})"

    # -- where it belongs
    @property
    def kind_row(self) -> Kind:
        return KINDS[self.kind]

    def get_absolute_url(self) -> str:
        return reverse("jobs:job_detail", args=[self.pk])

    def subject_url(self) -> str:
        """Page of what this job works on."""
        return reverse(self.kind_row.page, args=[self.subject_id]) if self.subject_id else self.get_absolute_url()

    @property
    def can_retry(self) -> bool:
        """It ended without its result, and what it works on was not deleted since."""
        gone = self.subject_id is None and self.kind_row.subject in self.params
        return self.state in (State.FAILED, State.CANCELLED) and not gone

    @property
    def group(self) -> str:
        """Channels group that hears of every change."""
        return f"job-{self.pk}"

    # -- how it stands
    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def cancelling(self) -> bool:
        return self.state == State.RUNNING and self.cancel_at is not None

    @property
    def fraction(self) -> float | None:
        if self.state == State.DONE and not ended_early(self.result):
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def seconds_left(self) -> float | None:
        if self.state != State.RUNNING or not (self.rate and self.total):
            return None
        return max(self.total - self.done, 0) / self.rate

    @property
    def seconds(self) -> float | None:
        """How long the last attempt has run, or ran."""
        end = self.finished_at or timezone.now()
        return (end - self.started_at).total_seconds() if self.started_at else None

    @property
    def silent(self) -> bool:
        """Its worker has not been heard of for half a lease: the card says so before the lease runs out."""
        late = timezone.now() + timedelta(seconds=settings.JOB_LEASE_SECONDS / 2)
        return self.state == State.RUNNING and (self.lease_until is None or self.lease_until < late)

    @property
    def queue_position(self) -> int | None:
        if self.state != State.QUEUED:
            return None
        if not hasattr(self, "n_before"):
            self.n_before = Job.objects.filter(state=State.QUEUED, queue=self.queue, pk__lt=self.pk).count()
        return (self.n_before or 0) + 1

    @property
    def unattended(self) -> bool:
        """Queued for a while in a queue where nothing runs: most likely nobody serves that queue."""
        waited = timezone.now() - (self.offered_at or self.created_at)
        if self.state != State.QUEUED or waited < UNATTENDED:
            return False
        return not Job.objects.filter(state=State.RUNNING, queue=self.queue).exists()

    def log_tail(self, lines: int = LOG_TAIL) -> list[JobLine]:
        return list(reversed(self.lines.order_by("-pk")[:lines]))

    # -- transitions; each is one conditional UPDATE, so that two of them at once cannot both win
    def holding(self) -> Q:
        """The row as its present worker knows it: running, under our token."""
        return Q(pk=self.pk, state=State.RUNNING, token=self.token)

    def finish(self, state: State, **fields: Any) -> bool:
        now = timezone.now()
        fields |= {"state": state, "finished_at": now, "changed_at": now, "lease_until": None, "token": None}
        return bool(Job.objects.filter(self.holding()).update(**fields))

    def give_up(self, reason: str, *, count: bool = True) -> bool:
        """The worker is gone. Queue the job again, or fail it when it has had its attempts; True when this call did it.

        `count=False` is for a worker that was stopped in order: that attempt is not held against the job.
        """
        if self.cancel_at:
            return self.finish(State.CANCELLED)
        if count and self.attempt >= self.kind_row.attempts:
            return self.finish(
                State.FAILED,
                error=f"{reason} This was attempt {self.attempt} of {self.kind_row.attempts}.",
                hint="If it was memory, choose a smaller batch or model, then press Retry.",
            )
        with transaction.atomic():
            fields: dict[str, Any] = {"state": State.QUEUED, "token": None, "lease_until": None, "rate": None}
            if not count:
                fields["attempt"] = F("attempt") - 1
            if not Job.objects.filter(self.holding()).update(**fields, changed_at=timezone.now()):
                return False
            self.write(f"{reason} The job is queued again.")
            self.offer()
        return True

    def withdraw(self) -> bool:
        """End a job that still waits; False, changing nothing, when a worker has it or it is over."""
        now = timezone.now()
        ended = Job.objects.filter(pk=self.pk, state=State.QUEUED).update(
            state=State.CANCELLED, cancel_at=now, finished_at=now, changed_at=now
        )
        if ended:
            self.announce()
        return bool(ended)

    def cancel(self) -> None:
        """Ask for the end: a queued job ends here, a running one is stopped by its worker within seconds."""
        if not self.withdraw():
            Job.objects.filter(pk=self.pk, state=State.RUNNING, cancel_at=None).update(cancel_at=timezone.now())
            self.announce()

    def retry(self) -> bool:
        """Queue a failed or cancelled job again, with fresh attempts. What it had finished is not done twice."""
        if not self.can_retry:
            return False
        with transaction.atomic():
            again = Job.objects.filter(pk=self.pk, state__in=(State.FAILED, State.CANCELLED)).update(
                state=State.QUEUED, attempt=0, cancel_at=None, finished_at=None, started_at=None, done=0, total=None,
                step="", rate=None, error="", hint="", traceback="", changed_at=timezone.now(),
            )  # fmt: skip
            if again:
                self.offer()
        self.announce()
        return bool(again)

    def offer(self) -> None:
        """Tell the queue, once the row is committed."""
        from saehub.jobs.queue import push

        Job.objects.filter(pk=self.pk).update(offered_at=timezone.now())
        transaction.on_commit(lambda: push(self.pk, self.queue))

    def write(self, text: str) -> None:
        JobLine.objects.create(job=self, text=plain(text[:2000]))

    def announce(self) -> None:
        from saehub.jobs.queue import announce

        announce(self.pk)


class JobLine(models.Model):
    """A line of a job's log."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="lines")
    at = models.DateTimeField(default=timezone.now)
    text = models.TextField()

    class Meta:
        ordering = ("pk",)

    def __str__(self) -> str:
        return self.text


class Worker(models.Model):
    """A `manage.py work` that serves a queue, as it last said itself, with how its machine stood then."""

    name = models.CharField(max_length=120, unique=True, help_text="host:process:queue, as its jobs name it")
    host = models.CharField(max_length=100)
    queue = models.CharField(max_length=10)
    processes = models.PositiveIntegerField(help_text="Jobs that it may do at once")
    started_at = models.DateTimeField()
    seen_at = models.DateTimeField()
    machine = models.JSONField(default=dict, help_text="saehub.machine.standing")

    class Meta:
        ordering = ("host", "queue", "name")
        default_permissions = ()

    def __str__(self) -> str:
        return self.name

    @property
    def silent(self) -> bool:
        """It has not been heard of for a while: it is dead, or cut off."""
        return timezone.now() - self.seen_at > UNHEARD


def enqueue(kind: str, owner: Any, *, title: str, **ids: Any) -> Job:
    """Queue one job of `kind` on the rows named by `ids`. Works inside a transaction: the queue hears of it on commit."""
    row = KINDS[kind]
    with transaction.atomic():
        job = Job.objects.create(
            kind=kind,
            queue=row.queue,
            params=ids,
            subject_id=ids.get(row.subject),
            title=title[:200],
            owner=owner if getattr(owner, "pk", None) else None,
            changed_at=timezone.now(),
        )
        job.offer()
    return job
