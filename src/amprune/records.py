"""Records as JSON files: read by the types of a dataclass, written whole or not at all, gone on with after a stop.

A record is a frozen dataclass. Its type hints say what each field has to be: numbers (`bool` is no `int`, and every
`float` is finite), text, `Literal`, unions with None, tuples, mappings, `TypedDict` (whose other entries are kept) and
dataclasses again. What a type cannot say of one value is a `Rule` in `Annotated`; what holds between fields is checked
by the room whose record it is. A field whose entry has another name says so in its metadata (`entry`), and so does one
that a file has to have although code may leave it out (`needed`).
"""

import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from filelock import BaseFileLock, FileLock, Timeout

from amprune.errors import AmpruneError, CheckpointError

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Rule:
    """What holds of a value beside its type, and what is expected then, as in `Annotated[int, Rule(...)]`."""

    expected: str
    holds: Callable[[Any], bool] = lambda _: True


Count = Annotated[int, Rule("a whole number of at least 1", lambda value: value >= 1)]
Whole = Annotated[int, Rule("a whole number of at least 0", lambda value: value >= 0)]
Figure = Annotated[float, Rule("a number of at least 0", lambda value: value >= 0)]
Share = Annotated[float, Rule("a number of at least 0 and less than 1", lambda value: 0 <= value < 1)]


# Reading


MOST = 2**28
"""Bytes of a record, far more than any has."""


def check_readable(path: Path, *, error: type[AmpruneError], hint: str = "", most: int | None = None) -> None:
    """Refuses what cannot be read to its end: folders, devices, pipes, and more bytes than `most`."""
    try:
        state = path.stat()
    except FileNotFoundError:
        raise error(f"{path} is missing{hint}") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}{hint}") from problem
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a device or a pipe"
        raise error(f"{path} cannot be read: it is {kind}, expected a file{hint}")
    if most is not None and state.st_size > most:
        raise error(f"{path} cannot be read: it has {state.st_size:,} bytes, expected at most {most:,}{hint}")


def resolved(path: Path) -> Path:
    """Returns where a path leads, through links; one that leads in a circle is left as it is, and cannot be read."""
    return Path(os.path.realpath(path))


def read_text(
    path: Path, *, error: type[AmpruneError], hint: str = "", encoding: str = "utf-8", most: int | None = MOST
) -> str:
    """Reads a text file; see `check_readable` for what is none."""
    check_readable(path, error=error, hint=hint, most=most)
    try:
        return path.read_text(encoding=encoding)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}{hint}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read as UTF-8 text: {problem}{hint}") from problem


def parse_yaml(text: str) -> Any:
    """Reads a YAML document; a ValueError says what is wrong with it, such as references that multiply."""
    import yaml

    if (brackets := text.count("[") + text.count("{")) > _BRACKETS:  # whose reader takes the square of them in time
        raise ValueError(f"it has {brackets:,} brackets, expected at most {_BRACKETS:,}")
    try:
        references = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        if references > _REFERENCES:
            raise ValueError(f"it has {references} references, expected at most {_REFERENCES}")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # dates and numbers that are none, too
        raise ValueError(" ".join(str(problem).split())) from problem


_REFERENCES, _BRACKETS = 20, 1000


