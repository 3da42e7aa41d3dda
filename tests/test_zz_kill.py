import sys, time

sys.path.insert(0, "/work/main/tests")
from rank_pool import RankPool
import test_rank_pool as t


def test_x(pool):
    pool.submit(2, t.sum_of_ranks, 0).result()
    open("/tmp/kill.ids", "w").write(" ".join(str(w.process.pid) for w in pool._workers))
    pool.submit(2, t.sleep_for_ever).result()
