"""The command line: each command parses, imports what it needs, and hands over."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rlpost import errors
from rlpost.errors import RecipeError, RlpostError
from rlpost.recipe.secrets import hide
from rlpost.run.ending import ends_at_once, tell_launcher

app = typer.Typer(
    name="rlpost",
    help="Reinforcement-learning post-training for reasoning LLMs. `rlpost RECIPE` is short for `rlpost train RECIPE`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
rewards_app = typer.Typer(help="Look at reward functions and try them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rewards_app, name="rewards")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as learner.rollouts=20 or rewards.0.weight=2."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train. Usually started by `launch/run.sh launch/<topology>.yaml RECIPE`."""
    from rlpost.learner.watch import follow_launcher
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import refuse_unsound
    from rlpost.run.conclude import conclude, conclude_at_once, launch_command

    follow_launcher()
    loaded = load_recipe(recipe, overrides or ())
    launched = launch_command()
    try:
        refuse_unsound(loaded)
        from rlpost.run.loop import train as run  # imports torch: only for a recipe that is sound

        result = run(loaded)
    except KeyboardInterrupt:
        conclude_at_once(loaded.recipe.run_dir, launched)
        raise typer.Exit(130) from None
    conclude(result, recipe, launched, report=loaded.recipe.tracking.report)
    if result.failed is not None:
        raise result.failed
    # The main process alone says so: the launcher kills the others when one ends with an error, report or not.
    if result.interrupted and os.environ.get("RANK", "0") == "0":
        raise typer.Exit(130)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Plan for so many processes.")] = None,
    zero: Annotated[int, typer.Option(min=0, max=3, help="Plan for this DeepSpeed ZeRO stage.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe means: every value and its origin, the batch arithmetic, memory. Fails on any problem."""
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.plan.describe import make_plan, print_plan

    made = make_plan(load_recipe(recipe, overrides or ()), processes=processes, zero_stage=zero)
    print_plan(made, as_json=as_json)
    if made.problems:
        raise typer.Exit(RecipeError.exit_code)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint's folder, such as runs/<name>/checkpoints/step_100.")],
    overrides: Overrides = None,
) -> None:
    """Judge a checkpoint on the recipe's held-out prompts: pass@k and avg@k. The checkpoint's run says which these are."""
    from rlpost.evaluation.recipe import recipe_for
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import refuse_unsound

    loaded = recipe_for(load_recipe(recipe, overrides or ()), checkpoint.expanduser())
    refuse_unsound(loaded, learns=False)
    if loaded.recipe.data.has_pairs:
        from rlpost.evaluation.pairs import evaluate_pairs

        evaluate_pairs(loaded, checkpoint)
        return
    from rlpost.evaluation.checkpoint import evaluate_checkpoint

    evaluate_checkpoint(loaded, checkpoint)


@app.command()
def serve(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Where to listen. Whoever reaches it can replace the weights: see docs/rollouts.md.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
) -> None:
    """Start a rollout server for runs with rollout.engine.where=server, and keep it alive."""
    from rlpost.recipe.load import load_recipe
    from rlpost.recipe.rules.check import refuse_unsound
    from rlpost.run.serve import serve as run

    loaded = load_recipe(recipe, overrides or ())
    refuse_unsound(loaded, processes=1, learns=False)
    run(loaded, host=host, port=port, say=typer.echo)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder, such as runs/quickstart.")],
) -> None:
    """Draw a run's pictures and write its page, from metrics.jsonl."""
    from rlpost.tracking.report import write_report

    typer.echo(write_report(run_dir))


@app.command()
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not try to import vLLM and DeepSpeed (saves half a minute).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, what works on this machine, and what to do about the rest."""
    from rlpost.doctor import examine, print_findings

    raise typer.Exit(print_findings(examine(quick=quick), as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes (recipes/schema.json: editors complete and check recipes with it)."""
    from rlpost.recipe.schema import json_schema

    sys.stdout.write(json_schema())


@app.command("recipe-docs")
def recipe_docs() -> None:
    """Print the reference of all recipe keys (docs/recipe.md)."""
    from rlpost.recipe.schema import reference

    sys.stdout.write(reference())


