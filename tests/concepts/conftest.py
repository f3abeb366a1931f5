"""A small real capture and a view harvested from it."""

from pathlib import Path
from typing import Any

import pytest

from tests.steering_rows import rows, steering_files, view  # noqa: F401


@pytest.fixture(scope="session")
def llama(tiny_model_dir: Path) -> Any:
    from tests.tiny_models import tiny_lm

    return tiny_lm("llama", tiny_model_dir)


@pytest.fixture(scope="session")
def small_capture(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """About 2,900 tokens in contexts of 16 over several shards."""
    from tests.conftest import TEXT
    from tests.tiny_models import RESID
    from training.numerics.capture import capture
    from training.numerics.shards import open_capture
    from training.numerics.tokens import TokenPolicy

    folder = tmp_path_factory.mktemp("capture") / "one"
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) + " é😀" for i in range(40)]
    policy = TokenPolicy(context_length=16, prepend_bos=True)
    capture(llama, texts, [RESID, "blocks.0.attn.hook_z"], folder, policy=policy, shard_tokens=1000)
    return open_capture(folder)


@pytest.fixture(scope="session")
def sae() -> Any:
    from tests.tiny_models import tiny_sae

    return tiny_sae("topk")


@pytest.fixture(scope="session")
def view_dir(sae: Any, small_capture: Any, llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from concepts.numerics.harvest import harvest
    from tests.tiny_models import RESID

    folder = tmp_path_factory.mktemp("views") / "view"
    harvest(sae, small_capture, RESID, folder, k=4, per_interval=3, tokenizer=llama.tokenizer)
    return folder
