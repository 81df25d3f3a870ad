"""``bmm``: the group of commands. Each command's file is imported only when it is called."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from typing import Any

import click

COMMANDS = {
    "tune": "Search the best merge: the main command.",
    "merge": "One merge: plain, BMM at given hyperparameters, or a study's trial.",
    "calibrate": "Sample the posterior of a study: calibrated probabilities.",
    "save": "Write any trial of a study as a checkpoint.",
    "reconstruct": "One task's own model from a merge with masks.",
    "average": "Average the checkpoints of one training run.",
    "evaluate": "Score a checkpoint on every task.",
    "align": "Permute experts that share no base into one basin.",
    "gram": "Collect activation Grams into the cache.",
    "anchors": "List the merge methods, or show one with its knobs.",
    "inspect": "What is in these checkpoints, and do they agree?",
    "report": "Show a study: tables as text or JSON.",
}


class LazyGroup(click.Group):
    """Knows its commands by name and imports one when it is used: `bmm --help` loads neither torch nor ax."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        gc.disable()  # nothing is garbage yet, and looking for it takes a fifth of the time that torch needs to load
        try:
            return importlib.import_module(f"{__package__}.{name}").command
        finally:
            gc.enable()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if close:
                raise click.UsageError(f"no command {args[0]!r}; did you mean {close[0]}?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bmm-tuner", prog_name="bmm")
def bmm() -> None:
    """Merge N fine-tuned experts of one model into one that does it all.

    \b
    bmm tune --anchor tsv --budget 50            the embedded 8-task zoo
    bmm tune --recipe my.yaml                    your own models
    bmm merge --anchor ties --out merged         a plain merge
    bmm report runs/vit8-tsv-hybrid-seed0          what a study found
    """


def main(args: list[str] | None = None) -> None:
    """Entry point: errors are one line and a hint; exit codes 0 (done), 1 (failed), 2 (wrong usage)."""
    # A closed pipe (`bmm report | head`) ends the program quietly, as other tools do.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    debug = "--debug" in (sys.argv[1:] if args is None else args) or bool(os.environ.get("BMM_DEBUG"))
    try:
        code: Any = bmm.main(args=args, prog_name="bmm", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(_line(error), err=True)
        sys.exit(_code(error))


def _code(error: Exception) -> int:
    from bmm.errors import RecipeError

    return 2 if isinstance(error, RecipeError) else 1


def _line(error: Exception) -> str:
    from bmm.errors import BmmError

    if isinstance(error, BmmError):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}\n  hint: this is a bug or a full disk; --debug shows the traceback"
