"""The best division into groups where everybody has a cost for everybody else: exact, over all subsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MOST = 12
"""So many can be divided: the time grows threefold with each."""


def best_partition(costs: Sequence[Sequence[float]], groups: int) -> list[list[int]]:
    """The division into `groups` groups with the least sum of `costs[i][j] + costs[j][i]` over pairs in one group.

    Groups and their members are in order; of equal divisions the first is found, always the same. At most `MOST`
    members, and at least as many as groups.
    """
    count = len(costs)
    inside = [0.0] * (1 << count)
    for members in range(1, 1 << count):
        first = _first(members)
        rest = members & (members - 1)
        inside[members] = inside[rest] + sum(costs[first][j] + costs[j][first] for j in _numbers(rest))
    least: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(groups):
        found: dict[int, tuple[float, int]] = {}
        for done, (cost, _) in least[-1].items():
            left = ~done & ((1 << count) - 1)
            for group in _with_first(left):
                total = cost + inside[group]
                if total < found.get(done | group, (float("inf"), 0))[0]:
                    found[done | group] = (total, group)
        least.append(found)
    done, divided = (1 << count) - 1, []
    for found in reversed(least[1:]):
        group = found[done][1]
        divided.append(list(_numbers(group)))
        done &= ~group
    return sorted(divided)


def _first(members: int) -> int:
    return (members & -members).bit_length() - 1


def _numbers(members: int) -> Iterator[int]:
    while members:
        yield _first(members)
        members &= members - 1


def _with_first(members: int) -> Iterator[int]:
    """All subsets that hold the first member."""
    if not members:
        return
    first, rest = members & -members, members & (members - 1)
    some = rest
    while True:
        yield some | first
        if not some:
            return
        some = (some - 1) & rest
