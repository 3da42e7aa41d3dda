"""The file of recorded slots: what is written is read, and what is no such file is refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mempar.errors import ConfigError
from mempar.runtime.slot_file import UNKNOWN, load_slots, save_slots


def made_up(seed: int = 3) -> dict[tuple[int, int, int], np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {1: (6, 2, 4), 3: (6, 1, 3)}
    return {
        (step, block, sample): rng.integers(0, 50, shape, dtype=np.int32)
        for block, shape in shapes.items()
        for step, sample in ((0, 0), (0, 7), (1, 4))
    }


def test_file_holds_what_was_written(tmp_path: Path):
    slots = made_up()
    save_slots(tmp_path / "one.npz", slots)
    found = load_slots(tmp_path / "one.npz")
    assert found.keys() == slots.keys()
    for key, choices in slots.items():
        assert found[key].dtype == np.int32
        np.testing.assert_array_equal(found[key], choices)
    assert not list(tmp_path.glob("*.aside"))


def test_files_of_ranks_are_one_trace(tmp_path: Path):
    slots = made_up()
    folder = tmp_path / "slots" / "from_00000012"
    folder.mkdir(parents=True)
    for rank, half in enumerate((slice(0, 3), slice(3, 6))):
        seen = {key: np.full_like(choices, UNKNOWN) for key, choices in slots.items()}
        for key, choices in slots.items():
            seen[key][half] = choices[half]
        save_slots(folder / f"rank_{rank:05d}.npz", seen)
    # Of an earlier launch, which may have had other ranks.
    (tmp_path / "slots" / "from_00000009").mkdir()
    save_slots(tmp_path / "slots" / "from_00000009" / "rank_00002.npz", made_up(7))
    for place in (tmp_path, tmp_path / "slots", folder):
        found = load_slots(place)
        assert all((found[key] == choices).all() for key, choices in slots.items())


def test_files_of_different_runs_are_refused(tmp_path: Path):
    save_slots(tmp_path / "a.npz", made_up(3))
    save_slots(tmp_path / "b.npz", made_up(4))
    with pytest.raises(ConfigError, match="of different runs"):
        load_slots(tmp_path)


def test_first_step_alone_is_read(tmp_path: Path):
    slots = made_up()
    for step in (0, 1):
        save_slots(tmp_path / f"step_{step}.npz", {key: each for key, each in slots.items() if key[0] == step})
    assert load_slots(tmp_path, first_step_only=True).keys() == {key for key in slots if key[0] == 0}
    # What is in other steps' files is not looked at.
    save_slots(tmp_path / "step_1.npz", {(1, 1, 4): slots[1, 1, 4] - 60})
    assert len(load_slots(tmp_path, first_step_only=True)) == 4
    with pytest.raises(ConfigError, match="a negative step, sample or slot"):
        load_slots(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_what_is_no_file_of_slots_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="no file of recorded slots"):
        load_slots(tmp_path / "bad.npz")


def test_pickles_are_not_read(tmp_path: Path):
    np.savez(tmp_path / "bad.npz", **{"block_00001.slots": np.array([{}], dtype=object)})
    with pytest.raises(ConfigError, match="no file of recorded slots"):
        load_slots(tmp_path / "bad.npz")


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path):
    arrays = {
        "steps": np.zeros(2, np.int64),
        "samples": np.zeros(2, np.int64),
        "slots": np.zeros((3, 4, 2, 2), np.int32),
    }
    np.savez(tmp_path / "bad.npz", **{f"block_00001.{name}": array for name, array in arrays.items()})
    with pytest.raises(ConfigError, match=r"slots \(3, 4, 2, 2\)"):
        load_slots(tmp_path / "bad.npz")


@pytest.mark.parametrize("name", ["", "missing.npz"])
def test_nothing_recorded_says_how_to(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"train\.trace_steps"):
        load_slots(tmp_path / name)


def test_files_with_a_flipped_byte_are_refused_or_say_the_same(tmp_path: Path):
    slots, path = made_up(), tmp_path / "bad.npz"
    save_slots(path, slots)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found = load_slots(path)
        except ConfigError as error:
            assert "no file of recorded slots" in str(error)
            refused += 1
        else:
            # Of fields that nobody reads, such as times.
            assert found.keys() == slots.keys() and all((found[key] == slots[key]).all() for key in slots)
    assert refused > len(content) // 3 // 2


def with_member(path: Path, name: str, content: bytes) -> None:
    """Replace a member of a file."""
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, old in members.items():
            archive.writestr(each, content if each == name else old)


def as_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_headers_that_lie_are_refused_before_anything_is_read(tmp_path: Path):
    save_slots(tmp_path / "good.npz", made_up())
    name = "block_00001.slots.npy"
    good = as_npy(np.zeros((3, 6, 2, 4), np.int32))
    lies = [
        good.replace(b"(3, 6, 2, 4)", b"(3, 6, 2, 9)"),
        # A petabyte: to be refused, not tried.
        good.replace(b"(3, 6, 2, 4), }" + b" " * 12, b"(3, 600000, 200, 400000), }"),
        good[:-4],
        good[:9],
        as_npy(np.zeros((3, 6, 8), np.int32)),
        as_npy(np.zeros((3, 6, 2, 4), np.int64)),
        as_npy(np.asfortranarray(np.zeros((3, 6, 2, 4), np.int32))),
        b"",
    ]
    for lie in lies:
        assert lie != good
        path = tmp_path / "bad.npz"
        path.write_bytes((tmp_path / "good.npz").read_bytes())
        with_member(path, name, lie)
        with pytest.raises(ConfigError, match="no file of recorded slots"):
            load_slots(path)


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("steps", np.zeros((3, 1), np.int64)),
        ("steps", np.array([0, 0, -1])),
        ("samples", np.array([1, 2, -7])),
        ("samples", np.array([0, 0, 0])),
        ("samples", np.zeros(3, np.float64)),
        ("slots", np.full((3, 6, 2, 4), -2, np.int32)),
    ],
)
def test_arrays_that_no_run_writes_are_refused(tmp_path: Path, part: str, array: np.ndarray):
    path = tmp_path / "bad.npz"
    save_slots(path, made_up())
    with_member(path, f"block_00001.{part}.npy", as_npy(array))
    with pytest.raises(ConfigError, match="no file of recorded slots"):
        load_slots(path)


def test_bombs_and_strangers_are_refused(tmp_path: Path):
    path = tmp_path / "bad.npz"
    save_slots(path, made_up())
    content = path.read_bytes()
    # The size of a member in the archive's directory, 24 bytes behind the beginning of its entry.
    entry = content.rindex(b"PK\x01\x02") + 24
    path.write_bytes(content[:entry] + (1 << 30).to_bytes(4, "little") + content[entry + 4 :])
    with pytest.raises(ConfigError, match="hold as much as it says"):
        load_slots(path)
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_0.npy", as_npy(np.zeros(2)))
    with pytest.raises(ConfigError, match=r"'arr_0\.npy' is no part of one"):
        load_slots(path)
