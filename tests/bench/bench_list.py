"""How long the server takes for the list of SAEs with 100,000 rows, by kind of request.

    python tests/bench/bench_list.py [--rows 100000] [--rounds 40]

A scratch database is made on the configured PostgreSQL and dropped at the end. Its rows are spread over models, layers,
sites and widths the way the public directory's are; some are here, some on their way, one in twenty has tags, and two
hundred have the user's star. Each request goes through the whole server (middleware, view, template) with a logged-in
user; the kinds take turns, so that what else the machine does hits them alike. Printed are the median and the 95th
percentile in milliseconds, and how many queries each request asked.
"""

# ruff: noqa: E402 - Django is set up before its models are imported
import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "saehub.settings")

import django

django.setup()

from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext, setup_databases, teardown_databases
from django.utils import timezone

from saehub.jobs.models import Job
from saes.models import SAE, Star

KINDS = {
    "plain": ["", "page=2", "page=3"],
    "facet": ["model=lab/model-3", "site=resid_post", "layer=12", "width=16384", "state=here", "model=lab/model-1&layer=3", "architecture=topk"],
    "search": ["q=model+7", "q=262k", "q=layer_12+l0_82", "q=resid", "q=release+9", "q=lab", "q=nothing"],
    "facet and search": ["q=16k&site=mlp_out", "q=lab&model=lab/model-2", "q=layer_1&state=none"],
    "L0 range": ["l0_min=50&l0_max=100", "l0_min=90", "l0_max=20&site=hook_z"],
    "sort": [
        f"sort={way}{key}" for key in ("name", "model", "architecture", "features", "l0", "ev", "size") for way in ("", "-")
    ],
    "facet and sort": ["model=lab/model-3&sort=-l0", "state=here&sort=name", "layer=12&sort=ev", "width=16384&sort=-size"],
    "tag, star": ["tag=paper", "tag=to-check&layer=12", "starred=1", "tag=v1&tag=v2&sort=-l0", "tag=–&model=lab/model-2", "tag=paper&starred=1"],
    "deep page": ["page=1000", "page=3999", "sort=name&page=2000", "sort=-l0&page=3000"],
}  # fmt: skip
TAGS = ("paper", "to-check", "v1", "v2", "layer-sweep", "bad", "gold", "demo")
WIDTHS = {"16k": 16384, "65k": 65536, "262k": 262144, "1m": 1048576}
SITES = {
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "hook_z": "attn.hook_z",
    "transcoder": "mlp.hook_in",
}


def fill(rows: int) -> None:
    draw = random.Random(0)
    now = timezone.now()
    jobs = Job.objects.bulk_create(
        Job(kind="download", queue="io", title=str(n), state=state)
        for n in range(20)
        for state in ("running", "failed")
    )
    made = []
    for n in range(rows):
        model, layer = n % 40, n // 40 % 48
        site, width = draw.choice(list(SITES)), draw.choice(list(WIDTHS))
        l0 = draw.randrange(5, 200)
        path = f"{site}/layer_{layer}_width_{width}_l0_{l0}_{n}"
        made.append(
            SAE(
                name=f"release-{model}/{path}", sae_id=path, source="hub", model_name=f"lab/model-{model}", repo_id=f"lab/saes-{model}",
                repo_path=path, site=site, layer=layer, hook_name=f"blocks.{layer}.{SITES[site]}", d_sae=WIDTHS[width],
                architecture=draw.choice(["jumprelu", "jumprelu", "topk"]), published_l0=l0 if n % 8 else None,
                ready_at=now if n % 50 == 0 else None, l0=l0 + 0.5 if n % 50 == 0 else None, size_bytes=n * 1000,
                job=jobs[n // 2500] if n % 2500 == 1 else None, aliases=[], facts={},
                tags=sorted(draw.sample(TAGS, draw.choice([1, 1, 2, 3]))) if n % 20 == 0 else [],
            )
        )  # fmt: skip
    SAE.objects.bulk_create(made, batch_size=2000)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE saes_sae")


def measure(rounds: int) -> None:
    import saehub.asgi  # noqa: F401 - the process is then as the site's: what it imported is out of the collector's sight

    user = User.objects.create_superuser("bench")
    Star.objects.bulk_create(
        Star(user=user, sae_id=pk) for pk in SAE.objects.order_by("pk").values_list("pk", flat=True)[::500]
    )
    client = Client(SERVER_NAME="localhost")
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    for fresh in (True, False):
        print("counted anew for every request" if fresh else "counts remembered since the last write")
        of_all_kinds(client, rounds, fresh)


def changed() -> None:
    """What a write does to remembered counts, without the write."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE saes_sae SET notes = notes WHERE false")


def of_all_kinds(client: Client, rounds: int, fresh: bool) -> None:
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    queries: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for turn in range(-2, rounds):
        for kind, asked in KINDS.items():
            query = asked[turn % len(asked)]
            if fresh:
                changed()
            began = time.perf_counter()
            answer = client.get(f"/saes/?{query}")
            spent = (time.perf_counter() - began) * 1000
            assert answer.status_code == 200, query
            if turn >= 0:
                times[kind].append(spent)
            else:
                if fresh:
                    changed()
                with CaptureQueriesContext(connection) as seen:
                    client.get(f"/saes/?{query}")
                queries[kind].add(len(seen))
    print(f"{SAE.objects.count():,} SAEs, {rounds} requests of each kind")
    print(f"{'':18}{'median ms':>11}{'95 % ms':>11}   queries")
    every: list[float] = []
    for kind, spent in times.items():
        every += spent
        line = f"{statistics.median(spent):11.1f}{statistics.quantiles(spent, n=20)[-1]:11.1f}"
        print(f"{kind:18}{line}   {'-'.join(map(str, sorted(queries[kind])))}")
    print(f"{'all of them':18}{statistics.median(every):11.1f}{statistics.quantiles(every, n=20)[-1]:11.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    made = setup_databases(verbosity=0, interactive=False)
    try:
        fill(given.rows)
        measure(given.rounds)
    finally:
        teardown_databases(made, verbosity=0)


if __name__ == "__main__":
    main()
