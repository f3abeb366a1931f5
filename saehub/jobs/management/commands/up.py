"""manage.py up: everything in one terminal. Migrates, makes a first admin, serves the site and its workers."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from itertools import chain, count
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser

from saehub.jobs.processes import end_with_parent, kill_tree

START_SECONDS = 60
STOP_SECONDS = 8


class Command(BaseCommand):
    help = "Run the site and its workers until Ctrl-C."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument(
            "--then", nargs="+", metavar="COMMAND", default=[], help="A management command to run once all is up."
        )
        parser.add_argument("--leave", action="store_true", help="Leave after that command, with its exit code.")

    def handle(self, *args: Any, **options: Any) -> None:
        self.over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self.over.set())
        end_with_parent(self.over.set)
        self.host, self.port = options["host"], options["port"]
        self.refuse_taken_port()
        call_command("migrate", verbosity=0)
        self.first_admin()
        web = ["web", "--host", self.host, "--port", str(self.port)]
        self.children = {
            " ".join(call): self.spawn(call) for call in [web, *(["work", queue] for queue in settings.QUEUES)]
        }
        code = 0
        try:
            self.wait_for_site()
            self.stdout.write(f"SAEHub is at http://{self.host}:{self.port} (Ctrl-C stops it)")
            if options["then"]:
                code = self.run_then(options["then"])
            if not options["leave"]:
                self.watch()
        finally:
            self.stop()
        if code:
            raise SystemExit(code)

    def refuse_taken_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise CommandError(
                    f"Port {self.port} of {self.host} is taken ({error.strerror}). Choose one: make up PORT=8001"
                ) from None

    def first_admin(self) -> None:
        """An account to begin with; its password is shown this once and stored only as a hash."""
        users = get_user_model().objects
        if users.filter(is_superuser=True).exists():
            return
        password = secrets.token_urlsafe(12)
        taken = set(users.filter(username__startswith="admin").values_list("username", flat=True))
        name = next(name for name in chain(["admin"], map("admin{}".format, count(2))) if name not in taken)
        user = users.create_superuser(name, password=password)
        user.groups.add(Group.objects.get(name="admin"))
        self.stdout.write(f"First account: {name}, password {password} (shown only now; change it under Account)")

    def spawn(self, call: list[str]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches only us, and we end the children in order.
        command = [sys.executable, str(settings.BASE_DIR / "manage.py"), *call, "--with-parent"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait_for_site(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and not self.over.is_set():
            try:
                connection = HTTPConnection(self.host, self.port, timeout=2)
                connection.request("GET", "/healthz", headers={"Host": "localhost"})
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.2)
        if not self.over.is_set():
            raise CommandError(f"The site did not answer within {START_SECONDS} s.")

    def run_then(self, call: list[str]) -> int:
        site = f"http://{self.host}:{self.port}"
        child = subprocess.Popen([sys.executable, str(settings.BASE_DIR / "manage.py"), *call, "--site", site])
        while child.poll() is None and not self.over.wait(0.2):
            self.keep_alive()
        if child.poll() is None:
            kill_tree(child.pid)
        return child.returncode if child.returncode is not None else 1

    def watch(self) -> None:
        while not self.over.wait(1):
            self.keep_alive()

    def keep_alive(self) -> None:
        for name, child in self.children.items():
            if child.poll() is not None:
                self.stderr.write(f"{name} ended with code {child.returncode}, starting it again")
                self.children[name] = self.spawn(name.split())

    def stop(self) -> None:
        for child in self.children.values():
            child.terminate()
        until = time.monotonic() + STOP_SECONDS
        for child in self.children.values():
            try:
                child.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                kill_tree(child.pid)
