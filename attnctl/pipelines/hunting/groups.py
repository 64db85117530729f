"""Searching with groups of heads: every picture tells about many heads at once.

One head of many changes a picture by little more than chance, so that marks of single heads need many pictures each.
Here the pool is dealt out anew for every prompt-seed pair, a group of heads acts together in each picture, and least
squares find what each head adds to the mark: a picture counts for as many heads as act in it. HeadHunter (arXiv
2506.10978) tries heads one by one; the groups are ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from attnctl.pipelines.hunting.plan import Head, HuntPlan
from attnctl.pipelines.hunting.work import Row

__all__ = ["deal", "worth"]

_TRIES = 100
_RIDGE = 1.0  # as if each head had been seen once more, adding nothing: sums of all heads cannot be told from the pairs


def deal(pool: Sequence[Head], chosen: tuple[Head, ...], plan: HuntPlan) -> list[Row]:
    """Deal the pool out into groups, for every pair and repeat anew; each acts together with the chosen heads.

    The same on every machine: nothing but the plan, the pair and the chosen heads enters.
    """
    place = {head: i for i, head in enumerate(pool)}
    count = plan.groups(len(pool))
    rows: list[Row] = []
    dealt: set[Row] = set()
    for repeat in range(plan.repeats):
        for i in range(len(plan.pairs)):
            chance = random.Random(f"{len(chosen)}/{repeat}/{i}")
            for _ in range(_TRIES):  # the same group on the same pair again would be the same picture
                hand = list(pool)
                chance.shuffle(hand)
                new: list[Row] = [((*chosen, *sorted(hand[j::count], key=place.__getitem__)), i) for j in range(count)]
                if dealt.isdisjoint(new):
                    break
            dealt.update(new)
            rows += new
    return rows


def worth(rows: Sequence[Row], marks: Mapping[Row, float], pool: Sequence[Head]) -> dict[Head, float]:
    """Return the mean mark plus what each head of the pool adds to it, by least squares within each pair.

    Differences between pairs, some of which are harder than others, drop out.
    """
    place = {head: i for i, head in enumerate(pool)}
    acts = torch.zeros(len(rows), len(pool), dtype=torch.float64)
    for row, (heads, _) in enumerate(rows):
        acts[row, [place[h] for h in heads if h in place]] = 1.0
    given = torch.tensor([marks[row] for row in rows], dtype=torch.float64)
    mean = float(given.mean())
    for i in {i for _, i in rows}:
        same_pair = torch.tensor([i == pair for _, pair in rows])
        acts[same_pair] -= acts[same_pair].mean(0)
        given[same_pair] -= given[same_pair].mean()
    square = acts.T @ acts + _RIDGE * torch.eye(len(pool), dtype=torch.float64)
    adds = torch.linalg.solve(square, acts.T @ given)
    return {head: mean + float(adds[i]) for head, i in place.items()}
