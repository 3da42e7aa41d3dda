"""The vocabulary of a checkpoint: its embeddings, its tokenizer's tokens, the tokenizer itself.

A run's data may be gone when its checkpoint is used. Nothing here imports torch.
"""

from mempar.errors import CheckpointError, ConfigError
from mempar.runtime.checkpoint.accept import DATA
from mempar.runtime.checkpoint.manifest import Manifest
from mempar.runtime.config import RunConfig
from mempar.runtime.data.check import TOKENIZER
from mempar.runtime.data.encoders import Encoder, load_encoder
from mempar.runtime.data.tokenizer import parse_spec, vocab_size

_EMBEDDING = "embedding.word_embeddings.weight"


def padded_vocab(manifest: Manifest) -> int:
    """Embeddings of a checkpoint, padding included.

    Raises:
        CheckpointError: when it has none.
    """
    record = manifest.tensors.get(_EMBEDDING)
    if record is None or len(record.shape) != 2:
        raise CheckpointError(
            f"{manifest.root} has no embeddings ({_EMBEDDING}); a checkpoint holds a whole model; use another one."
        )
    return record.shape[0]


def num_tokens_of(run: RunConfig, embeddings: int) -> int:
    """Tokens of a run's tokenizer; all embeddings where neither prepared data nor the tokenizer can say it."""
    try:
        return min(embeddings, vocab_size(run))
    except ConfigError:
        return min(embeddings, run.model.vocab_size or embeddings)


def encoder_of(manifest: Manifest, run: RunConfig) -> Encoder:
    """Load the tokenizer that a checkpoint names, and check as far as can be that it is the one of the run's data.

    A checkpoint remembers the fingerprint of the tokenizer that prepared its data. Of data from elsewhere, and in
    checkpoints of earlier versions, only the number of tokens is compared.

    Raises:
        ConfigError: when it cannot be loaded, is another one than prepared the data, or has more tokens than the
            checkpoint has embeddings.
    """
    name = run.data.tokenizer
    try:
        encoder = load_encoder(parse_spec(name))
    except ConfigError as error:
        raise ConfigError(
            f"the tokenizer of {manifest.root} is missing: {error} A checkpoint names the data.tokenizer of its run, "
            "and does not hold it; put it there (a path is taken from the present directory)."
        ) from None
    embeddings = padded_vocab(manifest)
    if encoder.vocab_size > embeddings:
        raise ConfigError(
            f"the tokenizer {name} has {encoder.vocab_size} tokens, and {manifest.root} {embeddings} embeddings; a "
            "model is used with the tokenizer of its data; put that one in its place."
        )
    known = _fingerprints(manifest)
    if known and encoder.fingerprint not in known:
        raise ConfigError(
            f"the tokenizer {name} is {encoder.fingerprint}, and the data of {manifest.root} were prepared with "
            f"{' and '.join(known)}; a model is used with the tokenizer of its data; put that one in its place."
        )
    return encoder


def _fingerprints(manifest: Manifest) -> list[str]:
    """Those of the tokenizers that prepared the data of the run, as far as the checkpoint knows."""
    described = [about for about in manifest.about.get(DATA, {}).values() if isinstance(about, dict)]
    return list(dict.fromkeys(str(about[TOKENIZER]) for about in described if TOKENIZER in about))
