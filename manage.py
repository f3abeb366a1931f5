#!/usr/bin/env python
"""Django's command line for SAEHub."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "saehub.settings")
    if sys.argv[1:2] == ["work"]:
        prepare_worker(sys.argv[2:])
    try:
        from django.core.management import execute_from_command_line
    except ImportError as error:
        raise SystemExit(f"Django is not installed in this Python ({error}). Run `make install` first.") from error
    execute_from_command_line(sys.argv)


def prepare_worker(words: list[str]) -> None:
    """What has to be said before anything is imported: django-q2 reads the name of its queue while Django starts, OpenMP
    how its threads wait when torch is loaded.

    Several processes compute at once, and threads that spin while they wait take the cores from each other: with 12 runnable
    processes on 2 cores, 0.25 tokens/s generated like that and 4.1 with threads that sleep.
    """
    os.environ["Q_CLUSTER_NAME"] = next((word for word in words if not word.startswith("-")), "")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    main()