def read_object(path: Path, *, error: type[AmpruneError] = CheckpointError, hint: str = "") -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file; `hint` says what to do next."""
    check_readable(path, error=error, hint=hint, most=MOST)
    try:
        content = json.loads(text := path.read_text(encoding="utf-8"))
        if "\\ud" in text.lower():  # a half of a character, which no file could be written with
            json.dumps(content, ensure_ascii=False).encode()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}{hint}") from problem
    except (ValueError, RecursionError) as problem:  # bytes that are no text, numbers and depths out of bounds
        pointer = path.read_bytes().startswith(b"version https://git-lfs")
        what = "a pointer of Git LFS, for which `git lfs pull` fetches the file" if pointer else problem
        raise error(f"{path} cannot be read: {what} (not JSON){hint}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, expected a JSON object{hint}")
    return content


def read(
    cls: type[_Record], path: Path, *, error: type[AmpruneError], remedy: str, format: object = None, extra: bool = True
) -> _Record:
    """Reads a record from a file; see `parse`."""
    content = read_object(path, error=error, hint=f"; {remedy}")
    return parse(cls, content, where=str(path), error=error, remedy=remedy, format=format, extra=extra)


def parse(
    cls: type[_Record], content: object, *, where: str, error: type[AmpruneError], remedy: str, format: object = None,
    extra: bool = True,
) -> _Record:  # fmt: skip
    """Makes a record, a dataclass, of what a JSON file held.

    Errors begin with `where`, such as the file, and end with the `remedy`. `format` is what the entry of that name has
    to be; without `extra` there may be no entries that the record does not know.
    """
    place = _Place(where, error, remedy, extra)
    if isinstance(content, dict):
        found = content.get("format")
        if format is not None and found != format:
            raise _wrong(place.inner("format"), found, short(format), contained=True)
        content = {name: value for name, value in content.items() if name != "format"}
    record: _Record = _value(cls, content, place)
    return record


@dataclass(frozen=True)
class _Place:
    """Where something stands in a file, and how an error there is raised."""

    file: str
    error: type[AmpruneError]
    remedy: str
    extra: bool
    parts: tuple[str, ...] = ()

    def inner(self, part: str) -> "_Place":
        return replace(self, parts=(*self.parts, part))

    def item(self, index: int) -> "_Place":
        """Names an item by its list: that of `layers` is `layer 1`."""
        name = self.parts[-1].removesuffix("s") if self.parts else "item"
        return replace(self, parts=(*self.parts[:-1], f"{name} {index}"))

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, ", ".join(self.parts))))


def _wrong(place: _Place, found: object, expected: str, *, contained: bool) -> AmpruneError:
    """Names a list or an object by its whole place, a single value as an entry of what contains it."""
    name, where = str(place), ""
    if contained and place.parts:
        name, where = place.parts[-1], f"{replace(place, parts=place.parts[:-1])}: "
    return place.error(f"{where}{name} is {short(found)}, expected {expected}; {place.remedy}")


def _value(hint: Any, found: Any, place: _Place) -> Any:
    kinds = _kinds(hint)
    if not _fits(hint, found):
        single = not any(_is_list(kind) or _is_object(kind) for kind in kinds)
        raise _wrong(place, found, _words(hint), contained=single)
    return _content(next(kind for kind in kinds if _fits(kind, found)), found, place)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a hint leaves to choose from, without their rules."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for option in get_args(hint) for kind in _kinds(option))
    return (hint,)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list)


def _is_object(kind: Any) -> bool:
    return is_dataclass(kind) or is_typeddict(kind) or get_origin(kind) in (dict, Mapping)


def _fits(hint: Any, found: Any) -> bool:
    """Tells whether a value is of the kind that is wanted, whatever it contains."""
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        return _fits(kind, found) and all(rule.holds(found) for rule in rules)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(option, found) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return any(found == value and type(found) is type(value) for value in get_args(hint))
    if hint is float:
        return type(found) in (int, float) and abs(found) <= sys.float_info.max
    if _is_list(hint):
        return isinstance(found, list)
    if _is_object(hint):
        return isinstance(found, dict)
    return hint is Any or type(found) is (NoneType if hint is None else hint)


def _content(kind: Any, found: Any, place: _Place) -> Any:
    if kind is float:
        return float(found)
    if _is_list(kind):
        items = enumerate(found)
        inside = get_args(kind)[0]
        single = not any(map(_is_object, _kinds(inside)))
        values = (_value(inside, v, place.inner(f"entry {i}") if single else place.item(i)) for i, v in items)
        return get_origin(kind)(values)
    if is_dataclass(kind):
        return _record(kind, found, place)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        _check_names(found, sorted(kind.__required_keys__), place)
        return {name: _value(hints.get(name, Any), value, place.inner(name)) for name, value in found.items()}
    if _is_object(kind):
        return {name: _value(get_args(kind)[1], value, place.inner(name)) for name, value in found.items()}
    return found


def _record(kind: Any, found: dict[str, Any], place: _Place) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    entries = {one.metadata.get("entry", one.name): one for one in fields(kind) if one.init}
    needed = [
        name
        for name, one in entries.items()
        if one.metadata.get("needed") or (one.default is MISSING and one.default_factory is MISSING)
    ]
    _check_names(found, needed, place)
    if not place.extra and (unknown := sorted(set(found) - set(entries))):
        raise place.error(
            f"{place}: has the unknown field {unknown[0]}, expected only {', '.join(entries)}; {place.remedy}"
        )
    there = {name: one for name, one in entries.items() if name in found}
    return kind(**{one.name: _value(hints[one.name], found[name], place.inner(name)) for name, one in there.items()})


def _check_names(found: Mapping[str, Any], needed: Sequence[str], place: _Place) -> None:
    if missing := [name for name in needed if name not in found]:
        raise place.error(f"{place}: lacks the field {missing[0]}; {place.remedy}")


def _words(hint: Any) -> str:
    """Says what is expected."""
    if get_origin(hint) is Annotated:
        return str(get_args(hint)[1].expected)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_words, get_args(hint)))))
    if get_origin(hint) is Literal:
        return " or ".join(map(short, get_args(hint)))
    if _is_list(hint):
        return "a list"
    if _is_object(hint):
        names = [one.metadata.get("entry", one.name) for one in fields(hint)] if is_dataclass(hint) else []
        return f"an object with {', '.join(names)}" if 0 < len(names) <= 4 else "an object"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}
    return "anything" if hint is Any else plain.get(None if hint is NoneType else hint, "")


def short(value: object) -> str:
    """Returns a value as JSON has it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


