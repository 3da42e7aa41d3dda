"""A rank of doctor's smoke test that does what its name says: `smoke.launch(..., worker="hanging_rank")`."""

import os
import signal

from mempar.tools.doctor import smoke_rank


class Hanging(smoke_rank.Rank):
    """Rank 1 stops before the barrier, as one whose machine is frozen does."""

    def _enter(self, stage: str) -> None:
        if stage == "barrier" and self.place.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        super()._enter(stage)


if __name__ == "__main__":
    smoke_rank.Rank = Hanging
    raise SystemExit(smoke_rank.main())
