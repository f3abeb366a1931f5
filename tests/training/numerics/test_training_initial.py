"""First weights as a choice: each peer's, what follows from the first batch, and that training goes on from there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saes.numerics.architectures import build_sae
from saes.numerics.sae import SAE, SAEConfig
from training.numerics.checkpoint import TrainingError
from training.numerics.initial import INITIALIZATIONS, begin, geometric_median
from training.numerics.train import TrainConfig, Training, train

D_IN, D_SAE, K, SEED = 24, 96, 4, 7
SCRIPT = Path(__file__).with_name("initial_peer.py")
KINDS = [(whose, kind) for whose, kinds in INITIALIZATIONS.items() for kind in kinds]


def an_sae(architecture: str, seed: int = 0) -> SAE:
    options: dict[str, Any] = {}
    if architecture == "matryoshka":
        architecture, options = "batchtopk", {"matryoshka_widths": [32, D_SAE]}
    k = K if "topk" in architecture else None
    return build_sae(SAEConfig(architecture, D_IN, D_SAE, k=k, options=options), seed=seed)


def rows(n: int = 4096) -> torch.Tensor:
    """Activations with a mean and directions of different sizes, made of few sources."""
    made = torch.Generator().manual_seed(1)
    sources = torch.randn(40, D_IN, generator=made)
    codes = torch.rand(n, 40, generator=made) * (torch.rand(n, 40, generator=made) < 0.1)
    return codes @ sources + 0.5 * torch.randn(D_IN, generator=made)


def batches(x: torch.Tensor) -> Any:
    return lambda start: iter(x[start:].split(256))


@pytest.mark.parametrize(("whose", "kind"), KINDS)
def test_training_begins_there_and_learns(whose: str, kind: str) -> None:
    x, sae = rows(), an_sae(kind)
    before = {name: tensor.clone() for name, tensor in sae.named_parameters()}
    config = TrainConfig(steps=16, batch_size=256, lr=2e-3, initialization=whose, seed=SEED, log_every=1)
    again = Training(an_sae(kind, seed=5), config).sae
    history = train(sae, batches(x), config).history
    assert not torch.equal(again.W_dec, before["W_dec"]), "what build_sae made is replaced"
    begun = an_sae(kind)
    begin(begun, whose, torch.Generator().manual_seed(SEED))
    assert torch.equal(again.W_dec, begun.W_dec) and torch.equal(again.W_enc, begun.W_enc), "by the config's seed"
    assert history[-1].explained_variance > history[0].explained_variance
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE), msg="saved with rows of norm 1, as any")


def test_what_the_first_batch_sets() -> None:
    x = rows(512)
    found = {}
    for whose in (None, *INITIALIZATIONS):
        sae = an_sae("topk")
        Training(sae, TrainConfig(steps=1, initialization=whose)).prepared(x)
        found[whose] = sae.b_dec.detach().clone()
    torch.testing.assert_close(found[None], x.mean(0))
    torch.testing.assert_close(found["sparsify"], x.mean(0))
    assert not found["saelens"].any()
    distance = {name: float((x - point).norm(dim=-1).sum()) for name, point in found.items()}
    assert distance["dictionary_learning"] < distance[None], "the median is nearer to the points than the mean is"
    norm = float(x.norm(dim=-1).mean())
    for whose, expected in (("saelens", 0.01 * norm / D_IN**0.5), ("dictionary_learning", 0.001 * norm)):
        sae = an_sae("jumprelu")
        Training(sae, TrainConfig(steps=1, initialization=whose)).prepared(x)
        assert float(sae.tensor("threshold")[0].detach()) == pytest.approx(expected, rel=0.05)


def test_the_median_survives_points_that_lie_on_it() -> None:
    points = torch.cat([torch.ones(9, 3), torch.tensor([[50.0, 0, 0]])])
    torch.testing.assert_close(geometric_median(points), torch.ones(3), atol=1e-3, rtol=0)


def test_a_checkpoint_goes_on_instead_of_beginning_again(tmp_path: Path) -> None:
    x = rows()
    config = TrainConfig(steps=12, batch_size=256, initialization="saelens", seed=SEED, checkpoint_every=5)
    whole, halves = an_sae("topk"), an_sae("topk")
    train(whole, batches(x), config)
    asked = iter([False] * 7 + [True])
    assert train(halves, batches(x), config, checkpoint_dir=tmp_path, should_stop=lambda: next(asked)).stopped
    halves = an_sae("topk", seed=3)
    train(halves, batches(x), config, checkpoint_dir=tmp_path)
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, halves.get_parameter(name)), name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"initialization": "theirs"}, "choose one of saelens, sparsify, dictionary_learning"),
        ({"initialization": "saelens", "decoder": "unit"}, "SAELens begins with decoder rows of norm 0.1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        TrainConfig(**given)


def test_a_peer_that_does_not_train_the_architecture_is_refused() -> None:
    with pytest.raises(TrainingError, match="sparsify trains no jumprelu SAE"):
        Training(an_sae("jumprelu"), TrainConfig(initialization="sparsify"))


# ---------------------------------------------------------------------------------------------------- the peers' own


@pytest.fixture(scope="module")
def begun(ask_peers: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each peer begins with."""
    folder = tmp_path_factory.mktemp("begun")
    ask_peers(SCRIPT, folder)
    return folder


@pytest.mark.parametrize("whose", INITIALIZATIONS)
def test_the_weights_are_those_of_the_peers_own_class(whose: str, begun: Path) -> None:
    """Drawn from the same state of the same generator they are equal, number by number."""
    folder = begun / whose
    if not folder.is_dir():
        pytest.skip(f"needs {whose} beside SAELens: make peers")
    kinds = ["topk"] if whose == "sparsify" else [*INITIALIZATIONS[whose], "matryoshka"]
    for kind in kinds:
        theirs, sae = load_file(folder / f"{kind}.safetensors"), an_sae(kind)
        generator = torch.Generator()
        generator.set_state(theirs["state"])
        begin(sae, whose, generator)
        torch.testing.assert_close(sae.W_enc, theirs["W_enc"], msg=lambda text, kind=kind: f"{kind}: {text}")
        torch.testing.assert_close(sae.W_dec, theirs["W_dec"], msg=lambda text, kind=kind: f"{kind}: {text}")
        for name in {"b_enc", "b_dec", "b_gate", "b_mag", "r_mag"} & theirs.keys():
            assert not theirs[name].any() and not sae.tensor(name).any(), name
    if whose == "dictionary_learning":
        median = load_file(folder / "median.safetensors")
        torch.testing.assert_close(geometric_median(median["x"]), median["median"])
