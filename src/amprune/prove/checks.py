"""Every check of an output, and the report of them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from amprune.cut.masking import masked
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.cut.slicing import cuts_by_tensor, kept_tensors, masks, output_config, sliced_tensor
from amprune.errors import AmpruneError, VerificationError
from amprune.model.architecture import PreTrainedModel
from amprune.model.files import WEIGHT_INDEX, weight_files
from amprune.model.loading import has_tokenizer, load_tokenizer
from amprune.model.reader import Checkpoint, digest, identical, read_checkpoint
from amprune.model.recovered import RECORD, is_recovered, read_recovery
from amprune.model.writer import LOADED, RECORDS, WEIGHT_SUFFIXES
from amprune.plan.artefact import PruningPlan, check_plan
from amprune.prove.comparison import check_loading, compare, finite, hold, probe_logits
from amprune.records import read_object, sha256, short
from amprune.running import Progress, no_progress

VERIFICATION = "verification.json"
TOLERANCE = 1e-5
"""Largest allowed difference of any logit, as a share of the logits' standard deviation, in float64."""
_SUMMING = 1e-12
"""What another order of summing may move a float64 by, as a share of the largest."""


@dataclass(frozen=True)
class Check:
    """One thing that was held to be true, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerificationReport:
    """Every check, with the measured difference of the logits in units of their standard deviation."""

    checks: tuple[Check, ...]
    logit_difference: float | None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "passed": self.passed,
            "logit_difference": self.logit_difference,
            "tolerance": TOLERANCE,
            "checks": [asdict(check) for check in self.checks],
        }

    def require(self) -> None:
        """Raises VerificationError, naming each failed check, unless all passed."""
        if not self.passed:
            failed = "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)
            raise VerificationError(f"verification failed: {failed}")


def verify_checkpoint(
    folder: Path,
    dense: Checkpoint,
    plan: PruningPlan,
    *,
    biases: Mapping[str, torch.Tensor] = MappingProxyType({}),
    refitted: Mapping[str, str] = MappingProxyType({}),
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> VerificationReport:
    """Holds an output to the four invariants: it reloads, it equals the masked dense model, groups and files are whole.

    Of an output that was trained after pruning, the logits are held to be finite alone, as is every weight.

    `biases`, of float64 and by their dense names, are those that make up for what was removed: stored ones are held to
    them, and the masked dense model is given what is stored. `refitted` are the hashes of the output projections that
    were refitted, by their dense names: what is stored is held to them, and the masked dense model is given that.
    """
    checks: list[Check] = []
    difference: float | None = None
    output = cache(lambda: read_checkpoint(folder))  # opened by the first check that reads it; each tells why it cannot

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, check()))
        except AmpruneError as error:
            checks.append(Check(name, False, str(error)))

    def compare_logits() -> str:
        nonlocal difference
        difference = _logit_difference(output(), dense, plan, {*biases, *refitted}, advance)
        what = "logits differ from those of the masked dense model"
        hold(difference, TOLERANCE, VerificationError, what, f"{TOLERANCE:.0e}")
        found = "identical" if difference == 0 else f"within {difference:.1e} of their standard deviation"
        removed = "blocks skipped" if len(plan.kept_layers) < len(plan.layers) else "units masked"
        refit = " and its output projections refitted" if refitted else ""
        return f"{found}, to the dense model with the removed {removed}{refit} (tolerance {TOLERANCE:.0e}, float64)"

    with progress("Verifying", 2) as advance:
        run("groups", lambda: _check_plan(plan))
        run("config", lambda: _check_config(output(), dense, plan))
        run("dtype and ties", lambda: _check_tensors(output(), dense, plan))
        run("files", lambda: _check_files(folder, dense.folder))
        if (folder / RECORDS / VERIFICATION).is_file():
            run("records", lambda: _check_records(folder / RECORDS))
        run("tokenizer", lambda: _check_tokenizer(folder, dense.folder, trust_remote_code=trust_remote_code))
        run("reload", lambda: _check_reload(folder))
        if not is_recovered(folder):
            run("tensors", lambda: _check_stored(output(), dense, plan, {*biases, *refitted}))
        if biases and not is_recovered(folder):
            run("biases", lambda: _check_biases(output(), dense, plan, biases))
        if refitted and not is_recovered(folder):
            run("refit", lambda: _check_refitted(output(), dense, plan, refitted))
        if is_recovered(folder):
            run("weights", lambda: _check_trained_weights(folder, output()))
            run("logits", lambda: _check_trained(folder, output(), advance))
        else:
            run("logits", compare_logits)
    return VerificationReport(tuple(checks), difference)


def _check_plan(plan: PruningPlan) -> str:
    check_plan(plan)
    before, after = plan.shape_before, plan.shape_after
    if after.num_layers < before.num_layers:
        return f"{after.num_layers} of {before.num_layers} blocks kept, in order"
    return f"every kept key-value head keeps its {after.group_size} query heads, in order"


def _check_config(output: Checkpoint, dense: Checkpoint, plan: PruningPlan) -> str:
    expected = output_config(dense.config, dense.architecture, plan)
    written = read_object(output.folder / "config.json")
    if written != expected:
        keys = sorted(key for key in written.keys() | expected if written.get(key) != expected.get(key))
        raise VerificationError(f"config.json differs from the dense one in more than the new sizes: {', '.join(keys)}")
    before, after = output.shape.parameters, plan.shape_after.parameters
    if before != after:
        raise VerificationError(f"has {before:,} parameters, expected {after:,}")
    return f"{after:,} parameters, {plan.ratio_actual:.2%} fewer"


def _check_tensors(output: Checkpoint, dense: Checkpoint, plan: PruningPlan) -> str:
    kept = kept_tensors(dense.architecture, plan, dense)
    if set(output) != set(kept):
        different = sorted(set(output) ^ set(kept))
        raise VerificationError(f"the set of tensors differs from the dense model's, such as {different[0]}")
    for name, old in kept.items():
        if output.header(name).dtype != dense.header(old).dtype:
            raise VerificationError(f"{name} is {output.header(name).dtype}, was {dense.header(old).dtype}")
    if set(output.architecture.tied) != set(dense.architecture.tied):
        raise VerificationError("tied embeddings are no longer tied, or are tied now")
    dtypes = sorted({str(output.header(name).dtype).removeprefix("torch.") for name in output})
    return f"{', '.join(dtypes)}; {'tied' if dense.architecture.tied else 'separate'} embeddings"


def _check_stored(output: Checkpoint, dense: Checkpoint, plan: PruningPlan, replaced: Collection[str]) -> str:
    """Holds every stored tensor but those that were computed anew to the cut of the dense one, byte by byte."""
    changes, kept = cuts_by_tensor(dense.architecture, plan), kept_tensors(dense.architecture, plan, dense)
    copied = {name: old for name, old in kept.items() if old not in replaced}
    for name, old in copied.items():
        if name not in output or not identical(output[name], sliced_tensor(dense, old, changes=changes)):
            raise VerificationError(
                f"{name} is missing, or holds other values than the dense model's {old} without what was removed"
            )
    return f"{len(copied)} are those of the dense model without what was removed, byte by byte"


def _check_biases(output: Checkpoint, dense: Checkpoint, plan: PruningPlan, biases: Mapping[str, torch.Tensor]) -> str:
    """Holds the stored biases that make up for what was removed to those expected, to within rounding."""
    for name, old in kept_tensors(dense.architecture, plan, biases).items():
        bias, found = biases[old], output[name]
        allowed = torch.finfo(found.dtype).eps * bias.abs() + _SUMMING * bias.abs().max()
        if not ((found.double() - bias).abs() <= allowed).all():
            raise VerificationError(f"{name} is not the dense bias and the mean of what was removed")
    return f"{len(biases)} hold the mean of what was removed, to within rounding"


def _check_refitted(output: Checkpoint, dense: Checkpoint, plan: PruningPlan, refitted: Mapping[str, str]) -> str:
    """Holds what is stored to what was fitted, byte by byte."""
    if unknown := sorted(set(refitted).difference(dense)):
        raise VerificationError(f"{RECONSTRUCTION} names {unknown[0]}, which the dense model does not have")
    for name, old in kept_tensors(dense.architecture, plan, refitted).items():
        if digest(output[name]) != refitted[old]:
            raise VerificationError(f"{name} is not what was fitted: its hash differs from that of {RECONSTRUCTION}")
    return f"{len(refitted)} tensors of output projections are those that were fitted, byte by byte"


def _check_files(folder: Path, source: Path) -> str:
    """Compares byte by byte what must survive: generation config, chat template, tokenizer files."""
    weights = weight_files(folder)
    expected = {file for file, _ in weights}
    if weights[0][1] is not None:
        expected.add(folder / WEIGHT_INDEX)
    for file in folder.iterdir():
        index = file.name.endswith(".index.json")
        read = file.name in (*LOADED, "adapter_config.json") or file.suffix in (".py", *WEIGHT_SUFFIXES) or index
        if read and file not in expected and (index or not (source / file.name).exists()):
            raise VerificationError(f"{file.name} is not of the dense model, and loaders may read it")
    present = [name for name in LOADED if (source / name).is_file()]
    for name in present:
        if not (folder / name).is_file():
            raise VerificationError(f"{name} of the dense model is missing")
        if (folder / name).read_bytes() != (source / name).read_bytes():
            raise VerificationError(f"{name} differs from the dense model's")
    return ", ".join(present) or "the dense model has none"


def _check_records(records: Path) -> str:
    """Holds what tells how the output was made to the hashes that were taken when it was proven."""
    known = read_object(records / VERIFICATION).get("records", {})
    if not isinstance(known, dict):
        raise VerificationError(f"{records / VERIFICATION} has no hashes of records, but {short(known)}")
    for name, expected in known.items():
        file = records / Path(name).name
        if not file.is_file() or sha256(file) != expected:
            raise VerificationError(f"{file} is missing, or was changed after the output was proven")
    return f"{', '.join(known) or 'none'} as they were when the output was proven"


_PROBE = "The quick brown fox: naïve café, 12,345.67 € — 你好!\n\tdef f(x): return x**2"


def _check_tokenizer(folder: Path, source: Path, *, trust_remote_code: bool) -> str:
    """Loads both tokenizers, since AutoTokenizer may choose by the config's model_type."""
    if not has_tokenizer(source):
        return "the dense model has none"
    ours, theirs = (load_tokenizer(place, trust_remote_code=trust_remote_code) for place in (folder, source))
    if ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
        raise VerificationError("the tokenizer of the output gives other tokens than the dense model's")
    if ours.chat_template != theirs.chat_template:
        raise VerificationError("the chat template differs from the dense model's")
    return f"{type(ours).__name__}, same tokens and chat template"


