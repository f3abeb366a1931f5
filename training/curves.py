"""What a run's page shows of its points: curves, the newest figures with what they mean, and the way to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saehub import charts
from saehub.figures import bytes_text, count_text, exact_text, fig_text, percent_text, rate_text
from training.models import Run, RunPoint, Sweep
from training.sweep_form import AXES

VARIANCE = "1 − E|x − x̂|² / (E|x|² − |E x|²)"


@dataclass(frozen=True)
class Figure:
    label: str
    shown: str
    meaning: str


def curves(run: Run, points: Sequence[RunPoint]) -> list[charts.Chart]:
    """Loss with its parts, explained variance, L0 and dead features against tokens; none before the first point."""
    if not points:
        return []
    tokens = [point.tokens for point in points]
    batch = f"{count_text(run.config.get('batch_size', 2048))} tokens a point"
    d_sae = exact_text(run.config.get("d_sae"))

    def series(**keys: str) -> dict[str, list[Any]]:
        return {label.replace("_", " "): [point.values.get(key) for point in points] for label, key in keys.items()}

    return [
        charts.curves(tokens, _losses(points), title="Loss", x_title="tokens", n=batch),
        charts.curves(
            tokens,
            series(held_out="held_out_explained_variance", batch="explained_variance"),
            title="Explained variance",
            x_title="tokens",
            n="512 held-out tokens; the batch's own",
        ),
        charts.curves(tokens, series(L0="l0"), title="L0", x_title="tokens", y_title="features per token", n=batch),
        charts.curves(
            tokens,
            series(dead="dead"),
            title="Dead features",
            x_title="tokens",
            y_title=f"features, of {d_sae}",
            n="tokens so far",
        ),
    ]


def _losses(points: Sequence[RunPoint]) -> dict[str, list[Any]]:
    """The loss, and its parts where there are several that ever differ from nothing."""
    parts = sorted({name for point in points for name, value in point.values.get("parts", {}).items() if value})
    lines = {"loss": [point.values.get("loss") for point in points]}
    if len(parts) > 1:
        lines |= {name: [point.values.get("parts", {}).get(name) for point in points] for name in parts[:3]}
    return lines


@dataclass(frozen=True)
class SweepRow:
    """A run in its sweep's table. `axes` are its values of what the runs differ in; figures of its evaluation where
    there is one, else of its last point."""

    run: Run
    axes: list[Any]
    step: int
    tokens: int
    loss: float | None
    l0: float | None
    explained_variance: float | None
    dead: int | None
    evaluated: bool


def sweep_rows(sweep: Sweep) -> list[SweepRow]:
    """The runs of a sweep as they stand, in two queries however many they are."""
    runs = list(sweep.runs.select_related("job", "sae").order_by("pk"))
    newest = RunPoint.objects.filter(run__sweep=sweep).order_by("run_id", "-step").distinct("run_id")
    last = {point.run_id: point for point in newest}
    return [_sweep_row(sweep, run, last.get(run.pk)) for run in runs]


def _sweep_row(sweep: Sweep, run: Run, point: RunPoint | None) -> SweepRow:
    values = point.values if point else {}
    evaluated = run.sae is not None and run.sae.explained_variance is not None
    given = run.config | {"hook_name": run.hook_name}
    return SweepRow(
        run=run,
        axes=[given.get(name) for name in AXES if name in sweep.grid],
        step=point.step if point else 0,
        tokens=point.tokens if point else 0,
        loss=values.get("loss"),
        l0=run.sae.l0 if evaluated and run.sae else values.get("l0"),
        explained_variance=run.sae.explained_variance
        if evaluated and run.sae
        else values.get("held_out_explained_variance", values.get("explained_variance")),
        dead=values.get("dead"),
        evaluated=evaluated,
    )


def pareto(sweep: Sweep, rows: Sequence[SweepRow]) -> charts.Chart | None:
    """L0 against explained variance, a point for each run; lines join the runs of one hook point and width."""
    known = [row for row in rows if row.l0 is not None and row.explained_variance is not None]
    if not known:
        return None
    names = [name for name in AXES if name in sweep.grid]
    along = [name for name in names if name in ("hook_name", "d_sae")]
    points = []
    for row in sorted(known, key=lambda row: row.l0 or 0):
        said = dict(zip(names, row.axes, strict=True))
        group = " · ".join(_said(name, said[name]) for name in along) or row.run.architecture
        label = " ".join(_said(name, said[name]) for name in names if name not in along)
        points.append((row.l0 or 0.0, row.explained_variance or 0.0, label, group))
    measured = sum(row.evaluated for row in known)
    return charts.scatter(
        points,
        title="L0 against explained variance",
        x_title="L0, features per token",
        y_title="explained variance",
        n=f"{len(known)} runs, {measured} of them evaluated on all held-out tokens"
        + (", the others by their last point" if measured < len(known) else ""),
        log_x=True,
    )


def _said(name: str, value: Any) -> str:
    short = {"d_sae": f"{count_text(value)} features", "hook_name": str(value)}
    return short.get(name, f"{name.split('_')[0]} {value}")


def now(run: Run, points: Sequence[RunPoint]) -> list[Figure]:
    """The newest figures."""
    if not points:
        return []
    values, d_sae = points[-1].values, run.config.get("d_sae") or 1
    dead = values.get("dead")
    share = f" ({percent_text(dead / d_sae)})" if dead is not None else ""
    return [
        Figure(
            "explained variance, held out",
            fig_text(values.get("held_out_explained_variance")),
            f"explained_variance: {VARIANCE}, on 512 held-out tokens",
        ),
        Figure(
            "explained variance, batch",
            fig_text(values.get("explained_variance")),
            f"explained_variance: {VARIANCE}, on the last batch",
        ),
        Figure(
            "expl. variance per dimension",
            fig_text(values.get("held_out_explained_variance_per_dimension")),
            "explained_variance_per_dimension: mean over dimensions of 1 − E(x_d − x̂_d)² / Var(x_d), 512 held-out tokens",
        ),
        Figure("L0", fig_text(values.get("l0")), "l0: features with acts_i ≠ 0 on a token, mean over the last batch"),
        Figure("loss", fig_text(values.get("loss")), "Of the last batch, before its update"),
        *(
            Figure(f"– {name}", fig_text(value), "A part of the loss")
            for name, value in values.get("parts", {}).items()
            if len(values["parts"]) > 1
        ),
        Figure(
            "cosine, held out",
            fig_text(values.get("held_out_cosine")),
            "cosine: mean of cos(x, x̂), 512 held-out tokens",
        ),
        Figure(
            "dead features",
            f"{exact_text(dead)}{share}",
            "Features that have not fired for so many tokens as the config says",
        ),
        Figure("learning rate", fig_text(values.get("lr"), 2), "Of Adam, with warm-up and decay"),
        Figure("speed", rate_text(values.get("tokens_per_second"), "tokens"), "Since the point before"),
        Figure("memory", bytes_text(values.get("memory")), "Resident in the process, or the most allocated on its GPU"),
        Figure("step", exact_text(points[-1].step), f"{exact_text(points[-1].tokens)} tokens"),
    ]


CONFIG_ORDER = (
    "d_sae", "k", "l1_coefficient", "n_tokens", "steps", "batch_size", "lr", "lr_warmup", "lr_decay", "l1_warmup",
    "aux_coefficient", "dead_after_tokens", "clip", "precision", "initialization", "seed",
)  # fmt: skip


def ordered_config(run: Run) -> dict[str, Any]:
    """The run's config as a person would write it; the database does not keep the order of keys."""
    place = {name: at for at, name in enumerate(CONFIG_ORDER)}
    return dict(sorted(run.config.items(), key=lambda item: (place.get(item[0], len(place)), item[0])))