# Writing


def write(path: Path, value: object, *, error: type[AmpruneError] = CheckpointError) -> None:
    """Writes a record, or what else JSON can hold, with two spaces as the hub's own files have it."""
    content = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", error=error)


def write_text(path: Path, text: str, *, error: type[AmpruneError] = CheckpointError) -> None:
    """Writes a file whole or not at all."""
    with replaced(path, error=error) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path, *, error: type[AmpruneError] = CheckpointError) -> Iterator[Path]:
    """Gives the name of a file to write beside another, whose place it takes in the end; it goes when that fails.

    Devices and pipes are written to as they are; of a link, what it leads to is replaced.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_char_device() or path.is_fifo():
            yield path
            return
        target = resolved(path)
        with staging(target.parent, target.name) as folder:
            yield (partial := folder / target.name)
            partial.chmod(0o666 & ~umask())
            partial.replace(target)
    except OSError as problem:
        raise error(f"cannot write {path}: {problem.strerror or problem}") from problem


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """Makes a folder `.NAME.*.partial` in which files are written before they are moved; it goes in the end.

    What a killed process has left is removed: while one lives, it holds a lock in its own.
    """
    for left in parent.glob(f".{glob.escape(name)}.*.partial"):
        with suppress(OSError, Timeout), FileLock(left / _LOCK).acquire(blocking=False):
            shutil.rmtree(left)
    folder, lock = _locked(parent, name)
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


_LOCK = ".lock"


def _locked(parent: Path, name: str) -> tuple[Path, BaseFileLock]:
    """Makes a folder and locks it; another process may have taken it for one that was left in between."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".partial"))
        lock: BaseFileLock = FileLock(folder / _LOCK)
        try:
            lock.acquire()
            return folder, lock
        except FileNotFoundError:
            if folder.exists():
                raise


def umask() -> int:
    """Returns the permissions that new files lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def alone(file: Path, busy: str, *, error: type[AmpruneError] = CheckpointError) -> Iterator[None]:
    """Keeps other processes out by a lock file; `busy` names what is being written where one is in already.

    The file is gone afterwards, and so are folders that were made for it and stay empty. The system unlocks it when the
    process dies, so that what a killed one leaves locks nothing.
    """
    lock, made = FileLock(file), [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise error(
            f"{busy} is being written by another run, which holds {file}; wait until it ends, or choose another place"
        ) from None
    except OSError as problem:
        raise error(f"cannot write {file}: {problem.strerror or problem}") from problem
    try:
        yield
    finally:
        with suppress(OSError):
            if file.stat().st_size == 0:  # else it is the user's
                file.unlink()  # while it is locked: afterwards it may be that of the next run
        lock.release()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# Going on


class Begun(TypedDict):
    """What is kept of a run until it has ended."""

    request: dict[str, Any]
    done: list[str]


@dataclass(frozen=True)
class Run:
    """What a run was asked for, as it reads once it has been written, and what of it is done."""

    request: dict[str, Any]
    done: list[str] = field(default_factory=list)
    resumed: bool = False
    """Whether an interrupted run of the same request was found."""
    otherwise: tuple[str, ...] = ()
    """What an interrupted run that was found was asked for otherwise, such as `settings.seed`."""
    others: tuple[str, ...] = ()
    """What that run has done."""

    def begun(self) -> Begun:
        """Returns what is to be kept."""
        return {"request": self.request, "done": self.done}

    def finish(self, step: str, path: Path) -> None:
        """Keeps in a file that a step is done."""
        self.done.append(step)
        write(path, self.begun())


def begin(path: Path, request: Mapping[str, Any], *, error: type[AmpruneError], remedy: str) -> Run:
    """Finds in a file what an interrupted run has done, if it was asked for the same; writes nothing."""
    return go_on(read(Begun, path, error=error, remedy=remedy) if path.is_file() else None, request)


def go_on(before: Begun | None, request: Mapping[str, Any]) -> Run:
    """Compares what an interrupted run was asked for with what is asked for now."""
    now = json.loads(json.dumps(request, default=str))
    otherwise = tuple(changes(before["request"], now)) if before is not None else ()
    if before is None:
        return Run(now)
    if otherwise:
        return Run(now, otherwise=otherwise, others=tuple(before["done"]))
    return Run(now, list(before["done"]), resumed=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names what differs between two requests, of objects in them entry by entry."""
    names = []
    for name in sorted({*before, *now}):
        theirs, ours = before.get(name), now.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            names += [f"{name}.{entry}" for entry in changes(theirs, ours)]
        elif theirs != ours:
            names.append(name)
    return names
