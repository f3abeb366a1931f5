"""How long the server takes for pages of features of a wide SAE: python tests/bench/bench_features.py [FEATURES]

Makes a view of 131,072 features (a real harvest of a random SAE of that width; logits, neighbours and directions of 768
numbers random, of their true size) and two SAE rows on it in a database of its own, and times the views through Django's client without a network:
best and median of the rounds, the first request (cold maps) apart.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FEATURES = int(sys.argv[1]) if len(sys.argv) > 1 else 131_072
ROUNDS, D, CONTEXT, CONTEXTS, WORDS = 20, 16, 128, 480, 50_000
D_OUT = 768  # of the directions
HOOK = "blocks.0.hook_resid_post"


class Words:
    """As much of a tokenizer as a harvest asks for: words without control tokens."""

    added_tokens_decoder: dict[int, str] = {}
    all_special_ids: list[int] = []
    unk_token_id = bos_token_id = eos_token_id = None
    backend_tokenizer = None

    def __len__(self) -> int:
        return WORDS

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"▁word{i}" for i in ids]


def make_view(folder: Path) -> None:
    import numpy as np
    import torch

    from concepts.numerics.harvest import harvest
    from saes.numerics.architectures import build_sae
    from saes.numerics.sae import SAEConfig
    from training.numerics.shard_writer import ShardWriter
    from training.numerics.shards import open_capture, write_json

    generator = torch.Generator().manual_seed(0)
    sae = build_sae(SAEConfig("topk", D, FEATURES, hook_name=HOOK, k=32)).requires_grad_(False)
    policy = {"context_length": CONTEXT, "prepend_bos": True}
    facts = {"policy": policy, "hook_points": [{"name": HOOK, "d": D}], "dtype": "float32", "held_out_fraction": 0.05,
             "run_id": "bench", "model": "bench", "dataset": "random"}  # fmt: skip
    writer = ShardWriter(folder / "capture", facts, {HOOK: D}, "float32", 2**14)
    for first in range(0, CONTEXTS, 32):
        ids = torch.randint(0, WORDS, (32, CONTEXT), generator=generator).numpy()
        x = torch.randn(32 * CONTEXT, D, generator=generator)
        writer.add(ids, np.ones((32, CONTEXT), bool), {HOOK: x}, np.arange(first, first + 32), first + 31)
    writer.finish()
    began = time.perf_counter()
    harvest(sae, open_capture(folder / "capture"), HOOK, folder / "view", k=20, tokenizer=Words())
    print(f"harvest of {FEATURES:,} features over {CONTEXTS * CONTEXT:,} tokens: {time.perf_counter() - began:.1f} s")
    rng = np.random.default_rng(0)
    for name, width, top in (("logits_pos", 10, WORDS), ("logits_neg", 10, WORDS), ("neighbour", 50, FEATURES)):
        np.save(folder / f"view/{name}_ids.npy", rng.integers(0, top, (FEATURES, width), dtype=np.int32))
        values = np.sort(rng.random((FEATURES, width), dtype=np.float32), axis=1)[:, ::-1]
        np.save(folder / f"view/{name}_{'cosines' if name == 'neighbour' else 'values'}.npy", values)
    np.save(folder / "view/decoder_norm.npy", np.ones(FEATURES, np.float32))
    directions = rng.standard_normal((FEATURES, D_OUT), dtype=np.float32)
    np.save(
        folder / "view/directions.npy", (directions / np.linalg.norm(directions, axis=1)[:, None]).astype(np.float16)
    )
    np.save(folder / "view/logits_histogram.npy", rng.integers(0, 9, (FEATURES, 50), dtype=np.int32))
    lens = {"logits": True, "how": "random, for the benchmark", "model": "bench", "version": 2}
    write_json(folder / "view/logit_lens.json", lens)


def main(folder: Path) -> None:
    os.environ |= {"DJANGO_SETTINGS_MODULE": "saehub.settings", "SAEHUB_DATA": str(folder / "data")}
    os.environ.pop("DATABASE_URL", None)
    import django

    django.setup()
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.test import Client
    from django.test.utils import setup_test_environment
    from django.utils import timezone

    from concepts.models import FeatureView
    from saes.models import SAE, LanguageModel
    from training.models import Capture, Corpus

    setup_test_environment()
    call_command("migrate", verbosity=0)
    make_view(folder)
    now, user = timezone.now(), User.objects.create_superuser("bench")
    model = LanguageModel.objects.create(name="bench", source="folder", location="bench", ready_at=now, hook_points=[])
    corpus = Corpus.objects.create(name="random", source="text", location="random", ready_at=now)
    capture = Capture.objects.create(
        name="random",
        model=model,
        corpus=corpus,
        hook_names=[HOOK],
        context_length=CONTEXT,
        ready_at=now,
        manifest={"norms": {HOOK: 4.0}},
    )
    saes, views = [], []
    for name in ("other", "wide"):
        facts = {"model_name": "bench", "hook_name": HOOK, "d_in": D, "d_sae": FEATURES, "path": f"sae/{name}"}
        saes.append(SAE.objects.create(name=name, model=model, ready_at=now, **facts))
        counts = {"n_tokens": CONTEXTS * CONTEXT, "alive": 1, "dead": 1}
        views.append(FeatureView.objects.create(name=name, sae=saes[-1], capture=capture, ready_at=now, **counts))
    (other, sae), (copy, view) = saes, views
    view.folder.parent.mkdir(parents=True)
    (folder / "view").rename(view.folder)
    copy.folder.symlink_to(view.folder)
    client = Client()
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    alive = view.opened().sorted("n_fires")[:ROUNDS].tolist()
    base = f"/saes/{sae.pk}/features/"
    pages = {
        "feature page": [f"{base}{i}/" for i in alive],
        "feature page, whole contexts": [f"{base}{i}/?around=full" for i in alive],
        "list": [f"{base}?page={i + 1}" for i in range(ROUNDS)],
        "list by density": [f"{base}?sort=-density&page={i + 1}" for i in range(ROUNDS)],
        "list by top token": [f"{base}?sort=token&page={i + 1}" for i in range(ROUNDS)],
        "list by label": [f"{base}?sort=label&page={i + 1}" for i in range(ROUNDS)],
        "list, alive, of a token": [f"{base}?state=alive&token=word{i}" for i in range(ROUNDS)],
        "features that raise a token": [f"/features/?by=raises&q=word{i}" for i in range(ROUNDS)],
        "features like another": [f"/features/?by=like&q={sae.pk}/{i}" for i in alive],
        "like another, in another SAE": [f"/features/?by=like&q={sae.pk}/{i}&in={other.pk}" for i in alive],
    }
    for name, urls in pages.items():
        times = []
        for url in [urls[0], *urls]:
            began = time.perf_counter()
            status = client.get(url).status_code
            times.append(1000 * (time.perf_counter() - began))
            assert status == 200, (url, status)
        print(
            f"{name:30} first {times[0]:7.1f} ms   best {min(times[1:]):6.1f} ms   median {statistics.median(times[1:]):6.1f} ms"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
