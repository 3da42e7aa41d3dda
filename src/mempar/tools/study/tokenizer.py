"""The study's tokenizer: byte pairs of words, learned from the sentences, with every digit of a code point a token.

It is small, so that tiny models do not spend themselves on their vocabulary, and it is the same for the same
sentences. A word brings the blank before it along; so a sentence's tokens are those of its two parts.
"""

from pathlib import Path

from mempar.errors import ConfigError
from mempar.runtime.data.tokenizer import TokenizerSpec
from mempar.runtime.durable import replace_file

END = "<|endoftext|>"
_PRINTABLE = [chr(code) for code in range(ord(" "), ord("~") + 1)]
# The longest code point has six digits. A look-behind has parts of fixed length, so there is one for each digit.
_DIGIT_OF_CODE_POINT = "(?<=" + "|".join(rf"U\+[0-9A-F]{{{place}}}" for place in range(6)) + ")[0-9A-F]"
_WORD = r" ?U\+| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]"


def train_tokenizer(texts: list[str], vocab_size: int, directory: Path) -> TokenizerSpec:
    """Learn a tokenizer and save it as a tokenizer.json.

    Args:
        texts: to learn from.
        vocab_size: tokens, the end of a document included; fewer where the texts do not give so many.
        directory: to make.

    Returns:
        Its name in the grammar of `data.tokenizer`.

    Raises:
        ConfigError: when the package `tokenizers` is missing, or there is no room for the letters.
        OSError: when it cannot be written; nothing of it is there then.
    """
    fewest = len(_PRINTABLE) + 1
    if vocab_size < fewest:
        raise ConfigError(
            f"vocab_size={vocab_size} has no room for the {fewest - 1} letters and digits and the end of a document; "
            f"every sentence must have tokens; raise it to {fewest} or more."
        )
    spec = TokenizerSpec("hf", str(directory))
    library = spec.import_library("tokenizers")
    parts = library.pre_tokenizers
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = parts.Sequence(
        [parts.Split(library.Regex(pattern), "isolated") for pattern in (_DIGIT_OF_CODE_POINT, _WORD)]
    )
    # Tokens have the blanks in them.
    tokenizer.decoder = library.decoders.Fuse()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=_PRINTABLE, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    return spec
