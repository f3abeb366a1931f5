"""Loaded before Django's settings: the tests have a data folder and an embedded PostgreSQL of their own."""

import os
from pathlib import Path

root = Path(__file__).resolve().parent.parent
os.environ["SAEHUB_DATA"] = str(root / ".test-data")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SAEHUB_JOB_LEASE", "4")