@rewards_app.command("list")
def rewards_list() -> None:
    """List the ready-made rewards."""
    import ast

    from rlpost.scoring.load import list_rewards

    for name, file in sorted(list_rewards().items()):
        purpose = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        typer.echo(f"{name:20} {purpose.partition(chr(10))[0]}")


@rewards_app.command("try")
def rewards_try(
    function: Annotated[str, typer.Argument(metavar="FILE:FUNCTION", help="As in a recipe's rewards.N.function.")],
    samples: Annotated[
        Path, typer.Option(help="JSON lines with `prompt`, `completion` and the columns that the reward takes.")
    ],
    deadline: Annotated[float, typer.Option(min=0.01, help="Seconds that one completion may take.")] = 10.0,
    argument: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="A fixed keyword argument; repeatable.")
    ] = None,
    completions: Annotated[
        Literal["auto", "text", "messages"], typer.Option(help="As a recipe's rewards.N.completions.")
    ] = "auto",
    call: Annotated[Literal["sample", "group", "batch"], typer.Option(help="As a recipe's rewards.N.call.")] = "sample",
    timeout_score: Annotated[float | None, typer.Option(help="As a recipe's rewards.N.timeout_score.")] = None,
) -> None:
    """Run a reward function on samples, just as training would, and show every outcome."""
    from rlpost.recipe.load import parse_values
    from rlpost.scoring.tryout import run_tryout

    values = parse_values(argument or ())
    keys: dict[str, Any] = {"completions": completions, "call": call, "timeout_score": timeout_score}
    raise typer.Exit(run_tryout(function, samples, deadline, values, **keys))


def main(arguments: list[str] | None = None) -> None:
    """The entry point: prints errors that users can fix as one paragraph, and exits with their code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and _is_recipe(arguments[0]):
        arguments = ["train", *arguments]
    _quieten()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # launch/run.sh ignores Ctrl-C for the launcher, not for us
    with ends_at_once():
        try:
            _refuse_habits(arguments)
            app(args=arguments, prog_name="rlpost")
        except RlpostError as error:
            _print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)


def _refuse_habits(arguments: list[str]) -> None:
    """Raises RecipeError for `--learner.rollouts=3`, as others write it, and for a recipe without its ending."""
    for word in arguments:
        key = word.partition("=")[0]
        if word.startswith("--") and "." in key and "/" not in key:
            raise RecipeError(f"{word}: overrides are written without dashes: {word.removeprefix('--')}")
    first = next(iter(arguments), "")
    for ending in (".yaml", ".yml"):
        if first and not first.endswith(ending) and Path(first + ending).is_file():
            raise RecipeError(f"{first}: there is no such command or recipe. Did you mean {first}{ending}?")


def _quieten() -> None:
    """Before torch is imported: lets rlpost's own notes through, keeps libraries' chatter out, and threads from spinning."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that spin while another program (or vLLM's own pool) has the core make a CPU run many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A process that its launcher ends leaves semaphores, about which a helper of Python's would have the last word.
        given = os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (given, "ignore:resource_tracker:UserWarning")))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rlpost").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def _is_recipe(word: str) -> bool:
    """Whether the first word names a file rather than a command (a mistyped command gets the list of commands)."""
    return not word.startswith("-") and (word.endswith((".yaml", ".yml")) or os.sep in word or Path(word).is_file())


def _print_error(error: RlpostError) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, RecipeError):
        time.sleep(errors.LAST_WORD_S)
        return  # every process reads the same recipe: rank 0 says it
    prefix = f"[process {rank}] " if rank != "0" else ""
    text = errors.printable(hide("\n".join([str(error), *getattr(error, "__notes__", [])])))
    tell_launcher(f"{type(error).__name__}: {text}")
    if not sys.stderr.isatty():
        print(f"{prefix}{type(error).__name__}: {text}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    panel = Panel(Text(f"{prefix}{text}"), title=type(error).__name__, title_align="left", border_style="red")
    Console(stderr=True).print(panel)
