"""README says of every setting what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from django.conf import settings

from saehub.environment import KNOBS

README = Path(settings.BASE_DIR, "README.md")
ROW = re.compile(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? ?\| (.+) \|$", re.MULTILINE)


def test_the_table_of_settings() -> None:
    told = {name: (default, help) for name, default, help in ROW.findall(README.read_text(encoding="utf-8"))}
    known = {knob.name: (knob.default, knob.help) for knob in KNOBS}
    assert told.keys() == known.keys()
    assert {name: help for name, (_, help) in told.items()} == {name: help for name, (_, help) in known.items()}
    folders = {"SAEHUB_DATA", "SAEHUB_IMPORT_DIRS"}  # theirs stand in README as below the project's folder
    assert {name: told[name][0] for name in told if name not in folders} == {
        name: default for name, (default, _) in known.items() if name not in folders
    }