def config_rows(run: Run) -> list[tuple[str, str]]:
    """The config as text; numbers as everywhere else."""
    config = ordered_config(run)
    return [
        (name, exact_text(value) if isinstance(value, int | float) else str(value)) for name, value in config.items()
    ]


def snippet(run: Run) -> str:
    """Python that trains the same SAE from the capture's folder."""
    config = ordered_config(run)
    sae = {"architecture": run.sae_architecture, "d_in": run.capture.d_in(run.hook_name)}
    sae |= {name: config.pop(name) for name in ("d_sae", "k") if name in config}
    config.pop("skip", None)
    if run.hook_name_out:
        sae |= {"d_out": run.capture.d_in(run.hook_name_out), "apply_b_dec_to_input": False}
    save = ', "sparsify"' if run.architecture == "topk_transcoder" else ""
    return f"""\
from saes.numerics.architectures import build_sae
from saes.numerics.formats import save_sae
from saes.numerics.sae import SAEConfig
from training.numerics.shards import open_capture
from training.numerics.train import TrainConfig, capture_batches, train

capture = open_capture("{run.capture.folder}")
config = TrainConfig({_arguments(config)})
sae = build_sae(SAEConfig({_arguments(sae)}), seed=config.seed)
result = train(sae, capture_batches(capture, {run.hooks!r}, config), config)
save_sae(result.sae, "my-sae"{save})"""


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
