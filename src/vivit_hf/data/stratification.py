"""Divide units of videos between two sides, with every class on both sides and a given share of each class.

A unit must not be divided; examples are the parts of one file or all videos of one patient. Since a unit may hold
several classes, a backtracking search first assigns units until both sides have every class. The remaining units are
then placed to approach the given shares.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np


ClassKey = tuple[int, str]  # (index of the label group, label)
_MAX_CONFLICTS = 20_000
_MAX_PASSES = 20


def choose_units(
    units: Sequence[Mapping[ClassKey, int]],
    targets: Mapping[ClassKey, int],
    both: Collection[ClassKey],
    generator: np.random.Generator,
) -> set[int] | None:
    """Return the indices of the units for the smaller side, or None if the search finds no division.

    Args:
        units: the number of videos of each class, for each unit.
        targets: the number of videos of each class to place on the smaller side.
        both: the classes required on both sides. The larger side needs every class.
        generator: the source of randomness for ties.
    """
    members: dict[ClassKey, list[int]] = {name: [] for name in targets}
    order = generator.permutation(len(units)).tolist()
    for index in order:
        for name in units[index]:
            members[name].append(index)
    search = _Search(units, members, set(both))
    return _balance(units, targets, members, order, search.sides) if search.run() else None


class _Search:
    """Assign units by backtracking until every class is on all the sides where it is required."""

    def __init__(
        self, units: Sequence[Mapping[ClassKey, int]], members: Mapping[ClassKey, list[int]], both: set[ClassKey]
    ):
        self.units, self.members, self.both = units, members, both
        self.sizes = [sum(counts.values()) for counts in units]
        self.sides: dict[int, bool] = {}  # True: the smaller side
        self.trail: list[int] = []
        self.num_open = {name: len(indices) for name, indices in members.items()}
        self.present = {name: [0, 0] for name in members}

    def run(self) -> bool:
        """Search for an assignment and store it in `sides`; return whether one was found."""
        if not self._assign([forced for name in self.members for forced in self._forced(name)]):
            return False
        decisions: list[tuple[int, bool, int]] = []
        num_conflicts = 0
        while (choice := self._next()) is not None:
            decisions.append((*choice, len(self.trail)))
            is_consistent = self._assign([choice])
            while not is_consistent:
                num_conflicts += 1
                if not decisions or num_conflicts > _MAX_CONFLICTS:
                    return False
                index, side, length = decisions.pop()
                self._undo(length)
                is_consistent = self._assign([(index, not side)])  # the only option left after `side` failed
        return True

    def _lacking(self, name: ClassKey) -> list[bool]:
        """Return the sides where a class is still missing."""
        present = self.present[name]
        return [side for side in (False, True) if not present[side] and (name in self.both or not side)]

    def _forced(self, name: ClassKey) -> list[tuple[int, bool]]:
        """Return the last open unit of a class with the side that needs it, as a list; [] if the choice is free."""
        if self.num_open[name] != 1 or not (lacking := self._lacking(name)):
            return []
        return [(next(index for index in self.members[name] if index not in self.sides), lacking[0])]

    def _assign(self, pending: list[tuple[int, bool]]) -> bool:
        """Assign units and all units that this forces; return False if too few units are left for a class."""
        while pending:
            index, side = pending.pop()
            if index in self.sides:
                if self.sides[index] != side:
                    return False
                continue
            self.sides[index] = side
            self.trail.append(index)
            for name in self.units[index]:
                self.num_open[name] -= 1
                self.present[name][side] += 1
            for name in self.units[index]:
                if len(self._lacking(name)) > self.num_open[name]:
                    return False
                pending += self._forced(name)
        return True

    def _undo(self, length: int) -> None:
        """Undo the latest assignments until `length` of them are left."""
        while len(self.trail) > length:
            index = self.trail.pop()
            side = self.sides.pop(index)
            for name in self.units[index]:
                self.num_open[name] += 1
                self.present[name][side] -= 1

    def _next(self) -> tuple[int, bool] | None:
        """Return a unit and side for the incomplete class with the fewest open units; None if all are complete."""
        lacking = [name for name in self.members if self._lacking(name)]
        if not lacking:
            return None
        name = min(lacking, key=lambda name: self.num_open[name])
        side = self._lacking(name)[-1]
        candidates = [index for index in self.members[name] if index not in self.sides]
        choose = min if side else max
        return choose(candidates, key=lambda index: self.sizes[index]), side


def _balance(
    units: Sequence[Mapping[ClassKey, int]],
    targets: Mapping[ClassKey, int],
    members: Mapping[ClassKey, list[int]],
    order: Sequence[int],
    decided: Mapping[int, bool],
) -> set[int]:
    """Place the undecided units, largest first, then move units as long as this brings counts closer to the targets."""
    totals = {name: sum(units[index][name] for index in indices) for name, indices in members.items()}
    held = dict.fromkeys(targets, 0)  # videos on the smaller side
    present = dict.fromkeys(targets, 0)  # units on the smaller side
    chosen: set[int] = set()

    def gain(index: int, sign: int) -> float:
        """Return the decrease in squared distance to the targets, relative to the size of each class."""
        change = 0.0
        for name, count in units[index].items():
            off = held[name] - targets[name]
            change += (off**2 - (off + sign * count) ** 2) / totals[name]
        return change

    def move(index: int, sign: int) -> None:
        (chosen.add if sign > 0 else chosen.discard)(index)
        for name, count in units[index].items():
            held[name] += sign * count
            present[name] += sign

    def is_needed(index: int, sign: int) -> bool:
        """Return whether moving the unit would leave its current side without one of the classes."""
        return any((present[name] if sign < 0 else len(members[name]) - present[name]) == 1 for name in units[index])

    for index, side in decided.items():
        if side:
            move(index, 1)
    free = [index for index in order if index not in decided]
    free.sort(key=lambda index: -sum(units[index].values()))
    for index in free:
        if gain(index, 1) > 0 and not is_needed(index, 1):
            move(index, 1)
    for _ in range(_MAX_PASSES):
        has_changed = False
        for index in order:
            sign = -1 if index in chosen else 1
            if gain(index, sign) > 1e-9 and not is_needed(index, sign):
                move(index, sign)
                has_changed = True
        if not has_changed:
            break
    return chosen
