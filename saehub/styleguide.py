"""What the page of components (/style/, in DEBUG) shows: a form with errors, token texts, charts; figures made up."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from django import forms
from django.utils import timezone

from saehub.charts import curves, density_histogram, histogram

_TEXTS = [
    (" the| file| cannot| be| opened|,| an| OS|Error| is| raised|.", {6: 1.2, 7: 9.9, 8: 18.4, 9: 8.1, 10: 13.2}),
    ("If| the| attribute| is| not| found|,\n|\t|an| Attribute|Error| is| <b>", {5: 2, 8: 0.3, 9: 11, 10: 17.9, 11: 6}),
    ("لم| يتم| العثور| على| الملف| 文件|<0xE6>|<0x9C>|不存在", {1: 4.0, 5: 16.2, 6: 7.5, 8: -3.0}),
]  # fmt: skip


class SampleForm(forms.Form):
    """Every kind of field; `advanced` names those under the fold."""

    advanced = ("decay", "dtype")
    name = forms.CharField(label="Name", help_text="Shown in lists; letters, digits and dashes.")
    capture = forms.ChoiceField(label="Capture", choices=[(1, "python docs, 111,482 tokens"), (2, "stories")])
    k = forms.IntegerField(label="k, features a token", min_value=1)
    rate = forms.FloatField(label="Learning rate", initial="3e-4")
    hooks = forms.MultipleChoiceField(
        label="Hook points",
        choices=[(n, f"blocks.{n}.hook_resid_post") for n in (3, 9, 15)],
        widget=forms.CheckboxSelectMultiple,
    )
    notes = forms.CharField(label="Notes", required=False, widget=forms.Textarea(attrs={"rows": 3}))
    corpus = forms.FileField(label="Text file, at most 512 MB", required=False)
    resume = forms.BooleanField(label="Go on from the last checkpoint", required=False)
    decay = forms.FloatField(label="Decay over the last, % of steps", initial=20)
    dtype = forms.ChoiceField(label="Stored as", choices=[("float32", "float32"), ("bfloat16", "bfloat16")])


def _examples() -> list[dict[str, Any]]:
    examples = []
    for text, active in _TEXTS:
        tokens = text.split("|")
        values = [active.get(i, 0.0) for i in range(len(tokens))]
        peak = max(range(len(values)), key=values.__getitem__)
        examples.append({"tokens": tokens, "activations": values, "peak": peak, "value": values[peak]})
    return examples


def _charts() -> dict[str, Any]:
    tokens = list(range(0, 1_480_000, 20_000))
    loss = [0.42 + 0.9 * math.exp(-t / 2.2e5) + 0.008 * math.sin(t) for t in tokens]
    held = [value + 0.02 if i % 6 == 0 else None for i, value in enumerate(loss)]
    return {
        "loss": curves(
            tokens,
            {"train": loss, "held out": held},
            title="Loss",
            x_title="tokens",
            y_title="squared error",
            n="1 batch",
        ),
        "ev": curves(
            tokens,
            {"explained variance": [1 - value / 1.4 for value in loss]},
            title="Explained variance",
            x_title="tokens",
            n="16,384 held-out tokens",
            y_domain=(0, 1),
        ),
        "dead": curves(
            tokens,
            {"dead": [900 * math.exp(-t / 3e5) for t in tokens]},
            title="Dead",
            x_title="tokens",
            y_title="features",
        ),
        "activations": histogram(
            [int(1000 * 0.87**i) for i in range(50)],
            [18.4 * i / 50 for i in range(51)],
            title="Activations",
            x_title="activation",
            n="468 tokens",
        ),
        "density": density_histogram(
            [int(600 * math.exp(-((i - 11) ** 2) / 9)) for i in range(20)],
            [-5 + i / 4 for i in range(21)],
            dead=61,
            n="111,482 tokens",
        ),
    }


def samples() -> dict[str, Any]:
    """Made-up contents for every component that the style page shows."""
    data = {
        "name": "docs layer 9",
        "capture": 1,
        "k": "0",
        "rate": "fast",
        "hooks": [9],
        "decay": "x",
        "dtype": "float32",
    }
    now = timezone.now()
    return {
        "form": SampleForm(data),
        "examples": _examples(),
        "charts": _charts(),
        "newline": "\n\n",
        "swatch": [f"a{i}" for i in range(1, 21)],
        "just": now - timedelta(seconds=3),
        "earlier": now - timedelta(minutes=4, seconds=10),
        "silent": now - timedelta(seconds=42),
    }
