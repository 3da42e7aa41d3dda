"""One data set for a model that is there already: prepared or from elsewhere, named by its PREFIX, not by a run."""

from dataclasses import replace

from mempar.errors import ConfigError
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import check_files
from mempar.runtime.data.manifest import read_manifest
from mempar.runtime.named_path import is_file


def check_prefix(prefix: str, option: str) -> None:
    """Refuse a prefix without its files.

    Args:
        prefix: of the .bin and .idx files.
        option: that named it.

    Raises:
        ConfigError: when one is missing.
    """
    for suffix in (".bin", ".idx"):
        if not is_file(prefix + suffix, option):
            raise ConfigError(
                f"{option} {prefix}: {prefix}{suffix} is not there; prepared data are PREFIX.bin and PREFIX.idx, as "
                "`mempar prepare` writes them; name their PREFIX."
            )


def run_on_prefix(run: RunConfig, prefix: str, embeddings: int) -> RunConfig:
    """Turn a run into one that reads this data set alone, and check that its model can.

    Args:
        run: of the model.
        prefix: of the .bin and .idx files, which exist.
        embeddings: that the model has; what the data need is held against them, whatever else they are of.

    Raises:
        ConfigError: for files that are cut short, data of another tokenizer, and tokens beyond the vocabulary.
    """
    about = read_manifest(prefix)
    if about is not None and about.vocab_size > embeddings:
        raise ConfigError(
            f"{prefix} was prepared with {about.tokenizer}, of {about.vocab_size} tokens, and the model has "
            f"{embeddings} embeddings; every token needs one; name data of the model's own tokenizer."
        )
    data = replace(run.data, corpus="", paths=(prefix,), weights=(), heldout_paths=(), trigram_baseline=False)
    model = replace(run.model, vocab_size=run.model.vocab_size or embeddings)
    own = replace(run, model=model, data=data)
    check_files(own)
    return own
