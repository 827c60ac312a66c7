"""The command line: each command is a few lines over the public functions.

Exit status: 0 done; 2 the user's mistake, every problem on standard error, one a line, or a library that isn't installed;
130 interrupted; 1 anything else, with the traceback under `--debug`, and what `verify` finds to differ. With `--json` standard
output holds one JSON document and nothing else. Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from interfuse import __version__
from interfuse.errors import MissingExtra, OptionError, Problem, UserError, nearest
from interfuse.extras import require

app = typer.Typer(
    name="interfuse",
    help="Several trained deep-learning models in, one better model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on standard output.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow python: references, which run code.")]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda. Left out: cuda for networks, if there is one; the CPU for merges.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"interfuse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """Several trained deep-learning models in, one better model out."""


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in YAML.", metavar="RECIPE")],
    out: Annotated[Path, typer.Argument(help="The output folder; it appears whole or not at all.", metavar="OUT")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="How many CPU threads to compute with.")] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge, or stages, that was killed.")] = False,
    overwrite: Overwrite = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Merge models that hold NaN or infinity.")] = False,
    mergekit_compat: Annotated[
        bool, typer.Option("--mergekit-compat", help="Do as mergekit does in the few places where we differ.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: merge, fuse, train and evaluate; write the result to a folder."""
    from interfuse.pipeline import run as run_recipe
    from interfuse.plan import uncollected

    with _clean(as_json), uncollected() if dry_run else nullcontext():
        record = run_recipe(
            recipe,
            out,
            overwrite=overwrite,
            resume=resume,
            trust_code=trust_code,
            seed=seed,
            threads=threads,
            device=device,
            dry_run=dry_run,
            allow_nonfinite=allow_nonfinite,
            mergekit_compat=mergekit_compat,
        )
    typer.echo(_document(record.to_dict()) if as_json else record.text(shutil.get_terminal_size((200, 24)).columns))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", metavar="NAME")] = None,
    level: Annotated[str | None, typer.Option(help="Only this level: weights, layers, features or outputs.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods; with NAME, one in full: what it does and needs, options with defaults and ranges, paper."""
    from interfuse.registry import methods as all_methods
    from interfuse.report.methods import described, in_full, listed

    known = all_methods()
    levels = list(dict.fromkeys(m.level for m in known))
    if level is not None and level not in levels:
        raise OptionError(Problem("--level", f"got {level!r}", nearest(level, levels)))
    found = [m for m in known if name in (None, m.name) and level in (None, m.level)]
    if name is not None and not found:
        raise OptionError(Problem("NAME", f"no method is named {name!r}", nearest(name, [m.name for m in known])))
    if as_json:
        typer.echo(_document(list(map(described, found))))
    elif name is not None:
        typer.echo("\n\n".join(map(in_full, found)))
    else:
        typer.echo(listed(found, shutil.get_terminal_size((120, 24)).columns))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Output folders, recipes, or models (a folder, a hub id, python:module:function).", metavar="RUN"),
    ],
    data: Annotated[str, typer.Option(help="The test data: a file, a folder, or a hub id.")],
    metric: Annotated[str | None, typer.Option(help="Left out: accuracy for classes, mse for numbers.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the table and its plots as one HTML page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    device: Device = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs (or recipes, which are run first) on the same test data: quality, size, speed, memory."""
    from interfuse.pipeline import compare_runs

    _check_pages(html, markdown)
    with _clean(as_json):
        comparison = compare_runs(runs, data, metric=metric, trust_code=trust_code, device=device)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(comparison.markdown(), encoding="utf-8")
    if html is not None:
        from interfuse.report.html import write_report

        write_report(comparison, html)
    if as_json:
        typer.echo(comparison.json())
    else:
        _print(comparison)


@app.command()
def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tuned model: a folder, a file of weights, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The adapter's folder; it appears whole or not at all.", metavar="OUT")],
    base: Annotated[str, typer.Option(help="What the model was fine-tuned from.")],
    rank: Annotated[int, typer.Option(min=1, help="The most that a matrix's factors may have.")] = 16,
    energy: Annotated[
        float | None, typer.Option(help="The share of each change's squared norm that is enough; it may take less rank.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="peft's lora_alpha. Left out: the rank, so that the scale is 1.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="A pattern of the tensors to take; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A pattern of tensors to leave out; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="The factors' type.")] = "float32",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a LoRA adapter for peft out of a fine-tuned model and its base, and say how much of each change it keeps."""
    from interfuse.engine.adapters.extract import extract_lora as extract

    with _clean(as_json):
        extraction = extract(
            model,
            base,
            out,
            rank=rank,
            energy=energy,
            alpha=alpha,
            include=include or (),
            exclude=exclude or (),
            dtype=dtype,
            overwrite=overwrite,
        )
    typer.echo(_document(extraction.to_dict()) if as_json else extraction.text())


@app.command()
def moe(
    recipe: Annotated[Path, typer.Argument(help="A recipe as mergekit-moe's, in YAML (docs/moe.md).", metavar="RECIPE")],
    out: Annotated[Path, typer.Argument(help="The output folder; it appears whole or not at all.", metavar="OUT")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="How many CPU threads to copy with.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the base reads prompts: cpu or cuda. Left out: cuda if there is one.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's seed.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put dense models together into a mixture of experts, with a router from prompts."""
    from interfuse.mixture import moe as make

    with _clean(as_json):
        made = make(recipe, out, overwrite=overwrite, seed=seed, threads=threads, device=device, dry_run=dry_run)
    typer.echo(_document(made.to_dict()) if as_json else made.text())


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="An output folder of a run.", metavar="OUT")],
    file: Annotated[Path, typer.Argument(help="What to write: FILE.onnx, or FILE.pt2 for torch.export.", metavar="FILE")],
    data: Annotated[str | None, typer.Option(help="Examples of the inputs. Left out: the data of the folder's recipe.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder's network as one file that runs without its code, and check that it computes the same."""
    from interfuse.pipeline.exported import export_run

    with _clean(as_json):
        record = export_run(out, file, data=data, trust_code=trust_code, overwrite=overwrite)
    typer.echo(_document(record.to_dict()) if as_json else str(record))


@app.command()
def verify(
    out: Annotated[
        Path, typer.Argument(help="The output folder of a merge, a mixture, a transplant or an adapter.", metavar="OUT")
    ],
    again: Annotated[bool, typer.Option("--again", help="Also make it once more, and compare bit for bit.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="How many CPU threads that run has.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check a folder against its record: tensors, files, recipe and the models it was made from. Exit status 1: it differs."""
    from interfuse.pipeline import verify as check

    with _clean(as_json):
        found = check(out, again=again, threads=threads, device=device)
    typer.echo(_document(found.to_dict()) if as_json else found.text())
    if not found.good:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from interfuse.recipe import recipe_schema

    typer.echo(_document(recipe_schema()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the demo's report and models.")] = Path("demo-out"),
    overwrite: Overwrite = False,
) -> None:
    """Fuse real pretrained networks on real data, compare them with their parents, and write the report."""
    from interfuse.demo.main import demo as run_demo

    run_demo(out, overwrite)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `interfuse` command; ends in `SystemExit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="interfuse")
    except (UserError, MissingExtra) as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as end:  # typer ends every command with one
        sys.exit(_interrupted() if end.code == INTERRUPTED else end.code)
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename is not None:  # a file's own fault, which a traceback doesn't explain
            typer.echo(str(Problem(str(error.filename), f"can't be read or written: {error.strerror}")), err=True)
            sys.exit(2)
        first = str(error).partition("\n")[0]
        typer.echo(f"{type(error).__name__}: {first} (more with interfuse --debug ...)", err=True)
        sys.exit(1)


def _interrupted() -> int:
    typer.echo("interrupted; nothing was written", err=True)
    return INTERRUPTED


def _clean(as_json: bool) -> AbstractContextManager[Any]:
    """With `--json`, what libraries and the user's code print goes to standard error."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _check_pages(html: Path | None, markdown: Path | None) -> None:
    """That the pages can be made and written, before the models are compared."""
    problems = [
        Problem(name, f"{path} is a folder", "name a file in it")
        for name, path in (("--html", html), ("--markdown", markdown))
        if path is not None and path.is_dir()
    ]
    if problems:
        raise OptionError(*problems)
    if html is not None:
        for library in ("matplotlib", "jinja2"):
            require(library)


def _document(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _print(renderable: Any) -> None:
    """Print a table: as wide as the terminal, and off one as wide as it has to be."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(renderable)
