"""How many sequences are computed at a time: what the user says, or what follows from the logits that they take."""

from dataclasses import dataclass

# Logits of a batch at the most, in numbers: float32 of them twice, .5 GB.
_MOST_LOGITS = 1 << 26
_MOST_ROWS = 64
_MOST_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sequences at a time.

    Attributes:
        given: by the user; None for what follows from the model.
        embeddings: V, of the model.
    """

    given: int | None
    embeddings: int

    def rows(self, length: int) -> int:
        """Of rows of a length, whose logits are all needed."""
        return self.given or max(1, min(_MOST_ROWS, _MOST_LOGITS // (length * self.embeddings)))

    def prompts(self, length: int) -> int:
        """Of prompts, of which the last token's logits are needed, and keys and values are kept."""
        return self.given or _MOST_PROMPTS