def _check_reload(folder: Path) -> str:
    check_loading(folder, VerificationError)
    return "AutoModelForCausalLM takes every tensor: none missing, unexpected or mismatched"


def _check_trained_weights(folder: Path, output: Checkpoint) -> str:
    """Holds weights that were trained to be finite, and those that the record of the training hashed."""
    if (folder / RECORDS / VERIFICATION).exists():
        raise VerificationError(
            f"{folder / RECORDS} holds {VERIFICATION}, which only pruned models have, and {RECORD}, which only trained "
            "ones have; one of them is of another model"
        )
    hashes = read_recovery(folder).sha256
    for name in output:
        if not torch.isfinite(output[name]).all():
            raise VerificationError(f"{name} holds values that are not finite")
        if hashes is not None and digest(output[name]) != hashes.get(name):
            raise VerificationError(f"{name} is not what was trained: its hash differs from that of {RECORD}")
    return "every value is finite" + (", and that which was trained" if hashes is not None else "")


def _check_trained(folder: Path, output: Checkpoint, advance: Callable[[int], None]) -> str:
    """Computes the logits of an output whose weights are no longer those of the dense model."""
    read_recovery(folder)  # a record that cannot be read excuses nothing
    finite(probe_logits(output), VerificationError("the recovered model gives logits that are not finite"))
    advance(2)
    return f"finite; not compared: the weights were trained after pruning ({RECORD})"


