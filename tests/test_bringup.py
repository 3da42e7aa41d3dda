"""What joining the world refuses before any group is made."""

import pytest
import torch
import torch.distributed as dist

from mempar.errors import ConfigError
from mempar.runtime.bringup import join_world


def test_more_ranks_than_devices_are_refused_before_the_group_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("CUDA_DEVICE_MAX_CONNECTIONS", "1")):
        monkeypatch.setenv(name, value)
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: done.append(backend))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 ranks on this machine and 1 CUDA devices"):
        join_world()
    assert done == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    join_world()
    assert done == [1, "nccl"]
