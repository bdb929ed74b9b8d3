"""The hub: who pushes, what is there already, whether it may be written, and the one commit."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from amprune.errors import AmpruneError, PushError, reason
from amprune.prove.card import CARD, CardHead, read_card
from amprune.serve.hub.contents import left_behind

logger = logging.getLogger(__name__)
_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Repository:
    """A repository as it is before the commit."""

    name: str
    """With its owner."""
    exists: bool
    branch_exists: bool = False
    private: bool | None = None
    """None of a repository that does not exist: the owner's default decides."""
    head: str | None = None
    """The commit that the next one follows."""
    files: tuple[str, ...] = ()


def find_repository(client: HfApi, repo: str, *, revision: str | None) -> Repository:
    """Asks the hub who pushes and what is there."""
    with hub_errors(repo):
        user = client.whoami()  # asked always: a bad token looks like a missing repository otherwise
        name = repo if "/" in repo else f"{user['name']}/{repo}"
        try:
            found = client.model_info(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(name, exists=False)
        on_branch = True
        if revision is not None:
            try:
                found = client.model_info(name, revision=revision)
            except RevisionNotFoundError:
                on_branch = False  # a new branch starts where main is
        files = tuple(file.rfilename for file in found.siblings or ())
        return Repository(name, True, on_branch, bool(found.private), found.sha, files)


def check_repository(client: HfApi, target: Repository, folder: Path, *, private: bool, overwrite: bool) -> None:
    """Refuses to publish what should be private, and to write over another model."""
    if not target.exists:
        return
    if private and not target.private:
        raise PushError(
            f"{target.name} exists and is public, so --private would have no effect; make it private in its "
            "settings on the hub and push again, or choose another name"
        )
    if overwrite or not any(not file.startswith(".") for file in target.files):
        return
    theirs, ours = _remote_card(client, target), read_card(folder)
    if not _is_ours(theirs) or not _origin(ours) or _origin(theirs) != _origin(ours):
        what = "the card of another model" if theirs != CardHead() else "files, but no model card"
        raise PushError(
            f"{target.name} exists and holds {what}: only an empty repository, or one with an amprune card of the same "
            f"base ({', '.join(_origin(ours)) or f'which {folder / CARD} does not name'}), is written to; choose "
            "another name, or give --overwrite to commit over it"
        )


def _remote_card(client: HfApi, target: Repository) -> CardHead:
    if CARD not in target.files:
        return CardHead()
    with hub_errors(target.name), TemporaryDirectory(prefix="amprune-card-") as place:
        client.hf_hub_download(target.name, CARD, revision=target.head, local_dir=place)
        return read_card(Path(place))


def _is_ours(card: CardHead) -> bool:
    """Tells whether amprune wrote a card; the tag stays where its user has written another text."""
    tags = card.front.get("tags")
    return card.dense is not None or (isinstance(tags, list) and "amprune" in tags)


def _origin(card: CardHead) -> list[str]:
    """Returns what a card says the model was made from: hub ids, or else the name of the dense model."""
    base = card.front.get("base_model")
    if base:
        return sorted(map(str, base)) if isinstance(base, list) else [str(base)]
    return [card.dense] if card.dense else []


def make_repository(client: HfApi, target: Repository, *, private: bool, revision: str | None) -> Repository:
    """Creates repository and branch where they are missing; returns what is there then."""
    with hub_errors(target.name):
        if not target.exists:
            client.create_repo(target.name, private=True if private else None)
            logger.info("made the repository %s; it stays, empty, if sending fails", target.name)
            found = client.model_info(target.name)
            target = replace(target, exists=True, private=bool(found.private), head=found.sha)
        if revision is not None and not target.branch_exists:
            client.create_branch(target.name, branch=revision, exist_ok=True)
    return target


def commit(
    client: HfApi, target: Repository, files: Sequence[tuple[str, Path | bytes]], *, message: str, revision: str | None
) -> tuple[CommitInfo, tuple[str, ...]]:
    """Sends files in one commit, which also removes those of an earlier model; returns it and what was removed."""
    removed = left_behind(target.files, {path for path, _ in files})
    operations = [CommitOperationAdd(path, content) for path, content in files]
    with hub_errors(target.name):
        made = client.create_commit(
            target.name,
            [*operations, *(CommitOperationDelete(path) for path in removed)],
            commit_message=message,
            revision=revision,
            parent_commit=target.head,
        )
    return made, tuple(removed)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns what the hub's client raises into one clear error."""
    try:
        yield
    except AmpruneError:
        raise
    except LocalTokenNotFoundError as error:
        raise PushError(f"cannot push to {repo}: nobody is logged in; {_LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"cannot push to {repo}: HF_HUB_OFFLINE is set; unset it and push again") from error
    except HfHubHTTPError as error:
        raise PushError(f"cannot push to {repo}: {_refusal(error)}") from error
    except ValueError as error:  # the client's own checks, and the hub's of the card
        raise PushError(f"cannot push to {repo}: {' '.join(str(error).split())}") from error
    except Exception as error:  # network failures come in many types
        raise PushError(
            f"cannot push to {repo}: the hub cannot be reached ({reason(error)}); check the network and push again"
        ) from error


def _refusal(error: HfHubHTTPError) -> str:
    said = " ".join((error.server_message or reason(error)).split())
    advice = {
        401: f"the hub does not accept the token ({said}); {_LOG_IN}",
        403: f"the token may not write there ({said}); use one with write access, and a name that is yours",
        409: f"the repository is in the way or busy ({said}); push again",
        412: f"somebody else has committed meanwhile ({said}); look at what is there and push again",
    }
    status = error.response.status_code
    return advice.get(status, f"the hub refuses with status {status} ({said})")
