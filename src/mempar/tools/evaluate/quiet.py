"""What the harness and its libraries read from the environment when they are imported; imports nothing itself."""

import os

# No counting of downloads and no telemetry; no bars beside ours; no forks of a process that holds a model.
_SETTINGS = {
    "DISABLE_MULTIPROC": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def be_quiet() -> None:
    """Set what the user has not set; before any other import, for some of them bring these libraries along."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
