"""What was asked of a model with SAEs: generations with edits, texts read by SAEs, batches of texts read by SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.db import models
from django.urls import reverse

from concepts.models import ConceptConfig
from saehub.jobs.made import Made
from saes.models import SAE, LanguageModel
from training.models import Corpus


class Scope(models.TextChoices):
    """Which tokens edits act on (inference.numerics.steer.SCOPES)."""

    ALL = "all", "all tokens"
    GENERATED = "generated", "generated tokens only"
    NOT_SPECIAL = "not_special", "all but control tokens"
    FROM = "from", "from a position on"


class Mode(models.TextChoices):
    """What an edit makes of a code z; named by its formula (those of inference.numerics.steer.MODES)."""

    ADD = "add", "add: z' = z + v"
    SCALE = "scale", "scale: z' = z * v"
    CLAMP = "clamp", "clamp: z' = v"
    ABLATE = "ablate", "ablate: z' = 0"
    CAP = "cap", "cap: z' = min(z, v)"


class Steered(Made):
    """Abstract. A row whose model runs with features edited, by hand or as a concept config says.

    `edits` holds both: [{feature, mode, value}], each with `sae` where it is not of the row's own SAE, `scope` and `first`
    where it acts on other tokens than the row says, and `config` where a concept config asks for it. What the config
    compiled to is thus kept here, and stays when the config is deleted.
    """

    edits = models.JSONField(
        default=list, blank=True, help_text="[{feature, mode, value; sae, scope, first, config where they have them}]"
    )
    config = models.ForeignKey(
        ConceptConfig, null=True, blank=True, on_delete=models.SET_NULL, related_name="+", verbose_name="concept config"
    )
    config_fact = models.JSONField(
        default=dict, editable=False, help_text="{id, name, version, sae} of the concept config, also when it is gone"
    )

    class Meta:
        abstract = True

    @property
    def main_sae(self) -> int | None:
        """The SAE of edits that name none."""
        return None

    def use_config(self, config: ConceptConfig | None) -> None:
        """Take a concept config's compiled edits in place of those of another one; edits by hand stay.

        Raises concepts.compile.ConfigError when it does not compile.
        """
        own = [edit for edit in self.edits if "config" not in edit]
        self.config, self.config_fact, self.edits = config, {}, own
        if config is not None:
            self.config_fact = {
                "id": config.pk, "name": config.name, "version": config.number, "sae": config.sae_id
            }  # fmt: skip
            self.edits = own + [{"sae": config.sae_id, "config": config.pk} | edit for edit in config.compiled()]

    def edit_rows(self) -> list[dict[str, Any]]:
        """The edits, each with its mode's words, its SAE's id and where it acts."""
        words, places = dict(Mode.choices), dict(Scope.choices)
        own = {
            "sae": self.main_sae,
            "scope": getattr(self, "scope", Scope.ALL),
            "first": getattr(self, "scope_from", 0),
        }
        rows = []
        for edit in self.edits:
            row = own | edit
            where = f"from position {row['first']} on" if row["scope"] == Scope.FROM else places[row["scope"]]
            rows.append(row | {"formula": words[edit["mode"]].partition(": ")[2], "where": where})
        return rows

    def edited_saes(self) -> dict[int, SAE]:
        """The SAEs of its edits that are still there, by id; its own is the first."""
        ids = [pk for pk in dict.fromkeys([self.main_sae, *(edit["sae"] for edit in self.edit_rows())]) if pk]
        found = SAE.objects.select_related("model").in_bulk(ids)
        return {pk: found[pk] for pk in ids if pk in found}


class Generation(Steered):
    """One prompt generated twice, plain and steered, with everything that decides the result."""

    KIND = "generate"
    Scope = Scope
    Mode = Mode

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="generations")
    sae = models.ForeignKey(SAE, null=True, blank=True, on_delete=models.CASCADE, related_name="generations")
    prompt = models.TextField()
    chat = models.BooleanField(default=False)
    scope = models.CharField(max_length=12, choices=Scope.choices, default=Scope.ALL)
    scope_from = models.PositiveIntegerField(default=0, help_text="Position at which the edits begin, for scope `from`")
    instruction = models.TextField(blank=True, help_text="What is asked for in words in the prompt-only text")
    max_new_tokens = models.PositiveIntegerField(default=48)
    temperature = models.FloatField(default=0.0)
    seed = models.BigIntegerField(default=0)

    baseline = models.JSONField(default=dict, editable=False, help_text="{text, ids, pieces, logprobs, seconds}")
    steered = models.JSONField(default=dict, editable=False)
    prompted = models.JSONField(default=dict, editable=False, help_text="The prompt-only text, without edits")
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:generation_detail", args=[self.pk])

    @property
    def main_sae(self) -> int | None:
        return self.sae_id

    @property
    def prompt_only(self) -> str:
        """The prompt with the instruction in front, for the text that words alone make of it."""
        return f"{self.instruction}\n\n{self.prompt}" if self.instruction else ""


class Sweep(Made):
    """A generation made again at several strengths of its edits."""

    KIND = "sweep"

    generation = models.ForeignKey(Generation, on_delete=models.CASCADE, related_name="sweeps")
    factors = models.JSONField(default=list, help_text="Multiples of the edits' strengths")
    points = models.JSONField(default=list, editable=False, help_text="As inference.numerics.sweep.Point, in order")
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:sweep_detail", args=[self.pk])


class Resident(models.Model):
    """A model or SAE that a live worker holds in memory now, as that worker last wrote it."""

    host = models.CharField(max_length=120)
    pid = models.PositiveIntegerField()
    started = models.FloatField(help_text="When the process began: process ids are used again")
    kind = models.CharField(max_length=10)
    name = models.CharField(max_length=200)
    n_bytes = models.BigIntegerField()
    budget = models.BigIntegerField()
    used_at = models.DateTimeField()

    class Meta:
        ordering = ("host", "pid", "-used_at")

    def __str__(self) -> str:
        return f"{self.name} in {self.host}:{self.pid}"


class Inference(Steered):
    """Texts read by one or more SAEs of their model: which features fire on which token. The codes are files.

    With `new_tokens` the model first goes on from each prompt, with the edits if there are any (all tokens, temperature and
    seed as given), and prompt and continuation are read together. The reading itself is always of the plain model, so
    that the codes say what fires on the text and can be read again from it.
    """

    KIND = "infer"
    FOLDER = "inferences"
    MOST_PROMPTS = 64

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="inferences")
    saes = models.ManyToManyField(SAE, related_name="inferences")
    prompt = models.TextField()
    more_prompts = models.JSONField(default=list, blank=True, help_text="Prompts after the first, read on their own")
    chat = models.BooleanField(default=False)
    prepend_bos = models.BooleanField(default=True)
    probabilities = models.BooleanField(default=True, help_text="Keep the likeliest next tokens of every token")
    top_next = models.PositiveSmallIntegerField(default=10, help_text="How many of them")
    new_tokens = models.PositiveIntegerField(default=0, help_text="Tokens the model writes after each prompt; 0: none")
    temperature = models.FloatField(default=0.0)
    seed = models.BigIntegerField(default=0)
    top_features = models.PositiveIntegerField(
        default=5, help_text="Strongest features named of every prompt and token in answers and in top_texts.json"
    )
    save_top_texts = models.BooleanField(
        default=False, help_text="Write top_texts.json of every SAE: the texts on which each feature fires most"
    )

    n_tokens = models.PositiveIntegerField(null=True, editable=False, help_text="Of all texts together")
    outputs = models.JSONField(
        default=list,
        editable=False,
        help_text="[{prompt, text, completion, n_prompt_tokens, n_tokens, stopped, seconds, policy}], one of each prompt",
    )
    facts = models.JSONField(
        default=list,
        editable=False,
        help_text="[{sae, name, sha256, hook_name, d_sae, fires, l0}], in the files' order",
    )
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)

    def get_absolute_url(self) -> str:
        return reverse("inference:inference_detail", args=[self.pk])

    @property
    def prompts(self) -> list[str]:
        return [self.prompt, *self.more_prompts]

    def text_folder(self, number: int) -> Path:
        """Where the codes of the number-th prompt are."""
        return self.folder / f"text-{number}" if number else self.folder

    def top_texts_file(self, sae: int) -> Path:
        """Of one SAE; there when `save_top_texts` was asked for and the row is ready."""
        return self.folder / f"sae-{sae}" / "top_texts.json"


class PromptBatch(Made):
    """The texts of a corpus, each read on its own by one or more SAEs, as one Parquet table of what fires."""

    KIND = "infer_prompts"
    FOLDER = "batches"
    FILE = "features.parquet"

    model = models.ForeignKey(LanguageModel, on_delete=models.PROTECT, related_name="batches")
    saes = models.ManyToManyField(SAE, related_name="batches")
    corpus = models.ForeignKey(Corpus, on_delete=models.PROTECT, related_name="batches")
    prepend_bos = models.BooleanField(default=True)
    top = models.PositiveIntegerField(default=20, help_text="Strongest features kept of every token; 0 keeps all")
    max_prompts = models.PositiveIntegerField(null=True, blank=True)

    n_prompts = models.PositiveIntegerField(null=True, editable=False)
    n_cut = models.PositiveIntegerField(null=True, editable=False, help_text="Prompts longer than the model reads")
    n_tokens = models.BigIntegerField(null=True, editable=False)
    n_rows = models.BigIntegerField(null=True, editable=False)
    size_bytes = models.BigIntegerField(null=True, editable=False)
    facts = models.JSONField(default=list, editable=False)
    policy = models.JSONField(default=dict, editable=False)
    versions = models.JSONField(default=dict, editable=False)
    seconds = models.FloatField(null=True, editable=False)

    class Meta:
        ordering = ("-pk",)
        verbose_name_plural = "prompt batches"

    @property
    def file(self) -> Path:
        return self.folder / self.FILE

    def get_absolute_url(self) -> str:
        return reverse("inference:promptbatch_detail", args=[self.pk])
