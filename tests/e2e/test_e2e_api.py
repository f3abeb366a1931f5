"""The ten lines of docs/api.md, word for word, against a running site with its workers."""

from __future__ import annotations

import ast
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.utils import timezone

from concepts.models import Label
from inference.models import Generation, Inference
from saehub.accounts.models import APIToken
from saes.models import LanguageModel
from tests.conftest import ROOT, TEXT, make_user, wait_for
from training.models import Corpus, Run


def example() -> str:
    """The first Python block of the page."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M | re.S)
    return str(blocks[0])


def test_the_documented_example_does_the_whole_way(site: str, tiny_model_dir: Path, capsys: Any) -> None:
    user = make_user("ada", "researcher")
    token = APIToken.make(user, "notebook", "write", timezone.now() + timedelta(days=1))[1]
    model = LanguageModel.objects.create(name="tiny", source="folder", location=str(tiny_model_dir), owner=user)
    model.start(user)
    wait_for(lambda: LanguageModel.objects.get(pk=model.pk).ready, 300, "the model to be added")
    corpus = Corpus.objects.create(name="sentences", source="text", location="s.txt", owner=user)
    corpus.folder.mkdir(parents=True, exist_ok=True)
    corpus.file.write_text(TEXT * 80, encoding="utf-8")
    corpus.start(user)
    wait_for(lambda: Corpus.objects.get(pk=corpus.pk).ready, 300, "the corpus to be read")
    code = example()
    assert len([line for line in code.splitlines() if line]) == 10 == len(ast.parse(code).body), (
        "ten lines, one statement each"
    )
    names: dict[str, Any] = {
        "API": f"{site}/api/v1", "TOKEN": token, "MODEL": model.pk, "LAYER": "blocks.1.hook_resid_post", "CORPUS": corpus.pk,
    }  # fmt: skip
    exec(compile(code, "docs/api.md", "exec"), names)  # noqa: S102
    names["api"].close()
    run, reading, made = Run.objects.get(), Inference.objects.get(), Generation.objects.get()
    assert run.sae_id == names["trained"]["sae_id"] and reading.ready and made.ready
    label = Label.objects.get()
    assert (label.sae_id, label.feature, label.text, label.accepted) == (
        run.sae_id,
        names["top"],
        "fires on Paris",
        True,
    )
    assert made.edits[0]["feature"] == names["top"] and made.steered["text"] != made.baseline["text"]
    assert names["steered"]["steered_text"] == made.steered["text"] in capsys.readouterr().out
