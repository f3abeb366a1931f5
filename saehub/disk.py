"""How much disk long work may fill."""

from __future__ import annotations

import shutil
from pathlib import Path

from django.conf import settings


def free_bytes(folder: Path | None = None) -> int:
    """What is free on the disk of a folder, the data folder where none is named, less the reserve that stays free."""
    return max(shutil.disk_usage(folder or settings.DATA_DIR).free - settings.DISK_RESERVE, 0)
