"""What is refused before anything is sent, and what the card says of licence and base model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from amprune.errors import PushError, reason
from amprune.model.files import read_front_matter, stored_tensors
from amprune.model.quantization import is_quantized
from amprune.model.reader import digests, read_checkpoint
from amprune.model.recovered import RECORD as RECOVERY
from amprune.model.recovered import is_recovered, read_recovery
from amprune.model.writer import RECORDS
from amprune.prove.card import CARD
from amprune.records import read_object


@dataclass(frozen=True)
class Terms:
    """What the front matter of a card says that a reader must know."""

    license: str | None
    license_name: str | None
    license_link: str | None
    base_model: tuple[str, ...]


def check_name(repo: str) -> None:
    """Refuses what is no name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"REPO is {repo!r}, expected owner/name or name: {reason(error)}") from error


def check_folder(folder: Path) -> None:
    """Refuses a folder that is no whole, verified model of amprune's."""
    if not folder.is_dir():
        raise PushError(f"OUT {folder} is no folder; give a checkpoint that amprune wrote")
    if (folder / "adapter_config.json").is_file():
        raise PushError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which has not been merged and is no model by "
            "itself; `amprune recover PRUNED OUT` merges and writes an ordinary checkpoint: push that one"
        )
    if not (folder / "config.json").is_file():
        raise PushError(f"{folder} is no checkpoint: config.json is missing; give a folder that amprune wrote")
    if read_object(folder / "config.json").get("quantization_config"):
        stored_tensors(folder)  # which names and shapes belong to it, its own loader knows
    else:
        read_checkpoint(folder)
    _check_verified(folder)
    if not (folder / CARD).is_file():
        raise PushError(f"{folder} has no model card ({CARD}); `amprune report {folder}` writes one")
    if (folder / CARD).read_bytes().startswith(b"---") and not read_front_matter(folder / CARD):
        raise PushError(
            f"the front matter of {folder / CARD}, between the lines `---`, is empty or no list of `name: value`, so "
            "that the hub would learn nothing from it; correct it, or remove it"
        )


def _check_verified(folder: Path) -> None:
    if is_quantized(folder):
        return  # what was packed was compared before OUT appeared
    if is_recovered(folder):
        _check_hashes(folder, RECOVERY, read_recovery(folder).sha256)
        return
    file = folder / RECORDS / "verification.json"
    if not file.is_file():
        raise PushError(
            f"{file} is missing, and so is the record of a training: nothing says that {folder} is the model that it "
            "should be; make it with `amprune prune`, `apply` or `recover`"
        )
    content = read_object(file)
    if content.get("passed") is not True:
        raise PushError(f"{file} says that {folder} is not verified; `amprune verify` shows why, make the model again")
    _check_hashes(folder, file.name, content.get("sha256"))


def _check_hashes(folder: Path, record: str, expected: object) -> None:
    """Refuses weights that are not those that were verified or trained; earlier records have no hashes."""
    if expected is None or read_object(folder / "config.json").get("quantization_config"):
        return
    found = digests(read_checkpoint(folder))
    if other := sorted(name for name in found if not isinstance(expected, dict) or expected.get(name) != found[name]):
        raise PushError(
            f"{other[0]} of {folder} is not what {RECORDS}/{record} tells of: the weights were changed after that; "
            "make the model again"
        )


def check_card(folder: Path, lines: Sequence[str]) -> None:
    """Refuses a card in which some lines name paths of this machine."""
    if lines:
        raise PushError(
            f"{folder / CARD} names paths of this machine ({', '.join(lines)}), and a card is sent as it is; take them "
            "out and push again"
        )


def read_terms(folder: Path) -> Terms:
    """Reads licence and base model from the card's front matter."""
    front = read_front_matter(folder / CARD)
    base = front.get("base_model") or []
    license, name, link = (
        str(front[key]) if front.get(key) else None for key in ("license", "license_name", "license_link")
    )
    return Terms(license, name, link, tuple(map(str, base if isinstance(base, list) else [base])))


def concerns(terms: Terms, paths: Collection[str]) -> tuple[str, ...]:
    """Returns what a card should say and does not, each with how to say it."""
    said = []
    if not terms.license:
        said.append(
            f"{CARD} names no licence, without which nobody may use the model: state that of the dense model in the "
            "front matter, `license: apache-2.0` or another identifier of the hub; one that the hub does not list is "
            "`license: other` with `license_name` and `license_link`"
        )
    if terms.license == "other" and not (terms.license_name and terms.license_link):
        said.append(f"{CARD} says `license: other`, which needs `license_name` and `license_link` beside it")
    link = terms.license_link or ""
    if link and "://" not in link and link.removeprefix("./") not in paths:
        said.append(f"{CARD} gives {link} as license_link, and no such file goes along")
    if not terms.base_model:
        said.append(
            f"{CARD} names no base_model, so that the hub cannot tell what the model was made from: add "
            "`base_model: OWNER/NAME` to the front matter if the dense model is on the hub"
        )
    return tuple(said)
