"""The form of a training run. Torch-free: the trainer's own checks come again in the job."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.utils.text import slugify

from saehub.typed import whole_number
from saes.fields import NewRow
from saes.models import SAE
from training.estimates import RunEstimate, estimate_run, together
from training.memory import room
from training.models import Capture, Run, Sweep
from training.speed import Speeds
from training.sweep_form import AXES, MOST_RUNS, NumbersField, grid, in_words, points

SEVERAL = "Several with commas make a sweep"
BATCH_SIZE = 2048
EXPANSION = 8  # features per dimension when none are named
ARCHITECTURES = {
    "topk": "TopK: the k largest features of each token",
    "batchtopk": "BatchTopK: k features a token on average, over the batch",
    "jumprelu": "JumpReLU: every feature learns its threshold",
    "gated": "Gated: one path decides which features fire, another how strongly",
    "standard": "ReLU, sparse by an L1 penalty",
    "topk_transcoder": "TopK transcoder: predicts another hook point, such as an MLP's output from its input",
    "jumprelu_transcoder": "JumpReLU transcoder: the same, with thresholds",
}
ARCHITECTURE_FIELDS = {  # what each of them is asked, beside what all are
    "topk": ("k",),
    "batchtopk": ("k", "matryoshka_widths"),
    "jumprelu": ("l0_coefficient", "target_l0", "l1_warmup"),
    "gated": ("l1_coefficient", "l1_warmup"),
    "standard": ("l1_coefficient", "l1_warmup"),
    "topk_transcoder": ("hook_name_out", "skip", "k"),
    "jumprelu_transcoder": ("hook_name_out", "skip", "l0_coefficient", "target_l0", "l1_warmup"),
}
TRANSCODERS = ("topk_transcoder", "jumprelu_transcoder")


SAES = ("topk", "batchtopk", "jumprelu", "gated", "standard")
INITIALIZATIONS = {  # whose, and for which of the architectures
    "": ("SAEHub's: encoder along the decoder, at norm 0.58", tuple(ARCHITECTURES)),
    "saelens": ("SAELens': both at norm 0.1, b_dec 0", SAES),
    "sparsify": ("sparsify's: torch's Linear, decoder at norm 1", ("topk",)),
    "dictionary_learning": ("dictionary_learning's: both at norm 1, of ReLU at 0.1", SAES),
}


class RunForm(NewRow):
    """An SAE to train: on what, of which kind and size, for how long."""

    source = forms.ChoiceField(label="Capture and hook point")
    architecture = forms.ChoiceField(
        choices=list(ARCHITECTURES.items()), initial="topk", widget=forms.RadioSelect, label="Architecture"
    )
    more_hooks = forms.CharField(
        required=False,
        max_length=2000,
        label="More hook points",
        help_text="Of the same capture, with commas between, or all: an SAE for each",
    )
    hook_name_out = forms.ChoiceField(
        label="Output hook point",
        help_text="What the transcoder predicts; of the same capture",
        error_messages={"required": "Choose the hook point that the transcoder predicts, of the same capture."},
    )
    skip = forms.BooleanField(
        required=False, label="Skip connection", help_text="A linear map of the input is added; it begins at 0"
    )
    k = NumbersField(int, 1, 2**20, initial=32, label="k, features per token", help_text=SEVERAL)
    l1_coefficient = NumbersField(float, 0, 1e6, initial=2.0, label="L1 coefficient", help_text=SEVERAL)
    l0_coefficient = NumbersField(
        float, 0, 1e6, initial=1.0, label="L0 coefficient", help_text="Weight of the number of features that fire"
    )
    target_l0 = NumbersField(
        float,
        0.01,
        1e6,
        required=False,
        label="Target L0, features per token",
        help_text="With it the penalty is on the distance from it",
    )
    matryoshka_widths = forms.CharField(
        required=False,
        max_length=200,
        label="Nested widths, features",
        help_text="Such as 512, 2048: the first so many features must do by themselves. Not nested when empty",
    )
    d_sae = NumbersField(
        int,
        1,
        2**20,
        required=False,
        label="Features (d_sae)",
        help_text=f"{EXPANSION} times the width of the hook point when empty",
    )
    n_tokens = forms.IntegerField(min_value=1, max_value=10**12, initial=1_000_000, label="Tokens to train on")
    evaluate_after = forms.BooleanField(required=False, initial=True, label="Then evaluate on held-out tokens")
    harvest_after = forms.BooleanField(
        required=False, initial=True, label="Then harvest the top texts of every feature"
    )
    batch_size = forms.IntegerField(min_value=1, max_value=2**20, initial=BATCH_SIZE, label="Batch size, tokens")
    lr = forms.FloatField(
        required=False,
        min_value=1e-8,
        max_value=1000,
        label="Learning rate",
        help_text="1e-3 / √(features / 16,384) when empty",
    )
    seed = NumbersField(int, 0, 2**31 - 1, initial=0, label="Seed", help_text=SEVERAL)
    lr_warmup = forms.FloatField(min_value=0, max_value=1, initial=0.02, label="Warm-up, share of steps")
    lr_decay = forms.FloatField(min_value=0, max_value=1, initial=0.2, label="Decay at the end, share of steps")
    l1_warmup = forms.FloatField(min_value=0, max_value=1, initial=0.05, label="Penalty's warm-up, share of steps")
    aux_coefficient = forms.FloatField(min_value=0, initial=1 / 32, label="Weight of the dead features' loss")
    dead_after_tokens = forms.IntegerField(
        required=False,
        min_value=1,
        label="Dead after, tokens",
        help_text="A quarter of the run, at most 10 million, when empty",
    )
    clip = forms.FloatField(
        required=False,
        min_value=0,
        label="Gradient norm at most",
        help_text="By the architecture when empty: none for TopK, 0.001 for the others; 0 sets none",
    )
    precision = forms.ChoiceField(
        required=False,
        choices=[
            ("", "Fast: rounded to bfloat16 or TF32 where the processor has it"),
            ("float32", "float32"),
            ("bfloat16", "bfloat16 autocast, for GPUs"),
        ],
        label="Products",
        help_text="Sums, weights and the optimiser's moments are float32 always",
    )
    initialization = forms.ChoiceField(
        required=False,
        choices=[(key, label) for key, (label, _) in INITIALIZATIONS.items()],
        label="First weights",
        help_text="Each peer's own, to compare with it",
    )
    processes = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=64,
        initial=1,
        label="Processes",
        help_text="GPUs, or CPU processes, that share each batch; 1 is fastest on a single processor",
    )
    advanced = [
        "name", "more_hooks", "batch_size", "lr", "seed", "lr_warmup", "lr_decay", "l1_warmup", "matryoshka_widths", "aux_coefficient",
        "dead_after_tokens", "clip", "precision", "initialization", "processes",
    ]  # fmt: skip
    only_with = {
        name: ("architecture", tuple(key for key, names in ARCHITECTURE_FIELDS.items() if name in names))
        for names in ARCHITECTURE_FIELDS.values()
        for name in names
    }
    trainer_fields = (
        "n_tokens", "batch_size", "lr", "seed", "lr_warmup", "lr_decay", "aux_coefficient", "dead_after_tokens", "clip",
        "precision", "initialization",
    )  # fmt: skip

    class Meta:
        model = Run
        fields = ("name", "architecture", "evaluate_after", "harvest_after", "processes")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.points: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}  # settings of the trainer that the form does not show, of a document
        self.captures = {
            row.pk: row for row in Capture.objects.ready().select_related("model", "corpus").order_by("-pk")[:200]
        }
        source: Any = self.fields["source"]
        source.choices = [("", "Choose a capture")] * (len(self.captures) > 1) + [
            (f"{row.pk}:{hook}", f"{row.name} · {hook} · {row.n_tokens:,} tokens")
            for row in self.captures.values()
            for hook in row.hook_names
        ]
        held = dict.fromkeys(hook for row in self.captures.values() for hook in row.hook_names)
        out: Any = self.fields["hook_name_out"]
        out.choices = [("", "Choose a hook point"), *((hook, hook) for hook in held)]
        out.error_messages["invalid_choice"] = "No capture here holds the hook point %(value)s; choose one of the list."
        source.error_messages["invalid_choice"] = "That capture does not hold this hook point; choose one of the list."

    def clean_processes(self) -> int:
        return self.cleaned_data["processes"] or 1

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if not data.get("source"):
            return data
        key, _, hook = data["source"].partition(":")
        self.instance.capture, self.instance.hook_name = self.captures[int(key)], hook
        self.instance.hook_name_out = self._goal(data, hook)
        hooks = self._hooks(hook, data.get("more_hooks", ""))
        self.points = points(self._axes(data) | {"hook_name": hooks})
        if len(self.points) > MOST_RUNS:
            raise ValidationError(f"That are {len(self.points):,} runs; a sweep takes {MOST_RUNS} at most.")
        if data.get("architecture") not in (None, *INITIALIZATIONS[data.get("initialization") or ""][1]):
            self.add_error("initialization", "They train no SAE of this architecture; choose other first weights.")
        if self.is_sweep and data.get("processes", 1) > 1:
            self.add_error("processes", "A sweep trains side by side in one process; choose 1, or one run alone.")
        if "d_sae" not in self.errors:
            for point in self.points:
                point["d_sae"] = point.get("d_sae") or EXPANSION * (self.instance.capture.d_in(point["hook_name"]) or 0)
                self._check_architecture(data, point)
            self._check_size(data)
            self.check_name(lambda: self._default_name(data))
        return data

    def _axes(self, data: dict[str, Any]) -> dict[str, Any]:
        """The axes that the architecture asks for, with the values given."""
        return {name: data.get(name) for name in AXES if name in self.fields and self.asks_for(name)}

    def _goal(self, data: dict[str, Any], hook: str) -> str:
        """The hook point that a transcoder predicts, "" for an SAE; adds an error where the two cannot be a pair."""
        if not self.asks_for("hook_name_out"):
            return ""
        if data.get("more_hooks", "").strip():
            self.add_error("more_hooks", "A transcoder reads one hook point; leave this empty, and train others apart.")
        goal: str = data.get("hook_name_out") or ""
        fault = self._unlike_a_pair(hook, goal, data.get("architecture", ""))
        if fault:
            self.errors.pop("hook_name_out", None)
            self.add_error("hook_name_out", fault)
        return goal

    def _unlike_a_pair(self, hook: str, goal: str, architecture: str) -> str:
        """What is wrong with two hook points as those of a transcoder, in one sentence."""
        capture = self.instance.capture
        there, widths = capture.hook_names, (capture.d_in(hook), capture.d_in(goal))
        if len(there) < 2:
            return (
                f"A transcoder needs two hook points of the same tokens, and this capture holds only {there[0]}; capture "
                "both in one pass."
            )
        if not goal:
            return ""
        if goal not in there:
            return f"{goal} is not in this capture; it holds {', '.join(there)}."
        if goal == hook:
            return f"A transcoder predicts another hook point than the one it reads, {hook}."
        if architecture == "topk_transcoder" and widths[0] != widths[1]:
            return (
                f"{hook} has {widths[0]} dimensions and {goal} {widths[1]}: a TopK transcoder is kept in sparsify's format, "
                "which has one width; choose JumpReLU."
            )
        if not capture.stored and capture.max_norm_ratio:
            return "This capture is streamed and replaces outliers at each hook point apart; store it, or set no limit on norms."
        return ""

    def _hooks(self, first: str, more: str) -> list[str]:
        """The hook points of the runs: the one that was chosen, and the others that were named."""
        there = self.instance.capture.hook_names
        names = there if more.strip().lower() == "all" else more.replace(",", " ").split()
        missing = [name for name in names if name not in there]
        if missing:
            self.add_error("more_hooks", f"{missing[0]} is not in this capture; it holds {', '.join(there)}.")
        return list(dict.fromkeys([first, *(name for name in names if name in there)]))

    @property
    def is_sweep(self) -> bool:
        return len(self.points) > 1

    def _check_architecture(self, data: dict[str, Any], point: dict[str, Any]) -> None:
        """Adds an error beside the field, once, however many runs have it."""
        if data.get("architecture") == "batchtopk" and isinstance(data.get("matryoshka_widths"), str):
            point["matryoshka_widths"] = self._widths(data["matryoshka_widths"], point["d_sae"])
        k = point.get("k") or 0
        if self.asks_for("k") and k > point["d_sae"] and "k" not in self.errors:
            self.add_error("k", f"k is {k:,}, but the SAE has only {point['d_sae']:,} features; choose a smaller k.")

    def _widths(self, text: str, d_sae: int) -> list[int] | None:
        """The nested widths that a text of numbers means, d_sae last."""
        words = text.replace(",", " ").split()
        if not words or "matryoshka_widths" in self.errors:
            return None
        numbers = [number for word in words if (number := whole_number(word)) is not None]
        widths = [*numbers, *([] if d_sae in numbers else [d_sae])]
        if len(numbers) != len(words) or widths != sorted(set(widths)) or widths[0] < 1 or widths[-1] != d_sae:
            self.add_error(
                "matryoshka_widths",
                f"Give rising whole numbers below {d_sae:,}, the number of features, such as 512, 2048.",
            )
            return None
        return widths

    def _check_size(self, data: dict[str, Any]) -> None:
        estimate = self.estimate_of(data)
        if estimate and not estimate.fits:
            self.add_error(
                "d_sae",
                f"The checkpoints of {'these runs' if self.is_sweep else 'so many features'} take "
                f"{estimate.disk / 1e9:.1f} GB and the disk has {estimate.free / 1e9:.1f} GB to spare; choose fewer "
                "features or free some space.",
            )

    def _default_name(self, data: dict[str, Any]) -> str:
        if not self.is_sweep:
            return self._name_of(data, self.points[0])
        model = slugify(self.instance.capture.model.name)
        return f"{model} {data.get('architecture')} sweep: {in_words(self.grid())}"[:110]

    def _name_of(self, data: dict[str, Any], point: dict[str, Any]) -> str:
        """The name of one run; with its seed when seeds are swept over."""
        model = self.instance.capture.model
        hook = model.hook(point["hook_name"])
        place = f"layer{hook['layer']}" if hook and hook["layer"] is not None else slugify(point["hook_name"])
        seed = f"-seed{point['seed']}" if "seed" in self.grid() else ""
        return f"{slugify(model.name)}-{place}-{_kind(data | point)}-{point['d_sae']}{seed}"[:110]

    def grid(self) -> dict[str, list[Any]]:
        """What the runs of a sweep differ in."""
        hooks = list(dict.fromkeys(point["hook_name"] for point in self.points))
        return grid(self._axes(self.cleaned_data) | {"hook_name": hooks})

    def estimate_of(self, data: dict[str, Any]) -> RunEstimate | None:
        """Of all the runs together; None while they are not known."""
        key, _, hook = str(data.get("source") or "").partition(":")
        capture = self.captures.get(int(key)) if key.isdigit() else None
        if capture is None or not data.get("n_tokens"):
            return None
        runs = self.points or points({"d_sae": data.get("d_sae")}) or [{}]
        speeds, has = Speeds(capture, data.get("processes") or 1), room()
        each = [
            estimate_run(
                speeds,
                point.get("hook_name", hook),
                data.get("architecture") or "topk",
                point.get("d_sae") or EXPANSION * (capture.d_in(hook) or 0),
                data["n_tokens"],
                data.get("batch_size") or BATCH_SIZE,
                data.get("hook_name_out") or "",
                has,
            )
            for point in runs
        ]
        return together(each)

    def estimate(self) -> RunEstimate | None:
        """What the form as it stands would cost; fields with errors count as empty."""
        if self.is_bound:
            self.is_valid()
            return self.estimate_of(self.cleaned_data)
        data = {name: self.get_initial_for_field(field, name) for name, field in self.fields.items()}
        if not data["source"] and len(self.captures) == 1:
            row = next(iter(self.captures.values()))
            data["source"] = f"{row.pk}:{row.hook_names[0]}"
        return self.estimate_of(data)

    def save(self, commit: bool = True) -> Any:
        """The run, or the sweep with its runs."""
        if not self.is_sweep:
            self.instance.config = self.config(self.points[0])
            return super().save(commit)
        data, capture = self.cleaned_data, self.instance.capture
        shared = {"order_seed": self.more.get("order_seed", self.points[0]["seed"])} if "seed" in self.grid() else {}
        sweep = Sweep.objects.create(
            name=data["name"], owner=self.user, capture=capture, grid=self.grid(), config=self.config({}) | shared
        )
        for point in self.points:
            Run.objects.create(
                name=self._name_of(data, point),
                owner=self.user,
                capture=capture,
                sweep=sweep,
                hook_name=point["hook_name"],
                hook_name_out=self.instance.hook_name_out,
                architecture=data["architecture"],
                config=self.config(point) | shared,
                evaluate_after=data["evaluate_after"],
                harvest_after=data["harvest_after"],
            )
        return sweep

    def config(self, point: dict[str, Any]) -> dict[str, Any]:
        """What the job builds the SAE and its TrainConfig from; without the axes where `point` has none."""
        data = {name: value for name, value in self.cleaned_data.items() if name not in AXES} | point
        names = ["d_sae", *ARCHITECTURE_FIELDS[data["architecture"]], *self.trainer_fields]
        kept = [name for name in names if name != "hook_name_out" and data.get(name) not in (None, "")]
        return {name: data[name] for name in kept} | self.more


def _kind(data: dict[str, Any]) -> str:
    """The part of a name that says what is trained."""
    architecture = data.get("architecture")
    if architecture in TRANSCODERS:
        kind = _kind(data | {"architecture": architecture.removesuffix("_transcoder")})
        return f"{kind}-{'skip-' if data.get('skip') else ''}transcoder"
    if architecture in ("topk", "batchtopk"):
        nested = "matryoshka-" if architecture == "batchtopk" and data.get("matryoshka_widths") else ""
        return f"{nested}{architecture}{data.get('k')}"
    if architecture == "jumprelu":
        target = data.get("target_l0")
        return f"jumprelu-{f'l0-{target:g}' if target else _short(data.get('l0_coefficient'))}"
    return f"{'relu' if architecture == 'standard' else architecture}-l1-{_short(data.get('l1_coefficient'))}"


def _short(number: Any) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def like(run: Run) -> dict[str, Any]:
    """Initial values of a RunForm that trains the same again."""
    widths = {"matryoshka_widths": ", ".join(str(width) for width in run.config.get("matryoshka_widths", ()))}
    return (
        run.config
        | widths
        | {
            "source": f"{run.capture_id}:{run.hook_name}",
            "hook_name_out": run.hook_name_out,
            "architecture": run.architecture,
            "evaluate_after": run.evaluate_after,
            "harvest_after": run.harvest_after,
            "processes": run.processes,
        }
    )


def like_sae(sae: SAE) -> dict[str, Any]:
    """Initial values of a RunForm that trains an SAE of the same kind, as far as its config tells: where, architecture,
    width, k. One that was trained here is its run's."""
    run = Run.objects.filter(sae=sae).first()
    if run is not None:
        return like(run)
    found: dict[str, Any] = {"d_sae": sae.d_sae, "k": sae.k}
    kind = sae.architecture.replace("_skip_transcoder", "_transcoder")
    if kind in ARCHITECTURES:
        found["architecture"] = kind
    if kind in TRANSCODERS:
        found |= {"hook_name_out": sae.hook_name_out, "skip": kind != sae.architecture}
    given = sae.config or {}
    for name in ("l1_coefficient", "l0_coefficient", "matryoshka_widths"):
        if given.get(name) is not None:
            found[name] = ", ".join(map(str, given[name])) if isinstance(given[name], list) else given[name]
    found["source"] = _source_for(sae)
    return {name: value for name, value in found.items() if value not in (None, "")}


def context_size(sae: SAE) -> int | None:
    """How many tokens its training contexts had, where its config tells."""
    given = sae.config or {}
    found = given.get("context_size") or (given.get("metadata") or {}).get("context_size")
    return found if isinstance(found, int) else None


def _source_for(sae: SAE) -> str:
    """The capture that holds the SAE's hook point, of contexts of its length if there is one; "" if there is none."""
    hooks = [name for name in (sae.hook_name, sae.hook_name_out) if name]
    rows = list(Capture.objects.ready().filter(model=sae.model, hook_names__contains=hooks).order_by("-pk"))
    length = context_size(sae)
    rows.sort(key=lambda row: row.context_length != length)
    return f"{rows[0].pk}:{sae.hook_name}" if rows else ""
