"""Two texts side by side: which tokens differ, as far as they are written."""

from __future__ import annotations

import random
from difflib import SequenceMatcher

from inference.models import Generation
from inference.sides import ALIGNED_TOKENS, differing, sides


def test_equal_texts_do_not_differ() -> None:
    assert differing([1, 2, 3], [1, 2, 3]) == ([False] * 3, [False] * 3)
    assert differing([], []) == ([], [])


def test_an_insertion_marks_only_itself() -> None:
    assert differing([1, 2, 3], [1, 9, 2, 3]) == ([False] * 3, [False, True, False, False])


def test_what_is_not_marked_is_a_common_subsequence() -> None:
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randrange(6) for _ in range(rng.randrange(30))] for _ in range(2))
        in_a, in_b = differing(a, b)
        kept = [[t for t, mark in zip(text, marks, strict=True) if not mark] for text, marks in ((a, in_a), (b, in_b))]
        assert kept[0] == kept[1]
        assert len(kept[0]) == sum(
            block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
        )


def test_long_texts_are_compared_by_position() -> None:
    a = list(range(ALIGNED_TOKENS + 1))
    in_a, in_b = differing(a, a[1:])
    assert all(in_a) and all(in_b)


def test_a_text_under_way_does_not_mark_the_rest_of_the_other() -> None:
    done = {"ids": [1, 2, 3, 4], "pieces": ["a", "b", "c", "d"], "seconds": 1.0}
    row = Generation(baseline=done, steered={"ids": [1, 9], "pieces": ["a", "x"]})
    baseline, steered = sides(row)
    assert baseline.runs == [("abcd", False)] and baseline.made == done
    assert steered.runs == [("a", False), ("x", True)] and steered.made is None
    row.steered = {"ids": [1, 9], "pieces": ["a", "x"], "seconds": 1.0, "mean_plain_logprob": -2.0}
    baseline, steered = sides(row)
    assert baseline.runs == [("a", False), ("bcd", True)]
    assert steered.perplexity is not None and abs(steered.perplexity - 7.389) < 1e-3


def test_nothing_written_yet() -> None:
    assert [(side.runs, side.n_tokens, side.made) for side in sides(Generation())] == [([], 0, None)] * 2
