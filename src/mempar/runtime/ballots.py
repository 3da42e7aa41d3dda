"""What ranks agree about in a reduction that is made anyway: every rank adds a few numbers, and all see the sums.

A step's reduction carries them (see optim.py), and that of every held-out batch. Nothing here imports torch.
"""

from typing import Protocol


class Ballot(Protocol):
    """A question that ranks agree about."""

    def wishes(self) -> list[float]:
        """This rank's numbers, the same count of them every time and on every rank."""
        ...

    def settle(self, sums: list[float]) -> None:
        """Take over the sums of all ranks' numbers."""
        ...


class Ballots:
    """All questions, in an order that is the same on all ranks."""

    def __init__(self, *members: Ballot) -> None:
        self._members = list(members)
        self._counts: list[int] = []

    def add(self, member: Ballot) -> None:
        """Ask one more question from now on; every rank must."""
        self._members.append(member)

    def wishes(self) -> list[float]:
        """This rank's numbers for all questions."""
        wishes = [member.wishes() for member in self._members]
        self._counts = [len(of_member) for of_member in wishes]
        return [wish for of_member in wishes for wish in of_member]

    def settle(self, sums: list[float]) -> None:
        """Hand each question the sums of its numbers."""
        start = 0
        for member, count in zip(self._members, self._counts, strict=True):
            member.settle(sums[start : start + count])
            start += count
