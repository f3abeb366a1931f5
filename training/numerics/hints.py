"""What a run's history says is off, and the likely cure: plain numbers in, sentences out. Imports nothing but the
standard library, so that a page may ask."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

FEWEST = 8  # reports before anything is said
DEAD_SHARE = 0.1  # of the features
MANY_DEAD = 0.25  # of the features: worth a word even where they become no more
HIGH_RATE = 3  # times the usual learning rate
OFF_TARGET = 0.25  # of the target
SPIKE = 2.0  # times the median of the reports around it
FLAT = 0.002  # explained variance gained over the last third
STEADY = 0.1  # of L0
GAP = 0.1  # explained variance of the batch above that of held-out rows

History = Sequence[Mapping[str, Any]]


def hints(history: History, config: Mapping[str, Any], sae_config: Mapping[str, Any]) -> list[str]:
    """Sentences about a run, the most urgent first; none while there is nothing to say.

    history: the run's reports so far in order, each with the fields of train.StepReport (asdict of one, or a row with
    the same keys). config: the fields of TrainConfig that were set. sae_config: architecture, d_sae and k of the SAE.
    """
    if len(history) < FEWEST:
        return []
    sparsity = _sparsity(history, config, sae_config)
    plateau = "" if sparsity else _plateau(history, config)  # while L0 is off, what it costs says nothing
    found = (_spikes(history), _dead(history, config, sae_config), sparsity, _gap(history), plateau)
    return [sentence for sentence in found if sentence]


def usual_rate(d_sae: int) -> float:
    """The learning rate of a TrainConfig that names none."""
    return 1e-3 / math.sqrt(d_sae / 2**14)


def _spikes(history: History) -> str:
    """A loss far above that of the reports around it, after the first quarter."""
    losses = [report["loss"] for report in history]
    start = max(len(losses) // 4, 2)
    spikes = [i for i in range(start, len(losses)) if losses[i] > SPIKE * median(losses[max(i - 6, 0) : i + 3])]
    if not spikes:
        return ""
    step, often = history[spikes[-1]]["step"], f"{len(spikes)} times, last " if len(spikes) > 1 else ""
    return f"The loss jumped {often}at step {step:,}: lower the learning rate, or bound the gradient's norm."


def _dead(history: History, config: Mapping[str, Any], sae_config: Mapping[str, Any]) -> str:
    """Many dead features, and more of them than there were; or very many."""
    now, before, d_sae = history[-1]["dead"], history[len(history) // 2]["dead"], sae_config["d_sae"]
    climbs = now > 1.1 * before
    if now < (DEAD_SHARE if climbs else MANY_DEAD) * d_sae:
        return ""
    weight = config.get("aux_coefficient", 1 / 32)
    cure = "lower the learning rate or train fewer features"
    if not weight:
        high = (config.get("lr") or 0) > HIGH_RATE * usual_rate(d_sae)
        cure = "give the dead features' loss a weight" + (", and lower the learning rate" if high else "")
    if sae_config["architecture"] in ("standard", "gated", "jumprelu"):
        cure = f"lower the sparsity coefficient, or {cure}"
    course = "their number climbs" if climbs else "do not come back"
    return f"{now:,} of {d_sae:,} features are dead and {course}: {cure}."


def _sparsity(history: History, config: Mapping[str, Any], sae_config: Mapping[str, Any]) -> str:
    """L0 far from where it should end, in the second half of the run, when the penalty is no longer rising."""
    if _progress(history, config) < 0.5:
        return ""
    architecture, d_sae = sae_config["architecture"], sae_config["d_sae"]
    l0, k, target = fmean(report["l0"] for report in history[-4:]), sae_config.get("k"), config.get("target_l0")
    if k:
        few = l0 < (1 - OFF_TARGET) * k
        return (
            f"Only {l0:.0f} of k = {k:g} codes a token are above 0: k is larger than this SAE can use; choose a smaller "
            "one, or lower the learning rate."
            if few
            else ""
        )
    name = "l0_coefficient" if "jumprelu" in architecture else "l1_coefficient"
    if target:
        if abs(l0 - target) <= OFF_TARGET * target:
            return ""
        side = "above" if l0 > target else "below"
        return f"L0 is {l0:.0f}, far {side} its target of {target:g}: raise {name}, or train on more tokens."
    if l0 > DEAD_SHARE * d_sae:
        return f"L0 is {l0:.0f}, {l0 / d_sae:.0%} of all features, which is hardly sparse: raise {name}."
    return f"L0 is {l0:.1f}: the penalty has put nearly all features out; lower {name}." if l0 < 2 else ""


def _gap(history: History) -> str:
    """Training rows are explained much better than held-out ones."""
    last = [r for r in history[-4:] if r.get("held_out_explained_variance") is not None]
    if not last:
        return ""
    batch, held_out = (fmean(r[name] for r in last) for name in ("explained_variance", "held_out_explained_variance"))
    if batch - held_out < GAP:
        return ""
    return (
        f"The batches are explained to {batch:.0%} but held-out tokens to {held_out:.0%}: the same rows are read too "
        "often; capture more tokens, or train fewer features."
    )


def _plateau(history: History, config: Mapping[str, Any]) -> str:
    """Explained variance that no longer grows while the learning rate is still at its peak."""
    done = _progress(history, config)
    if not 0.3 <= done <= 1 - config.get("lr_decay", 0.2):
        return ""
    held = history[-1].get("held_out_explained_variance") is not None
    name = "held_out_explained_variance" if held else "explained_variance"
    values = [report[name] for report in history[-max(len(history) // 3, FEWEST) :]]
    half = len(values) // 2
    if _moves([report["l0"] for report in history[-len(values) :]]):
        return ""
    gained = fmean(values[half:]) - fmean(values[:half])
    noise = sum(abs(b - a) for a, b in pairwise(values)) / len(values) / half**0.5
    if gained > max(FLAT, noise):
        return ""
    return (
        f"Explained variance stands at {fmean(values[half:]):.3f} since step {history[-len(values)]['step']:,}: stop and "
        "keep this SAE, or train one with more features, a larger L0 or another learning rate."
    )


def _moves(values: Sequence[float]) -> bool:
    """Whether the second half is on average more than STEADY apart from the first: L0 that still falls takes explained
    variance along."""
    first, second = fmean(values[: len(values) // 2]), fmean(values[len(values) // 2 :])
    return abs(second - first) > STEADY * max(abs(first), 1e-9)


def _progress(history: History, config: Mapping[str, Any]) -> float:
    """The share of the run that is done."""
    if config.get("steps"):
        return float(history[-1]["step"] / config["steps"])
    return float(history[-1]["tokens"] / config.get("n_tokens", 1_000_000))
