"""The options of `mempar generate`; imports nothing heavy until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from mempar.errors import ConfigError

# What is generated unless one asks for more.
_MAX_TOKENS = 128
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint of any layout, or a run.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to continue; again for more texts.")
]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file with a text to continue; - reads standard input.")
]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens to generate at most.  \\[default: 128]", show_default=False)
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="Divides logits; 0 takes the likeliest.  \\[default: 0]", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Draw from the likeliest of this share.  \\[default: 1]", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Of what is drawn.  \\[default: 1]", show_default=False)]
Places = Annotated[str, typer.Option(help="In `memory`, or `mapped` from their files; `auto` maps what does not fit.")]
Bench = Annotated[
    bool, typer.Option("--bench", help="Measure tokens/s instead, beside the dense model of as many FLOPs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print texts or measurements as JSON.")]


def generate(
    checkpoint: Checkpoint,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    tables: Places = "auto",
    bench: Bench = False,
    as_json: AsJson = False,
) -> None:
    """Continue texts with a model, straight from a checkpoint of any layout; or measure how fast that is.

    A text ends at the end-of-document token, with the model's context, or after --max-tokens.
    """
    if bench:
        of_texts = {
            "--prompt": prompts,
            "--prompt-file": prompt_file,
            "--max-tokens": max_tokens,
            "--temperature": temperature,
            "--top-p": top_p,
            "--seed": seed,
        }
        given = [name for name, value in of_texts.items() if value not in (None, [])]
        if given:
            raise ConfigError(
                f"{', '.join(given)} with --bench: it measures on tokens of its own and generates no text; drop one of "
                "them."
            )
        from mempar.tools.generate.bench import bench as run_bench

        run_bench(checkpoint, tables=tables, as_json=as_json, say=typer.echo)
        return
    from mempar.tools.generate import command

    request = command.Request(
        checkpoint=checkpoint,
        prompts=tuple(prompts or ()),
        prompt_file=prompt_file,
        max_tokens=_MAX_TOKENS if max_tokens is None else max_tokens,
        temperature=0.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=1 if seed is None else seed,
        tables=tables,
        as_json=as_json,
    )
    command.generate(
        request,
        write=lambda text: typer.echo(text, nl=False),
        note=lambda text: typer.echo(text, err=True),
    )
