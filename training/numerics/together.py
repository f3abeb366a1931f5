"""Several SAEs trained side by side on one stream of activations: read, scaled and shuffled once for all of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from training.numerics.checkpoint import TrainingError
from training.numerics.optim import matmul_precision
from training.numerics.shards import Capture, Hooks
from training.numerics.threads import warm_up
from training.numerics.train import TrainConfig, Training, TrainResult

Streams = Callable[[int], Iterator[Mapping[Hooks, Tensor]]]  # from a first row to batches {hooks: (n, d)}


@dataclass(eq=False)
class Member:
    """One of them. `key` is the caller's name for it, `hook` the activations it reads (a tuple: side by side)."""

    key: object
    hook: Hooks
    training: Training


def capture_streams(capture: Capture, hooks: Sequence[Hooks], config: TrainConfig) -> Streams:
    """The training rows of a capture at several hook points, the same tokens at each, from any row on."""

    def batches(start_row: int) -> Iterator[Mapping[Hooks, Tensor]]:
        each = [
            capture.batches(hook, config.batch_size, seed=config.order, n_rows=config.total_rows, start_row=start_row)
            for hook in hooks
        ]
        for xs in zip(*each, strict=True):
            yield dict(zip(hooks, xs, strict=True))

    return batches


def train_together(
    members: Sequence[Member],
    batches: Streams,
    *,
    on_end: Callable[[Member, TrainResult | TrainingError], None],
    should_stop: Callable[[Member], bool] | None = None,
) -> None:
    """Train every member to the end of its config, each to the bit as `train` would have trained it alone.

    A member that has come further than the others (its checkpoint is newer) waits until the stream is where it stands.
    on_end is told of each as soon as it is over: at its last step, when should_stop(member) said so, when the stream
    ended, or with the error that ended it alone; it may raise to end all, after whose checkpoints are written.

    Raises TrainingError when the members do not share batch size, order and precision.
    """
    if not members:
        return
    config = _common(members)
    going = list(members)
    at = min(member.training.state.tokens for member in going)
    stream = batches(at)
    warm_up()
    try:
        with ThreadPoolExecutor(min(len(going), os.cpu_count() or 1), "together") as pool:
            while going:
                going = [member for member in going if not _over(member, should_stop, on_end)]
                xs = next(stream, None) if going else None
                if xs is None:
                    break
                here = [member for member in going if member.training.state.tokens == at]
                failed = _step(here, xs, config.precision, pool)
                at += len(next(iter(xs.values())))
                for member, error in failed:
                    going.remove(member)
                    member.training.close()
                    on_end(member, error)
        for member in list(going):
            member.training.check_begun(stopped=False)
            going.remove(member)
            _end(member, True, on_end)
    finally:
        for member in going:
            member.training.close()


def _common(members: Sequence[Member]) -> TrainConfig:
    """The config of one of them, once it is sure that all can share a stream."""
    shared = {
        (member.training.config.batch_size, member.training.config.order, member.training.config.precision)
        for member in members
    }
    if len(shared) > 1:
        raise TrainingError("SAEs trained side by side need one batch size, one order of rows and one precision.")
    return members[0].training.config


def _over(
    member: Member,
    should_stop: Callable[[Member], bool] | None,
    on_end: Callable[[Member, TrainResult | TrainingError], None],
) -> bool:
    """Whether the member is at its end, or told to stop here; if so that is said."""
    done = member.training.done
    if not done and not (should_stop is not None and should_stop(member)):
        return False
    _end(member, not done, on_end)
    return True


def _end(member: Member, stopped: bool, on_end: Callable[[Member, TrainResult | TrainingError], None]) -> None:
    try:
        member.training.save()
        outcome: TrainResult | TrainingError = member.training.result(stopped)
    except TrainingError as error:
        outcome = error
    finally:
        member.training.close()
    on_end(member, outcome)


def _step(
    members: Sequence[Member], xs: Mapping[Hooks, Tensor], precision: str, pool: ThreadPoolExecutor
) -> list[tuple[Member, TrainingError]]:
    """One step of each; returns those that cannot go on. Two are worked on at a time, so that what one does on a single
    core does not leave the other idle. The precision of products belongs to the process, so all share one block."""

    broken: dict[Member, TrainingError] = {}

    def each(work: Callable[[Member], T], side_by_side: bool) -> dict[Member, T]:
        """What work(member) returns for every member that is not broken yet."""
        alive = [member for member in members if member not in broken]
        run = pool.map if side_by_side else map
        found = dict(zip(alive, run(lambda member: _caught(lambda: work(member)), alive), strict=True))
        broken.update({member: error for member, error in found.items() if isinstance(error, TrainingError)})
        return {member: value for member, value in found.items() if not isinstance(value, TrainingError)}

    x = each(lambda member: member.training.prepared(xs[member.hook]), side_by_side=False)
    with matmul_precision(precision):
        outcome = each(lambda member: member.training.gradients(x[member]), side_by_side=True)
    each(lambda member: member.training.update(x[member], outcome[member]), side_by_side=True)
    each(lambda member: member.training.after(x[member], outcome[member]), side_by_side=False)
    return list(broken.items())


T = TypeVar("T")


def _caught(work: Callable[[], T]) -> T | TrainingError:
    try:
        return work()
    except TrainingError as error:
        return error
