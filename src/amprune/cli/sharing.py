"""To the hub: push."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amprune.cli.display import emit, reported, stdout
from amprune.cli.options import Debug, Json, app, options_of

if TYPE_CHECKING:
    from amprune.serve.hub.run import PushedModel


@app.command("push")
def push_command(
    out: Annotated[Path, typer.Argument(help="Folder that amprune wrote; nothing in it is changed.", metavar="OUT")],
    repo: Annotated[
        str, typer.Argument(help="OWNER/NAME on the hub, or NAME for your own; made if missing.", metavar="REPO")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make REPO private; refused if it is public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; no login, no network.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made from main where it is missing (default: main).", metavar="BRANCH")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Commit also onto a repository that holds another model.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Share a checkpoint on the hub: weights, tokenizer, model card and records, in one commit."""
    options: dict[str, Any] = options_of(locals())
    with reported(debug, otherwise="nothing was committed"):
        from amprune import push

        result = push(**options)
        emit(result.to_dict(), as_json, lambda: _show(result))


def _show(result: "PushedModel") -> None:
    """Says what went, or what would go file by file."""
    sent, terms = result.url is not None, result.terms
    visible = {True: "private", False: "public", None: "public unless its owner's default is private"}[result.private]
    where = f"{result.repo} ({visible}), branch {result.revision or 'main'}"
    lines = [f"Pushed to {result.url}, commit {result.commit}"] if sent else [f"Would go to {where}:"]
    if not sent:
        lines += [f"{size:>16,}  {path}" for path, size in result.files.items()]
    lines.append(
        f"{f'{where}: ' if sent else ''}{len(result.files)} files, {result.bytes / 1e6:,.1f} MB; licence "
        f"{terms.license or 'not named'}, base model {', '.join(terms.base_model) or 'not named'}"
    )
    lines += [f"Not among them: {', '.join(result.left_out)}"] if result.left_out else []
    lines += [f"Removed there, of an earlier model: {', '.join(result.removed)}"] if result.removed else []
    lines += [] if sent else ["Nothing was sent."]
    stdout.print("\n".join(lines), markup=False)
