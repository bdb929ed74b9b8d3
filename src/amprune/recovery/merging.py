"""From a trained adapter, or trained weights, to an ordinary checkpoint that computes the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amprune.errors import RecoveryError
from amprune.model.reader import Checkpoint, identical, read_checkpoint
from amprune.model.writer import copy_sidecars, write_shards
from amprune.prove.comparison import check_loading, compare, finite, hold, probe_logits
from amprune.recovery.adapters import Update, read_adapter
from amprune.running import Progress, no_progress

TOLERANCE = 1e-4
"""Largest allowed difference of a logit before rounding, in standard deviations: sums are taken in float32."""


def write_recovered(
    base: Checkpoint, trained: Path, folder: Path, *, max_shard_size: str = "5GB", progress: Progress = no_progress
) -> float:
    """Writes the merged checkpoint into `folder`, holding one shard in memory at a time, and compares it.

    Args:
        base: what was trained.
        trained: the saved adapter, or, of full fine-tuning, the saved model.
        folder: a staged folder.
        max_shard_size: such as 200MB or 5GB.
        progress: told how far it is.

    Returns:
        How far the logits of the written model are from those of the trained one, as a root mean square in units of
        their standard deviation, in float64: what rounding the sums to the checkpoint's dtype costs.

    Raises:
        RecoveryError: the merged model differs before rounding, the written folder does not load or is not what was
            merged, or the adapter is another model's.
    """
    is_adapter = (trained / "adapter_config.json").is_file()
    updates = read_adapter(trained, base) if is_adapter else {}
    merged = {name: partial(_merged, base, name, update) for name, update in updates.items()}
    weights = base.replaced(merged) if is_adapter else read_checkpoint(trained)

    def get(name: str) -> torch.Tensor:
        tensor = weights[name] if name in weights else weights[weights.resolve(name)]
        return tensor.to(base.header(name).dtype).contiguous()

    names = {base.stored_name(name): name for name in base}
    headers = {stored: base.header(name) for stored, name in names.items()}
    with progress("Merging", sum(header.bytes for header in headers.values())) as advance:
        copy_sidecars(base.folder, folder)
        (folder / "config.json").write_bytes((base.folder / "config.json").read_bytes())
        write_shards(folder, headers, lambda stored: get(names[stored]), max_shard_size=max_shard_size, advance=advance)
    with progress("Comparing", 3) as advance:
        return _check(base, weights, updates, folder, get, advance)


def _merged(base: Checkpoint, name: str, update: Update) -> torch.Tensor:
    """Returns a tensor with an adapter's update added, in float32 or better."""
    tensor = base[name]
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + update.to_weight()


def _check(
    base: Checkpoint,
    weights: Checkpoint,
    updates: Mapping[str, Update],
    folder: Path,
    get: Callable[[str], torch.Tensor],
    advance: Callable[[int], None],
) -> float:
    """Holds three things: merged equals adapter, written equals merged but for rounding, and the folder loads."""
    check_loading(folder, RecoveryError)
    expected = finite(
        probe_logits(weights),
        RecoveryError("the logits of the trained model are not finite; train again at a lower --learning-rate"),
    )
    advance(1)
    if updates:
        beside = probe_logits(base, changed=partial(_beside, updates=updates))
        what = "the merged model's logits differ from those of the model with its adapter"
        hold(compare(beside, expected).largest, TOLERANCE, RecoveryError, what, f"{TOLERANCE:.0e}")
    advance(1)
    written = read_checkpoint(folder)
    for name in base:
        if not identical(written[name], get(name)):
            raise RecoveryError(f"{folder}: tensor {name} is not what was merged; is the disk sound?")
    found = finite(
        probe_logits(written),
        RecoveryError(f"the logits are not finite once the weights are rounded to {base.dtype}"),
    )
    advance(1)
    return compare(found, expected).mean


@contextmanager
def _beside(model: Any, updates: Mapping[str, Update]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, update in updates.items():
            hook = lambda _, inputs, output, update=update: output + update(inputs[0])  # noqa: E731
            module = model.get_submodule(name.removesuffix(".weight"))
            stack.callback(module.register_forward_hook(hook).remove)
        yield
