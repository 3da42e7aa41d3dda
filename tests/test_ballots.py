"""What ranks agree about in a step's reduction (mempar.runtime.ballots)."""

from mempar.runtime.ballots import Ballots


class Question:
    def __init__(self, *numbers: float) -> None:
        self.numbers, self.sums = list(numbers), [0.0]

    def wishes(self) -> list[float]:
        return self.numbers

    def settle(self, sums: list[float]) -> None:
        self.sums = sums


def test_ballots_hand_each_question_its_own_sums() -> None:
    first, second = Question(1.0, 2.0, 3.0), Question(4.0)
    ballots = Ballots(first)
    ballots.add(second)
    assert ballots.wishes() == [1.0, 2.0, 3.0, 4.0]
    ballots.settle([10.0, 20.0, 30.0, 40.0])
    assert (first.sums, second.sums) == ([10.0, 20.0, 30.0], [40.0])
    assert Ballots().wishes() == []
