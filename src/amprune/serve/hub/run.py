"""OUT -> a commit on the hub: checks, contents, repository, commit, in order. START HERE in this folder."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from amprune import __version__
from amprune.prove.card import CARD
from amprune.serve.hub.checks import Terms, check_card, check_folder, check_name, concerns, read_terms
from amprune.serve.hub.contents import shortened_files, what_goes
from amprune.serve.hub.repository import check_repository, commit, find_repository, make_repository
from amprune.settings import PathLike, PushSettings, settle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushedModel:
    """What `push` returns; of a dry run what would have gone."""

    repo: str
    """With its owner, where the hub was asked."""
    revision: str | None
    private: bool | None
    """None where the owner's default would decide."""
    files: dict[str, int]
    """Paths and sizes in bytes."""
    terms: Terms
    left_out: tuple[str, ...]
    """Files of OUT that do not go; hidden ones are not counted."""
    shortened: dict[str, tuple[str, ...]]
    """Files in which paths of this machine were cut down to their last name, and in which fields or lines."""
    concerns: tuple[str, ...]
    """What the card should say and does not."""
    removed: tuple[str, ...] = ()
    """Files of an earlier model that the commit removed."""
    url: str | None = None
    """Address of the repository; None of a dry run."""
    commit: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "repo": self.repo, "url": self.url, "commit": self.commit, "revision": self.revision,
            "private": self.private, "license": self.terms.license, "license_name": self.terms.license_name,
            "license_link": self.terms.license_link, "base_model": list(self.terms.base_model), "bytes": self.bytes,
            "files": [{"path": path, "bytes": size} for path, size in self.files.items()],
            "removed": list(self.removed), "left_out": list(self.left_out),
            "shortened": {path: list(fields) for path, fields in self.shortened.items()},
            "concerns": list(self.concerns),
        }  # fmt: skip


def push(
    out: PathLike,
    repo: str,
    settings: PushSettings | None = None,
    *,
    client: HfApi | None = None,
    **options: Any,
) -> PushedModel:
    """Commits a checkpoint that amprune wrote to a repository of the hub, which is made where it is missing.

    All goes in one commit, or nothing does. The model card goes as it is; in records and configs absolute paths are
    cut down to their last name. Nothing in OUT is changed.

    Args:
        out: a verified or recovered checkpoint.
        repo: owner/name, or a name of the user's own.
        settings: branch, message, and what is allowed.
        client: talks to the hub; None is huggingface_hub's own, with its login.
        options: of `PushSettings`, such as `private=True`.

    Raises:
        PushError: OUT is not fit to be shared, the hub refuses or cannot be reached, or the repository holds another
            model; nothing was committed then.
        CheckpointError: a weight file of OUT is missing, truncated or does not fit its config.
    """
    asked, folder = settle(PushSettings, settings, options), Path(out).expanduser()
    revision = asked.revision
    check_name(repo)
    check_folder(folder)
    paths, left_out = what_goes(folder)
    shortened, terms = shortened_files(folder, paths), read_terms(folder)
    check_card(folder, shortened[CARD][1] if CARD in shortened else ())
    contents = {path: shortened[path][0] if path in shortened else folder / path for path in paths}
    found = PushedModel(
        repo=repo, revision=revision, private=asked.private or None, terms=terms, left_out=tuple(left_out),
        files={path: len(it) if isinstance(it, bytes) else it.stat().st_size for path, it in contents.items()},
        shortened={path: fields for path, (_, fields) in shortened.items()}, concerns=concerns(terms, paths),
    )  # fmt: skip
    for concern in found.concerns:
        logger.warning("%s", concern)
    for path, fields in found.shortened.items():
        logger.warning("%s names paths of this machine (%s); what is sent has their last name", path, ", ".join(fields))
    if asked.dry_run:
        return found
    client = client or HfApi(library_name="amprune", library_version=__version__)
    target = find_repository(client, repo, revision=revision)
    check_repository(client, target, folder, private=asked.private, overwrite=asked.overwrite)
    target = make_repository(client, target, private=asked.private, revision=revision)
    text = asked.message or f"Model made by amprune {__version__}"
    made, removed = commit(client, target, list(contents.items()), message=text, revision=revision)
    return replace(
        found, repo=target.name, private=target.private, removed=removed, url=str(made.repo_url), commit=made.oid
    )
