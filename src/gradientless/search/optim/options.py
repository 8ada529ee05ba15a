"""Options: Algorithm 2 of the thesis (section 3.3), a lookahead over pending updates of each tensor.

Every tensor has a tree of options, ℓ levels deep and m wide; an option is a change that was considered but not yet
taken. A step expands every leaf by "no change" and K perturbations of its own, keeps the best m under each leaf, takes
the first-level option under which the lowest loss was found, and makes that option's children the new first level.
While one tensor is searched, the others stand at their best pending path. `GLD(options=(m, ℓ))` runs it.

    under leaf j, from the left, j = 0 … m^ℓ - 1:   v_k ~ 2^-k R N(0, I),  the noise of draw j K + k,  k = 0 … K-1

Differs from the paper: the trees begin with one empty option per level, where the thesis leaves ψ of the first step
open. Options stand in the order of the lowest loss under them, where the listing ranks none but the newest: it decides
ties and the numbers of leaves, and says which path is the best. With `confirm`, the rule of the thesis's code: an
option is taken only if something under it beats the loss without it on the same batch, which is the batch after the one
it was born on; otherwise the first option's children are kept. Their base was not taken, which the code overlooks; here
each child is extended by the option it was measured on, so that it still denotes the weights that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradientless.search.optim.base import Conversation
from gradientless.search.points import ORIGIN, Direction, Point, Rank, Update


@dataclass
class Option:
    """A pending change and the options that build on it, best first."""

    change: Point = ORIGIN
    children: list[Option] = field(default_factory=list)

    def leaves(self, base: Point) -> Iterator[tuple[Option, Point]]:
        """Every leaf under this option with its place: all changes down to it, on top of `base`."""
        place = base + self.change
        if not self.children:
            yield self, place
        for child in self.children:
            yield from child.leaves(place)

    def best_path(self) -> Point:
        return self.change + (self.children[0].best_path() if self.children else ORIGIN)

    def sort(self, rank: dict[int, int]) -> int:
        """Order the children by the best leaf under them; `rank` is that of leaves by id. Returns the best rank."""
        if id(self) in rank:
            return rank[id(self)]
        found = sorted((child.sort(rank), i) for i, child in enumerate(self.children))
        self.children = [self.children[i] for _, i in found]
        return found[0][0]

    def directions(self) -> Iterator[Direction]:
        yield from (direction for _, direction in self.change)
        for child in self.children:
            yield from child.directions()


class OptionTrees:
    """The trees of all tensors: `width` options per level (m), `levels` (ℓ)."""

    def __init__(self, width: int, levels: int, confirm: bool):
        self.width, self.levels, self.confirm = width, levels, confirm
        self.trees: dict[str, Option] = {}  # block -> root; the root's change is empty, its children are level one

    def _tree(self, block: str) -> Option:
        if block not in self.trees:
            node = Option()
            for _ in range(self.levels):
                node = Option(ORIGIN, [node])
            self.trees[block] = node
        return self.trees[block]

    def search(
        self, t: int, blocks: Sequence[str], perturbations: Callable[[int, str, int], list[Point]]
    ) -> Conversation:
        """One step. perturbations: v_0 … v_{K-1} of step t and a block, under its leaf of a number."""
        taken, loss = ORIGIN, float("nan")
        for block in blocks:
            tree = self._tree(block)
            others = taken + sum((self._tree(b).best_path() for b in blocks if b != block), ORIGIN)
            leaves = list(tree.leaves(others))
            moves = [[ORIGIN, *perturbations(t, block, number)] for number in range(len(leaves))]
            groups = [[place + v for v in mine] for (_, place), mine in zip(leaves, moves, strict=True)]
            if self.confirm:
                groups.insert(0, [others])  # the loss without any option; first, so that an equal loss confirms nothing
            answer = yield Rank(groups, [block] * len(groups), keep=self.width)
            loss = answer.loss
            shift = len(groups) - len(leaves)
            rank = {id(leaf): answer.groups.index(i + shift) for i, (leaf, _) in enumerate(leaves)}
            first = tree.children[0]
            tree.sort(rank)
            for (leaf, _), mine, order in zip(leaves, moves, answer.order[shift:], strict=True):
                leaf.children = [Option(mine[i]) for i in order]
            if self.confirm and answer.groups[0] == 0:
                for child in first.children:
                    child.change = first.change + child.change
                tree.children = first.children
            else:
                best = tree.children[0]
                taken += best.change
                tree.children = best.children
        return Update(taken, loss)

    def pending(self) -> Point:
        """Every tensor's best pending path."""
        return sum((tree.best_path() for tree in self.trees.values()), ORIGIN)

    def directions(self) -> Iterator[Direction]:
        for tree in self.trees.values():
            yield from tree.directions()

    def state(self) -> dict[str, Any]:
        def plain(node: Option) -> list[Any]:
            return [[[c, *direction] for c, direction in node.change], [plain(child) for child in node.children]]

        return {block: plain(tree) for block, tree in self.trees.items()}

    def load(self, state: dict[str, Any]) -> None:
        def node(data: list[Any]) -> Option:
            return Option(tuple((c, Direction(*rest)) for c, *rest in data[0]), [node(child) for child in data[1]])

        self.trees = {block: node(tree) for block, tree in state.items()}
