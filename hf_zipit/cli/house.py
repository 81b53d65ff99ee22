"""The look and the habits of Hugging Face's command lines, from `huggingface_hub.typer_factory`.

The factory takes `--format`, `--json` and `-q` out of the arguments of a command and keeps them in an object of its
own, which is private. It leaves them to commands that declare `--format` themselves, so every command that prints
results does, beside a `--json` that is short for `--format json`. The factory reads annotations as they are, so those
that are texts are evaluated first.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import click
import typer
from click.exceptions import NoArgsIsHelpError
from huggingface_hub import typer_factory

from hf_zipit import __version__

Command = TypeVar("Command", bound=Callable[..., None])
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="How results are printed.")]


class CommandGroup(type(typer_factory(help=""))):  # type: ignore[misc] - the class is private, what it makes is not
    """A group whose commands end with 2 where their arguments are missing, as every wrong use does."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, ...]:
        name, command, rest = super().resolve_command(ctx, args)
        if not rest and any(isinstance(p, click.Argument) and p.required for p in command.params):
            raise NoArgsIsHelpError(command.context_class(command, info_name=name, parent=ctx))
        return name, command, rest


class Commands:
    """A group of commands: a console script is a call of it.

    Args:
        help: what the script is for, in one sentence.
        epilog: what stands below the list of commands.
    """

    def __init__(self, help: str, epilog: str) -> None:
        self.group = typer_factory(help=help, epilog=epilog, cls=CommandGroup)
        click.version_option(__version__, message="%(prog)s %(version)s")(self.group)

    def __call__(self, name: str) -> None:
        """Run the command that the script's arguments name. Raises KeyboardInterrupt and what commands raise."""
        try:
            code = self.group(prog_name=name, standalone_mode=False)
        except click.Abort as error:  # what click makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        if code:
            sys.exit(code)

    def command(self, *examples: str, topic: str = "main", name: str | None = None) -> Callable[[Command], Command]:
        """Register a function as a command; its keyword `as_json` is set by `--json` and by `--format json`.

        Args:
            examples: calls, for the end of its help.
            topic: under which head it stands in the list of commands.
            name: of the command, where it is not the function's.
        """

        def register(function: Command) -> Command:
            signature = inspect.signature(function, eval_str=True)
            if "as_json" in signature.parameters:
                added = inspect.Parameter("format", inspect.Parameter.KEYWORD_ONLY, default="table", annotation=Format)
                signature = signature.replace(parameters=[*signature.parameters.values(), added])

            @functools.wraps(function)
            def run(**arguments: Any) -> None:
                check_required(click.get_current_context(), arguments)
                if "format" in arguments:
                    arguments["as_json"] |= arguments.pop("format") == "json"
                function(**arguments)

            run.__signature__ = signature  # type: ignore[attr-defined]
            lines = "\n".join(("Examples", *(f"  $ {example}" for example in examples)))
            self.group.command(name or function.__name__, topic=topic, epilog=lines if examples else None)(run)
            return function

        return register


def check_required(context: click.Context, arguments: Mapping[str, Any]) -> None:
    """Raise for a missing option that has to be given: its default is None here, which click takes for a value."""
    for parameter in context.command.params:
        if parameter.required and arguments[str(parameter.name)] is None:
            raise click.MissingParameter(ctx=context, param=parameter)
