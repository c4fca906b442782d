"""The command line: each verb parses its arguments, calls one function, and prints its value."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compress.errors import Interrupted, RecipeError, UsageError
from compress.exits import status_of

DEBUG = "--debug"
STOPPED = "Nothing half-made is in place. Run it again: `apply` goes on from its last finished pass."


class Listed(StrEnum):
    """What `list` lists."""

    recipes = "recipes"
    passes = "passes"
    targets = "targets"


class Verbs(TyperGroup):
    """The verbs, with Ctrl-C as an error like others (typer would end without a word)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("Stopped.", STOPPED) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="A model folder or a name on the hub, for the recipe's.")
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="Calibrate on this: a text file, a table, or a folder of pictures."),
]
TrainingData = Annotated[
    Path | None,
    typer.Option("--training", help="Train on this: a text file, a table, or a folder of pictures."),
]
Device = Annotated[str, typer.Option("--device", help="Where passes run: cpu, cuda, cuda:1, ...")]
Out = Annotated[Path | None, typer.Option("--out", help="The new folder to write; build/NAME by default.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Task = Annotated[str | None, typer.Option("--task", help="The model's task, such as text-classification.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from compress.versions import package_versions

        for package, version in package_versions().items():
            typer.echo(f"{package} {version}")
        raise typer.Exit


@app.callback()
def modelpress(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and leave."),
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Print the traceback of any error.")] = False,
) -> None:
    """Compress Hugging Face models with recipes, export them to ONNX and TensorRT, and prove the result."""
    del version, debug


@app.command()
def apply(
    recipe: RecipeName,
    model: ModelName = None,
    task: Task = None,
    out: Out = None,
    calibration: Calibration = None,
    training: TrainingData = None,
    device: Device = "cpu",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="For a model larger than memory: its one pass block by block, no export."
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Compress, export and prove a model as a recipe says."""
    from compress.console import hush, output, progress
    from compress.recipe import recipe_path

    wanted = _recipe(recipe, model, task, calibration, training)
    hush()
    from compress.build import build, require_accepted, take_part
    from compress.processes import is_main
    from compress.summary import tables

    into = out or Path("build") / recipe_path(recipe).stem
    if stream:
        _stream(wanted, into, device, force)
        return
    if not is_main():
        take_part(wanted, into, device)
        return
    with progress() as observer:
        manifest = build(wanted, into, device=device, observer=observer, force=force)
    for table in tables(manifest):
        output().print(table)
    output().print(f"Written to {manifest.folder}.", markup=False)
    require_accepted(manifest)


def _stream(recipe: Any, into: Path, device: str, force: bool) -> None:
    from compress.console import output, progress
    from compress.processes import is_main
    from compress.progress import SILENT
    from compress.streaming import stream
    from compress.summary import skips_table, steps_table

    with progress() as observer:
        told = observer if is_main() else SILENT
        step = stream(recipe.model.name, recipe, into, device=device, force=force, observer=told)
    if is_main():
        for table in (steps_table([step]), skips_table([step])):
            output().print(table)
        output().print(f"Written to {into}.", markup=False)


@app.command()
def validate(recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...")]) -> None:
    """Check recipes without loading a model."""
    from compress.recipe import load_recipe, require_files, require_labelled

    problems = []
    for name in recipes:
        try:
            recipe = load_recipe(name)
            require_files(recipe)
            require_labelled(recipe)
        except UsageError as error:
            problems.append(error)
        else:
            typer.echo(f"{name}: ok ({recipe.summary})")
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise RecipeError(
            "\n".join(problem.fact for problem in problems), f"{len(problems)} recipes are wrong."
        )


@app.command()
def plan(
    recipe: RecipeName,
    model: ModelName = None,
    task: Task = None,
    calibration: Calibration = None,
    training: TrainingData = None,
) -> None:
    """Say what each pass would touch and skip, and what a build would cost. Writes nothing."""
    from compress.console import hush, output, progress

    wanted = _recipe(recipe, model, task, calibration, training)
    hush()
    from compress.plan import plan as make_plan
    from compress.summary import skips_table, steps_table

    with progress() as observer:
        planned = make_plan(wanted, observer)
    for table in (steps_table(planned.steps), skips_table(planned.steps)):
        output().print(table)
    output().print(
        f"A build takes about {planned.seconds:.0f} s, {planned.peak_bytes / 1e9:.1f} GB of memory"
        f" and {planned.disk_bytes / 1e6:.0f} MB of disk."
    )


def _recipe(
    name: str, model: str | None, task: str | None, calibration: Path | None, training: Path | None
) -> Any:
    from compress.recipe import load_recipe, require_complete

    recipe = load_recipe(name).with_model(model, task)
    recipe = recipe.with_calibration(calibration) if calibration else recipe
    recipe = recipe.with_training(training) if training else recipe
    require_complete(recipe)
    return recipe


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    task: Task = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Print instead where activations have outliers.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Of --outliers: the data to run; random by default.")
    ] = None,
    in_json: Annotated[bool, typer.Option("--json", help="Of --outliers: print JSON.")] = False,
) -> None:
    """Print the structure of a model as a tree, with parameters, bytes and MACs of each part."""
    from compress.console import hush, output, progress
    from compress.options import require_with

    require_with("--outliers", outliers, {"--calibration": calibration is not None, "--json": in_json})
    hush()
    from compress.checkpoint import open_model
    from compress.inspection import as_tree, inspect
    from compress.outliers import as_json, as_table, outliers_at
    from compress.progress import task as running

    with progress() as observer, running(observer, f"trace {model}"):
        opened = open_model(model, task)
        found = outliers_at(opened, calibration) if outliers else ()
        printed = as_table(found) if outliers else as_tree(inspect(opened))
    if in_json:
        typer.echo(as_json(found))
    else:
        output().print(printed)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_CHECKPOINT")],
    to: Annotated[
        str, typer.Option("--to", help="The target: onnx, tensorrt, ... (`modelpress list targets`).")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    task: Task = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, float16 or int8. int8 quantizes a float model, on --calibration."),
    ] = None,
    calibration: Calibration = None,
    runtime: Annotated[str | None, typer.Option(help="Of onnx: cpu or standard.")] = None,
    edition: Annotated[str | None, typer.Option(help="Of tensorrt: rtx or datacenter.")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Of tensorrt rtx, repeatable: 7.5, 8.6, 8.9, 12.0.")
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="Of tensorrt: batch=1:8:32,sequence=16:128:512 (smallest, usual, largest).")
    ] = "",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, repeatable.")
    ] = None,
    force: Force = False,
) -> None:
    """Export a model or a checkpoint to one target."""
    from compress import options
    from compress.console import hush, output, progress
    from compress.folders import require_free

    require_free(out, force)
    named = {"runtime": runtime, "edition": edition, "compute_capability": compute_capability}
    settings = {**named, "shapes": options.profiles(shapes), **options.settings(setting or ())}
    hush()
    from compress.exporting import as_table, export_model

    with progress() as observer:
        artifact = export_model(
            model,
            to,
            settings,
            out,
            task_name=task,
            precision=precision,
            calibration=calibration,
            force=force,
            observer=observer,
        )

    output().print(as_table(artifact))
    output().print(f"Written to {out}.", markup=False)


@app.command()
def compare(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT")],
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE")],
    shape: Annotated[str, typer.Option(help="Sizes of the inputs, batch and sequence.")] = "16x128",
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds, one process each.")] = 3,
    calls: Annotated[int, typer.Option(min=1, help="Calls a round, of which the median counts.")] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Compare two exported models: outputs, speed in alternating rounds, and size."""
    from compress.console import hush, output, progress
    from compress.options import sizes

    wanted = sizes(shape)
    hush()
    from compress.contest import as_table, contest

    settings = {"rounds": rounds, "calls": calls, "threads": threads}
    with progress() as observer:
        found = contest(artifact, baseline, wanted, **settings, observer=observer)
    output().print(as_table(found, shape))


@app.command("show-tokens")
def show_tokens(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    model: Annotated[str, typer.Option("--model", help="A checkpoint, a model folder or a name on the hub.")],
    task: Task = None,
    method: Annotated[
        str | None, typer.Option(help="With --keep: transform (the default), tome, prune, sample or cluster.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Apply merge_tokens first; the share of multiply-accumulates left.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The new PNG file; build/IMAGE-tokens.png by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")] = False,
) -> None:
    """Draw which patches of a picture become one token in a model with merge_tokens."""
    from compress.console import hush, output, progress

    into = out or Path("build") / f"{image.stem}-tokens.png"
    hush()
    from compress.showing import draw_tokens

    with progress() as observer:
        draw_tokens(
            image, model, into, task_name=task, method=method, keep=keep, force=force, observer=observer
        )
    output().print(f"Written to {into}.", markup=False)


@app.command("list")
def list_(what: Listed) -> None:
    """List the shipped recipes, or the installed passes or targets."""
    from compress.listing import summaries

    found = summaries(what.value)
    width = max(map(len, found), default=0)
    for name, summary in found.items():
        typer.echo(f"{name:{width}}  {summary}")


@app.command()
def show(name: str) -> None:
    """Print a shipped recipe, or the settings of a pass or target."""
    from compress.listing import described

    typer.echo(described(name))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from compress.recipe import schema

    typer.echo(json.dumps(schema(), indent=1))


def run(arguments: list[str]) -> int:
    """Run a command line (without the program's name) and give its exit status."""
    command = typer.main.get_command(app)
    rest = [argument for argument in arguments if argument != DEBUG]
    return status_of(lambda: command(rest, prog_name="modelpress"), debug=len(rest) < len(arguments))


def main() -> None:
    """The program `modelpress`."""
    sys.exit(run(sys.argv[1:]))
