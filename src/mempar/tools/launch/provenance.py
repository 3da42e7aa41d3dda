"""Stand-in."""

from pathlib import Path

from mempar.tools.launch.profile import LaunchProfile
from mempar.tools.launch.profile_file import profile_yaml


def collect(profile: LaunchProfile) -> LaunchProfile:
    return profile


def write(origin: LaunchProfile, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "profile.yaml").write_text(profile_yaml(origin))
