"""The application, how a function becomes a command (its settings become options), and how it says what goes wrong."""

import inspect
import io
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from amprune import __version__
from amprune.cli.display import printable, stderr, stdout
from amprune.errors import AmpruneError, EvaluationError
from amprune.settings import read_recipe, settle

app = typer.Typer(
    name="amprune",
    help="Make open language models smaller and faster by removing attention heads and MLP neurons (AMP).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Hugging Face folder, hub id, .gguf file, or smollm2-135m.", metavar="MODEL")
]
Out = Annotated[Path, typer.Argument(help="Folder to write; appears whole or not at all.", metavar="OUT")]
Result = tuple[dict[str, Any], Callable[[], None]] | tuple[dict[str, Any], Callable[[], None], Callable[[], object]]
"""What a command returns: what `--json` prints, a function that prints it for people, and what is done then."""

_NUMBERS = {int: "whole numbers such as 1 or 1,8,32", float: "shares such as 0.2 or 0.1,0.2"}
_OWN = inspect.Parameter.KEYWORD_ONLY
_CONTEXT = inspect.Parameter("context", _OWN, annotation=typer.Context)
_RECIPE = inspect.Parameter(
    "recipe", _OWN, default=None,
    annotation=Annotated[Path | None, typer.Option(help="YAML file of options, such as OUT/amprune/recipe.yaml.")],
)  # fmt: skip
_JSON = inspect.Parameter(
    "as_json", _OWN, default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")],
)  # fmt: skip
_DEBUG = inspect.Parameter(
    "debug", _OWN, default=False, annotation=Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
)


def _print_version(value: bool) -> None:
    if value:
        stdout.print(f"amprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make open language models smaller and faster by removing attention heads and MLP neurons (AMP)."""


def command(
    name: str,
    *,
    recipe: bool = False,
    kept: Callable[[Any], Path] | None = None,
    again: str = "",
    otherwise: str = "nothing was left behind",
) -> Callable[[Callable[..., Result | None]], Callable[..., Result | None]]:
    """Makes a command of a function with arguments of its own, `settings` (a dataclass of options) among them.

    `--json` and `--debug` come to the options, and with `recipe` `--recipe`; what is given on the command line counts
    before what the recipe says. `kept(out)` is where an interrupted command keeps what it has; see `reported`.
    """

    def made(function: Callable[..., Result | None]) -> Callable[..., Result | None]:
        own = dict(inspect.signature(function).parameters)
        kind: Any = own.pop("settings").annotation if "settings" in own else None
        hints = {} if kind is None else get_type_hints(kind)
        options = {} if kind is None else {one.name: _option(one, hints[one.name]) for one in _in_order(kind)}

        def run(**values: Any) -> None:
            arguments = {name: values[name] for name in own}
            place = None if kept is None else kept(next(values[name] for name in ("out", "output") if name in own))
            with reported(values["debug"], kept=place, again=again, otherwise=otherwise):
                if kind is not None:
                    source = values["context"].get_parameter_source
                    given = [name for name in options if source(name).name != "DEFAULT"]
                    read = {name: _value(options[name], hints[name], values[name]) for name in given}
                    start = read_recipe(kind, values["recipe"]) if values.get("recipe") else None
                    arguments["settings"] = settle(kind, start, read)
                if (found := function(**arguments)) is not None:
                    if values["as_json"]:
                        sys.stdout.write(json.dumps(found[0], indent=2, ensure_ascii=False) + "\n")
                    else:
                        found[1]()
                    for finish in found[2:]:
                        finish()

        added = [one.replace(kind=_OWN) for one in own.values()]
        every = [*added, *options.values(), *([_RECIPE] if recipe else []), _JSON, _DEBUG, _CONTEXT]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # of which Typer reads the options
        run.__annotations__ = {one.name: one.annotation for one in every}
        run.__doc__ = function.__doc__
        app.command(name)(run)
        return function

    return made


@contextmanager
def reported(
    debug: bool, *, kept: Path | None = None, again: str = "", otherwise: str = "nothing was left behind"
) -> Iterator[None]:
    """Prints what goes wrong as one paragraph on stderr and exits with 1; tracebacks only with --debug.

    `kept` is where a command keeps what it has when it is interrupted; with the option `again` it goes on from there.
    `otherwise` is what holds where there is none.
    """
    for stream in (sys.stdout, sys.stderr):  # names may hold letters that the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("amprune").setLevel(logging.INFO)
    try:
        yield
    except AmpruneError as error:
        if debug:
            raise
        stderr.print(f"amprune: {error}", style="bold red", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        finished = kept is not None and kept.exists()
        option = f" with {again}" if again else ""
        left = f"what was finished is in {kept}, the same command{option} goes on from there" if finished else None
        stderr.print(f"amprune: interrupted; {left or otherwise}", soft_wrap=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        told = _of_the_disk(error) if isinstance(error, OSError) else f"unexpected {type(error).__name__}: {error}"
        stderr.print(f"amprune: {told} (--debug shows where)", style="bold red", soft_wrap=True)
        raise typer.Exit(1) from None


def _of_the_disk(error: OSError) -> str:
    """Says what the system refused: a name that no file can have, a disk that fails."""
    place = str(error.filename or "")
    shown = f"{place[:80]}... ({len(place):,} letters)" if len(place) > 200 else place
    return f"{shown}{': ' if shown else ''}{error.strerror or error}"


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _in_order(kind: Any) -> list[Field[Any]]:
    """Lists the fields of settings, those of the outermost class first, as a person would read them."""
    names = [name for part in kind.__mro__ for name in vars(part).get("__annotations__", {})]
    known = {one.name: one for one in fields(kind)}
    return [known[name] for name in dict.fromkeys(names)]


def _option(one: Field[Any], hint: Any) -> inspect.Parameter:
    """Makes of a field the parameter of which Typer makes an option."""
    more: Any = one.metadata
    default: Any = one.default
    kind, item = more.get("type") or _without_none(hint), _item(hint)
    if item is not None:
        kind, default = (list[str], None) if more.get("many") else (str, default and ",".join(map(str, default)))
    flags = more["flags"] or ((f"--{one.name.replace('_', '-')}",) if kind is bool and default is False else ())
    if default is None:
        kind = kind | None
    found = typer.Option(*flags, help=more["help"], metavar=more.get("metavar"))
    return inspect.Parameter(one.name, _OWN, default=default, annotation=Annotated[kind, found])


def _without_none(hint: Any) -> Any:
    """Returns the type of an option that may be left out."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        return Union[tuple(one for one in get_args(hint) if one is not type(None))]  # noqa: UP007
    return hint


def _item(hint: Any) -> Any:
    """Returns the type of the values of an option that holds several, else None."""
    hint = _without_none(hint)
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _value(option: inspect.Parameter, hint: Any, value: Any) -> Any:
    """Reads the values of an option that holds several: `1,8`, or the flag given again and again."""
    if (item := _item(hint)) is None and isinstance(value, list):
        return value[0] if len(value) == 1 else tuple(value)
    if item is None or value is None:
        return value
    several = isinstance(value, list)
    if several and item not in _NUMBERS:  # a path may hold a comma
        return tuple(value)
    texts = value if several else [value]
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if item not in _NUMBERS:
        return tuple(parts)
    try:
        return tuple(item(part) for part in parts)
    except ValueError:
        flag = next(iter(option.annotation.__metadata__[0].param_decls), f"--{option.name.replace('_', '-')}")
        raise EvaluationError(f"{flag} is {', '.join(texts)!r}, expected {_NUMBERS[item]}") from None
