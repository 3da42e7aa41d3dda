"""Text from tokens as they come: a character that ends in the middle of a token is held back until it is whole."""

from collections.abc import Sequence

from mempar.runtime.data.encoders import Encoder

# What decoders put for bytes that are no character, or not yet.
_REPLACEMENT = "\ufffd"
# A character of UTF-8 has at most so many bytes, and a token at least one of them.
_MOST_TOKENS = 4
# Tokens before the first one that are decoded with it: some tokenizers decode a token otherwise where a text begins.
_CONTEXT = 8


class TextStream:
    """Decodes tokens one by one.

    Of the tokens at hand those up to `_said` have been said. Every decoding begins a few tokens before the ones that
    are waiting, and what is new is what it has behind the decoding without them.
    """

    def __init__(self, encoder: Encoder, prompt: Sequence[int]) -> None:
        """Begin behind a prompt.

        Args:
            encoder: the tokenizer.
            prompt: its tokens.
        """
        self._encoder = encoder
        self._tokens = list(prompt[-_CONTEXT:])
        self._context, self._said = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain by now, which may be empty."""
        self._tokens.append(token)
        text = self._waiting(len(self._tokens))
        if not text.endswith(_REPLACEMENT):
            return self._say(len(self._tokens), text)
        if len(self._tokens) - self._said < _MOST_TOKENS:
            return ""
        # What begins with the first of them cannot be a character any more.
        return self._say(self._said + 1, self._waiting(self._said + 1))

    def end(self) -> str:
        """The text that was held back: no more tokens come."""
        return self._say(len(self._tokens), self._waiting(len(self._tokens)))

    def _waiting(self, end: int) -> str:
        """The text of the tokens that are waiting, up to some place."""
        before = self._encoder.decode(self._tokens[self._context : self._said])
        return self._encoder.decode(self._tokens[self._context : end])[len(before) :]

    def _say(self, end: int, text: str) -> str:
        if end > self._said:
            self._context, self._said = self._said, end
        return text