def _logit_difference(
    output: Checkpoint, dense: Checkpoint, plan: PruningPlan, replaced: Collection[str], advance: Callable[[int], None]
) -> float:
    """Returns the largest difference of any logit from those of the masked dense model, see `_masked`."""
    pruned = probe_logits(output)
    advance(1)
    expected = probe_logits(dense, changed=partial(_masked, output=output, dense=dense, plan=plan, replaced=replaced))
    advance(1)
    for name, logits in (("the masked dense model", expected), ("the pruned model", pruned)):
        finite(logits, VerificationError(f"{name} gives logits that are not finite"))
    return compare(pruned, expected).largest


@contextmanager
def _masked(
    model: PreTrainedModel, output: Checkpoint, dense: Checkpoint, plan: PruningPlan, replaced: Collection[str]
) -> Iterator[None]:
    """Makes the dense model compute what the pruned one should.

    Of output projections of which a tensor is `replaced`, by its dense name, it takes what the output stores.
    """
    new = {old: name for name, old in kept_tensors(dense.architecture, plan, dense).items()}
    modules = {name.rpartition(".")[0] for name in replaced}
    with masked(model, plan, dense.architecture), ExitStack() as stack:
        for name, mask in masks(plan, dense.architecture):
            if name in modules and f"{name}.weight" in new:
                hook = partial(
                    _project, kept=mask.nonzero().flatten(), output=output, weight=new[f"{name}.weight"],
                    bias=new.get(f"{name}.bias"),
                )  # fmt: skip
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _project(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object, *, kept: torch.Tensor, output: Checkpoint,
    weight: str, bias: str | None,
) -> torch.Tensor:  # fmt: skip
    """Computes an output projection as the output stores it, on the features that stay."""
    stored = output[weight].double()
    stored = stored.T if isinstance(module, Conv1D) else stored
    return linear(inputs[0].index_select(-1, kept), stored, None if bias is None else output[bias].double())


def read_plan(folder: Path) -> PruningPlan:
    """Reads the plan that an output carries."""
    path = folder / RECORDS / "plan.json"
    if not path.is_file():
        if is_recovered(folder):
            raise VerificationError(
                f"{path} is missing: {folder} was trained from a model that amprune did not prune, so that there is "
                "nothing to hold it to"
            )
        raise VerificationError(f"{path} is missing; {folder} was not made by amprune, or its records were removed")
    return PruningPlan.load(path)
