"""The form of a training run. Torch-free: the trainer's own checks come again in the job."""

from __future__ import annotations

from typing import Any

from django import forms
from django.utils.text import slugify

from saes.fields import NewRow
from training.estimates import RunEstimate, estimate_run
from training.models import Capture, Run

EXPANSION = 8  # features per dimension when none are named
ARCHITECTURES = {
    "topk": "TopK: the k largest features of each token",
    "batchtopk": "BatchTopK: k features a token on average, over the batch",
    "jumprelu": "JumpReLU: every feature learns its threshold",
    "gated": "Gated: one path decides which features fire, another how strongly",
    "standard": "ReLU, sparse by an L1 penalty",
}
ARCHITECTURE_FIELDS = {  # what each of them is asked, beside what all are
    "topk": ("k",),
    "batchtopk": ("k", "matryoshka_widths"),
    "jumprelu": ("l0_coefficient", "target_l0", "l1_warmup"),
    "gated": ("l1_coefficient", "l1_warmup"),
    "standard": ("l1_coefficient", "l1_warmup"),
}


class RunForm(NewRow):
    """An SAE to train: on what, of which kind and size, for how long."""

    source = forms.ChoiceField(label="Capture and hook point")
    architecture = forms.ChoiceField(
        choices=list(ARCHITECTURES.items()), initial="topk", widget=forms.RadioSelect, label="Architecture"
    )
    k = forms.IntegerField(min_value=1, initial=32, label="k, features per token")
    l1_coefficient = forms.FloatField(min_value=0, initial=2.0, label="L1 coefficient")
    l0_coefficient = forms.FloatField(
        min_value=0, initial=1.0, label="L0 coefficient", help_text="Weight of the number of features that fire"
    )
    target_l0 = forms.FloatField(
        required=False,
        min_value=0.01,
        max_value=10**6,
        label="Target L0, features per token",
        help_text="With it the penalty is on the distance from it",
    )
    matryoshka_widths = forms.CharField(
        required=False,
        max_length=200,
        label="Nested widths, features",
        help_text="Such as 512, 2048: the first so many features must do by themselves. Not nested when empty",
    )
    d_sae = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=2**20,
        label="Features (d_sae)",
        help_text=f"{EXPANSION} times the width of the hook point when empty",
    )
    n_tokens = forms.IntegerField(min_value=1, max_value=10**12, initial=1_000_000, label="Tokens to train on")
    evaluate_after = forms.BooleanField(required=False, initial=True, label="Then evaluate on held-out tokens")
    harvest_after = forms.BooleanField(
        required=False, initial=True, label="Then harvest the top texts of every feature"
    )
    batch_size = forms.IntegerField(min_value=1, max_value=2**20, initial=2048, label="Batch size, tokens")
    lr = forms.FloatField(
        required=False,
        min_value=1e-8,
        max_value=1,
        label="Learning rate",
        help_text="1e-3 / √(features / 16,384) when empty",
    )
    seed = forms.IntegerField(min_value=0, max_value=2**31 - 1, initial=0, label="Seed")
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
        required=False, min_value=0, label="Gradient norm at most", help_text="Not limited when empty"
    )
    advanced = [
        "name", "batch_size", "lr", "seed", "lr_warmup", "lr_decay", "l1_warmup", "matryoshka_widths", "aux_coefficient",
        "dead_after_tokens", "clip",
    ]  # fmt: skip
    only_with = {
        name: ("architecture", tuple(key for key, names in ARCHITECTURE_FIELDS.items() if name in names))
        for names in ARCHITECTURE_FIELDS.values()
        for name in names
    }
    trainer_fields = (
        "n_tokens", "batch_size", "lr", "seed", "lr_warmup", "lr_decay", "aux_coefficient", "dead_after_tokens", "clip",
    )  # fmt: skip

    class Meta:
        model = Run
        fields = ("name", "architecture", "evaluate_after", "harvest_after")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.captures = {
            row.pk: row for row in Capture.objects.ready().select_related("model", "corpus").order_by("-pk")[:200]
        }
        source: Any = self.fields["source"]
        source.choices = [("", "Choose a capture")] * (len(self.captures) > 1) + [
            (f"{row.pk}:{hook}", f"{row.name} · {hook} · {row.n_tokens:,} tokens")
            for row in self.captures.values()
            for hook in row.hook_names
        ]
        source.error_messages["invalid_choice"] = "That capture does not hold this hook point; choose one of the list."

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if not data.get("source"):
            return data
        key, _, hook = data["source"].partition(":")
        self.instance.capture, self.instance.hook_name = self.captures[int(key)], hook
        d_in = self.instance.capture.d_in(hook) or 0
        if "d_sae" not in self.errors:
            data["d_sae"] = data.get("d_sae") or EXPANSION * d_in
            self._check_architecture(data)
            self._check_size(data)
        self.check_name(lambda: self._default_name(data))
        return data

    def _check_architecture(self, data: dict[str, Any]) -> None:
        if data.get("architecture") == "batchtopk" and data.get("matryoshka_widths"):
            data["matryoshka_widths"] = self._widths(data["matryoshka_widths"], data["d_sae"])
        if self.asks_for("k") and (data.get("k") or 0) > data["d_sae"]:
            self.add_error(
                "k", f"k is {data['k']:,}, but the SAE has only {data['d_sae']:,} features; choose a smaller k."
            )

    def _widths(self, text: str, d_sae: int) -> list[int] | None:
        """The nested widths that a text of numbers means, d_sae last."""
        words = text.replace(",", " ").split()
        numbers = [int(word) for word in words if word.isdecimal() and len(word) < 10]
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
                f"Checkpoints of {data['d_sae']:,} features take {estimate.disk / 1e9:.1f} GB and the disk has "
                f"{estimate.free / 1e9:.1f} GB to spare; choose fewer features or free some space.",
            )

    def _default_name(self, data: dict[str, Any]) -> str:
        model, hook = self.instance.capture.model, self.instance.capture.model.hook(self.instance.hook_name)
        place = f"layer{hook['layer']}" if hook and hook["layer"] is not None else slugify(self.instance.hook_name)
        return f"{slugify(model.name)}-{place}-{_kind(data)}-{data.get('d_sae')}"

    def estimate_of(self, data: dict[str, Any]) -> RunEstimate | None:
        key, _, hook = str(data.get("source") or "").partition(":")
        capture = self.captures.get(int(key)) if key.isdigit() else None
        if capture is None or not data.get("n_tokens"):
            return None
        d_sae = data.get("d_sae") or EXPANSION * (capture.d_in(hook) or 0)
        return estimate_run(capture, hook, data.get("architecture") or "topk", d_sae, data["n_tokens"])

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

    def save(self, commit: bool = True) -> Run:
        self.instance.config = self.config()
        return super().save(commit)

    def config(self) -> dict[str, Any]:
        """What the job builds the SAE and its TrainConfig from."""
        data = self.cleaned_data
        names = ["d_sae", *ARCHITECTURE_FIELDS[data["architecture"]], *self.trainer_fields]
        return {name: data[name] for name in names if data[name] not in (None, "")}


def _kind(data: dict[str, Any]) -> str:
    """The part of a name that says what is trained."""
    architecture = data.get("architecture")
    if architecture in ("topk", "batchtopk"):
        nested = "matryoshka-" if architecture == "batchtopk" and data.get("matryoshka_widths") else ""
        return f"{nested}{architecture}{data.get('k')}"
    if architecture == "jumprelu":
        target = data.get("target_l0")
        return f"jumprelu-{f'l0-{target:g}' if target else data.get('l0_coefficient')}"
    return f"{'relu' if architecture == 'standard' else architecture}-l1-{data.get('l1_coefficient')}"


def like(run: Run) -> dict[str, Any]:
    """Initial values of a RunForm that trains the same again."""
    widths = {"matryoshka_widths": ", ".join(str(width) for width in run.config.get("matryoshka_widths", ()))}
    return (
        run.config
        | widths
        | {
            "source": f"{run.capture_id}:{run.hook_name}",
            "architecture": run.architecture,
            "evaluate_after": run.evaluate_after,
            "harvest_after": run.harvest_after,
        }
    )
