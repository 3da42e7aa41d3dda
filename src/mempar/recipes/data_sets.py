"""Public text that recipes are trained on: where it is, how it is prepared, and in which shares it is mixed.

The published runs used mixes "like" Llama 2's and Llama 3's that were never released. The shares here are those that
were published for LLaMA (arXiv 2302.13971, table 1) and for Llama 3 (arXiv 2407.21783, section 3.1.2), drawn from sets
on the Hugging Face hub. Where a set is smaller than its share of 1T tokens it is read several times, as LLaMA did.
Names, files and columns are those that the sets' own pages state. Nothing here downloads anything.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

RAW = "data/raw"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set on the hub, or a part of one.

    Attributes:
        repository: its name on the hub.
        include: patterns of the files to take.
        exclude: patterns of files among them to leave.
        field: column or key of the text.
        license: in short; the set's page has the whole.
        gated: whether its terms must be accepted on its page, and `hf auth login` called, first.
        note: what else to know; empty for nothing.
    """

    repository: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    field: str = "text"
    license: str
    gated: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Data sets with their shares of the tokens, as a tokenizer sees them.

    Attributes:
        tokenizer: in the grammar of `data.tokenizer`.
        folder: of the prepared data; each set is the prefix `folder/NAME`.
        weights: share of each set, by its name in `DATA_SETS`; they add up to one.
    """

    tokenizer: str
    folder: str
    weights: Mapping[str, float]

    @property
    def paths(self) -> tuple[str, ...]:
        """For `data.paths`: relative to where a run is started."""
        return tuple(f"{self.folder}/{name}" for name in self.weights)


_WIKIPEDIA_LANGUAGES = (
    "bg", "ca", "cs", "da", "de", "en", "es", "fr", "hr", "hu",
    "it", "nl", "pl", "pt", "ro", "ru", "sl", "sr", "sv", "uk",
)  # fmt: skip
_FINEWEB2_LANGUAGES = (
    "cmn_Hani", "deu_Latn", "fra_Latn", "ita_Latn", "jpn_Jpan", "por_Latn", "rus_Cyrl", "spa_Latn",
)  # fmt: skip

DATA_SETS = {
    "fineweb": DataSet(
        repository="HuggingFaceFW/fineweb",
        include=("data/CC-MAIN-2023-*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
        note="the five crawls of 2023",
    ),
    "fineweb_edu": DataSet(
        repository="HuggingFaceFW/fineweb-edu",
        include=("sample/350BT/*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
    ),
    "dclm": DataSet(
        repository="mlfoundations/dclm-baseline-1.0-parquet",
        include=("*/global-shard_01_of_10/*",),
        license="CC BY 4.0",
        note="a tenth of it",
    ),
    "c4": DataSet(
        repository="allenai/c4",
        include=("en/c4-train.*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
    ),
    "starcoderdata": DataSet(
        repository="bigcode/starcoderdata",
        include=("*.parquet",),
        exclude=("git-commits*", "github-issues*", "jupyter*"),
        field="content",
        license="permissive licences of the files; terms of The Stack",
        gated=True,
    ),
    "wikipedia": DataSet(
        repository="wikimedia/wikipedia",
        include=tuple(f"20231101.{language}/*" for language in _WIKIPEDIA_LANGUAGES),
        license="CC BY-SA 3.0 and GFDL",
        note="the 20 languages of LLaMA",
    ),
    "gutenberg": DataSet(
        repository="common-pile/project_gutenberg_filtered",
        include=("*.json.gz",),
        license="public domain in the USA",
    ),
    "arxiv": DataSet(
        repository="EleutherAI/proof-pile-2",
        include=("arxiv/train/*",),
        license="those of the papers",
    ),
    "stackexchange": DataSet(
        repository="common-pile/stackexchange_filtered",
        include=("*.json.gz",),
        license="CC BY-SA 2.5 to 4.0",
    ),
    "finemath": DataSet(
        repository="HuggingFaceTB/finemath",
        include=("finemath-3plus/*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
    ),
    "infiwebmath": DataSet(
        repository="HuggingFaceTB/finemath",
        include=("infiwebmath-3plus/*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
    ),
    "open_web_math": DataSet(
        repository="open-web-math/open-web-math",
        include=("data/*",),
        license="ODC-By 1.0, Common Crawl's terms of use",
    ),
    "algebraic_stack": DataSet(
        repository="EleutherAI/proof-pile-2",
        include=("algebraic-stack/train/*",),
        license="permissive licences of the files",
    ),
    "fineweb2": DataSet(
        repository="HuggingFaceFW/fineweb-2",
        include=tuple(f"data/{language}/train/00?_*" for language in _FINEWEB2_LANGUAGES),
        license="ODC-By 1.0, Common Crawl's terms of use",
        note="the first files of eight languages",
    ),
}

# LLaMA's table 1; English CommonCrawl, C4, GitHub, Wikipedia, books, arXiv, Stack Exchange.
LLAMA2_MIX = Mix(
    tokenizer="hf:meta-llama/Llama-2-7b-hf",
    folder="data/llama2",
    weights={
        "fineweb": 0.67,
        "c4": 0.15,
        "starcoderdata": 0.045,
        "wikipedia": 0.045,
        "gutenberg": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    },
)
# Llama 3: about 50% general knowledge, 25% mathematics and reasoning, 17% code, 8% other languages.
LLAMA3_MIX = Mix(
    tokenizer="hf:meta-llama/Meta-Llama-3-8B",
    folder="data/llama3",
    weights={
        "dclm": 0.22,
        "fineweb_edu": 0.20,
        "wikipedia": 0.03,
        "gutenberg": 0.03,
        "stackexchange": 0.02,
        "finemath": 0.10,
        "infiwebmath": 0.06,
        "open_web_math": 0.04,
        "arxiv": 0.04,
        "algebraic_stack": 0.01,
        "starcoderdata": 0.17,
        "fineweb2": 0.08,
    },
)

# Whose terms must be accepted first, as those of gated data sets.
GATED_TOKENIZERS = (LLAMA2_MIX.tokenizer, LLAMA3_MIX.tokenizer)


def commands_of(name: str, *, tokenizer: str, prefix: str) -> list[str]:
    """Say how a data set is fetched and prepared.

    Args:
        name: in `DATA_SETS`.
        tokenizer: in the grammar of `data.tokenizer`.
        prefix: of the result, as in `data.paths`.

    Returns:
        Two lines for a shell, to be called where the run is started.
    """
    wanted, raw = DATA_SETS[name], f"{RAW}/{name}"
    choice = [part for pattern in wanted.include for part in ("--include", pattern)]
    choice += [part for pattern in wanted.exclude for part in ("--exclude", pattern)]
    fetch = ["hf", "download", wanted.repository, "--repo-type", "dataset", *choice, "--local-dir", raw]
    make = ["mempar", "prepare", raw, "--tokenizer", tokenizer, "--out", prefix, "--field", wanted.field]
    return [shlex.join(fetch), shlex.join(make)]
