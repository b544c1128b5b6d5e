"""The command line. Every command is a thin layer over Python functions; `inspect`, `rewrite` and `compile` over those of the same name."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from swacompile import cli_bench, cli_tuning, pipeline
from swacompile.attention import BandProof, Kind, Refutation
from swacompile.cli_tuning import records_folder
from swacompile.errors import SwacompileError
from swacompile.pipeline import Emit
from swacompile.report.findings import as_json, explain, print_findings, print_outcomes
from swacompile.target import target_named
from swacompile.tuning.database import Database

NOTHING_DONE = 1
BAD_INPUT = 2

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
)
WIDE = 150  # columns where stdout is a file or a pipe

out, err = Console(width=None if sys.stdout.isatty() else WIDE), Console(stderr=True)

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="An exported model: .onnx (weights inside or in external data files), or .pt2."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON document instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Global = Annotated[bool, typer.Option("--global", help="Replace attention without a window too.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every decision to stderr.")]


@app.callback()
def _main(verbose: Verbose = False) -> None:
    """Find sliding-window attention in exported models, prove it, and run it with banded kernels.

    Exit codes: 0 done, 1 nothing to do or all refused, 2 bad input.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command()
def inspect(model: Model, as_document: Json = False) -> None:
    """List every attention of a model with its window and the proof, or the reason why there is none.

    Example: `swacompile inspect mistral.onnx`
    """
    with err.status(f"reading {model.name}"):
        inspection = pipeline.inspect(model)
    if as_document:
        _print_json(as_json(str(model), inspection.findings))
    else:
        print_findings(out, str(model), inspection.findings)
    windowed = [f for f in inspection.findings if isinstance(f.verdict, BandProof) and f.verdict.kind is not Kind.FULL]
    raise typer.Exit(0 if windowed else NOTHING_DONE)


@app.command()
def rewrite(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The model to write.")],
    emit: Annotated[
        Emit,
        typer.Option(
            help="What to put in: our operator with a portable body, the standard Attention, or ORT's GroupQueryAttention."
        ),
    ] = Emit.BANDED,
    full: Global = False,
    force: Force = False,
    as_document: Json = False,
) -> None:
    """Write the model with every proven sliding-window attention replaced. The source is not changed.

    Example: `swacompile rewrite mistral.onnx -o mistral.banded.onnx`
    """
    with err.status(f"rewriting {model.name}"):
        done = pipeline.rewrite(model, output, emit=emit, full=full, force=force)
    if as_document:
        _print_json(_rewrite_document(done))
    else:
        print_outcomes(out, done.outcomes)
        out.print(
            f"wrote {done.out}: {len(done.replaced)} attentions replaced"
            if done.out
            else "nothing to replace, nothing written",
            soft_wrap=True,
        )
    if emit is Emit.ORT_GQA and done.replaced:
        err.print(
            "note: run this file with ONNX Runtime 1.24 or later: up to 1.23, GroupQueryAttention lets every query see one key more",
            soft_wrap=True,
        )
    raise typer.Exit(0 if done.replaced else NOTHING_DONE)


@app.command(name="compile")
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="The hardware, as `swacompile targets` lists it; may be given several times. Default: this machine's CPU."
        ),
    ] = None,
    full: Global = False,
    force: Force = False,
    as_document: Json = False,
) -> None:
    """Write a folder with the rewritten model and a kernel library; `swacompile.load` runs it.

    Example: `swacompile compile mistral.onnx -o mistral.swa`
    """
    with err.status(f"compiling {model.name}") as status:
        done = pipeline.compile(
            model,
            output,
            targets=[target_named(name) for name in target or ()],
            database=Database(folders=(records_folder(),)),
            full=full,
            force=force,
            progress=lambda step: status.update(step),
        )
    if as_document:
        _print_json(_rewrite_document(done.rewrite) | {"manifest": done.manifest.document() if done.manifest else None})
    else:
        print_outcomes(out, done.rewrite.outcomes)
        for choice in done.choices:
            out.print(f"tuning {choice}", soft_wrap=True, highlight=False)
        kernels = ", ".join(done.manifest.kernels) if done.manifest else ""
        out.print(
            f"wrote {output}: kernels {kernels}" if done.manifest else "nothing to replace, nothing written",
            soft_wrap=True,
        )
    raise typer.Exit(0 if done.rewrite.replaced else NOTHING_DONE)


cli_bench.register(app)
cli_tuning.register(app)


def _rewrite_document(done: pipeline.Rewrite) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model": str(done.model),
        "output": str(done.out) if done.out else None,
        "replaced": [outcome.site.node for outcome in done.replaced],
        "kept": [
            {"node": outcome.node, "code": outcome.code, "reason": explain(outcome)}
            for outcome in done.outcomes
            if isinstance(outcome, Refutation)
        ],
    }


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def main() -> None:
    """Entry point: a user's mistake becomes one message on stderr and exit code 2."""
    # torch's own classes, when a program is copied. Nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    try:
        app()
    except SwacompileError as error:
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
