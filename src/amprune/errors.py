"""What can go wrong, as exceptions that a caller can tell apart.

Every message says what failed, where, what was found against what was expected, and what to do next.
"""

import difflib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "evaluate": ("codecarbon", "lm_eval", "scipy"),
    "gguf": ("gguf",),
    "quantize": ("bitsandbytes", "torchao"),
    "recover": ("peft",),
    "report": ("matplotlib", "scipy"),
}
"""What `pip install 'amprune[...]'` brings beside the libraries that pruning needs, as Python imports it."""


class AmpruneError(Exception):
    """Base of every error that amprune raises on purpose."""


class RecipeError(AmpruneError):
    """A recipe cannot be read, or has options that there are not."""


class UnsupportedModelError(AmpruneError):
    """The architecture, or what was asked of it, is not supported."""


class CheckpointError(AmpruneError):
    """A checkpoint cannot be found, read or written."""


class CalibrationError(AmpruneError):
    """A calibration set cannot be read, or holds fewer samples than asked for."""


class ScoresError(AmpruneError):
    """Scores cannot be computed or read, or belong to another model."""


class PlanError(AmpruneError):
    """A plan cannot be made or read, or belongs to another model."""


class ReconstructionError(AmpruneError):
    """Kept weights cannot be refitted: the calibration tokens, the moments or the memory do not allow it."""


class VerificationError(AmpruneError):
    """A written checkpoint is not the model that it should be."""


class ExportError(AmpruneError):
    """A model cannot be written in the format of another program, or is not the same there."""


class QuantizationError(AmpruneError):
    """A model cannot be quantised, or the quantised one is not what it should be."""


class RecoveryError(AmpruneError):
    """A model cannot be recovered by training."""


class EvaluationError(AmpruneError):
    """A model cannot be measured, or what it is measured on cannot be read."""


class ReportError(AmpruneError):
    """A report cannot be drawn from what is there."""


class PushError(AmpruneError):
    """A model is not fit to be shared, or the hub does not take it."""


class MissingDependencyError(AmpruneError):
    """An optional library or program is not installed."""


def required(what: str, *modules: str) -> None:
    """Refuses what needs optional libraries that are not installed, before anything is begun, and says what to type.

    Modules that no extra brings are not looked at.
    """
    known = dict.fromkeys(module for brought in EXTRAS.values() for module in brought if module in modules)
    if missing := [module for module in known if find_spec(module) is None]:
        names = " and ".join(module.replace("_", "-") for module in missing)
        # One extra a module, though two may bring it.
        extras = {next(extra for extra, brought in EXTRAS.items() if module in brought) for module in missing}
        raise MissingDependencyError(
            f"{what} needs {names}, which {'is' if len(missing) == 1 else 'are'} not installed here: "
            f"`pip install 'amprune[{','.join(sorted(extras))}]'`"
        )


def reason(error: BaseException) -> str:
    """Returns the first line of what another library says, or the kind of its error where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def guess(name: str, known: Iterable[str]) -> str:
    """Returns a question after the known name that is nearest to an unknown one, or nothing where none is near."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""
