"""From a trained adapter, or trained weights, to an ordinary checkpoint that computes the same."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from amprune.errors import RecoveryError, reason
from amprune.model.reader import Checkpoint, identical, read_checkpoint
from amprune.model.writer import copy_sidecars, write_shards
from amprune.prove.comparison import check_loading, compare, finite, hold, probe_logits
from amprune.running import Advance, Progress, no_progress

TOLERANCE = 1e-4
"""Largest allowed difference of a logit before rounding, in standard deviations: sums are taken in float32."""
_CONFIG = "adapter_config.json"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight: `scale * up @ down`."""

    down: torch.Tensor
    """Shape (rank, inputs)."""
    up: torch.Tensor
    """Shape (outputs, rank)."""
    scale: float
    transposed: bool
    """The weight has the shape (inputs, outputs), as in GPT-2."""

    def to_weight(self) -> torch.Tensor:
        """Returns the product, in float32 and in the weight's own shape."""
        product = self.scale * (self.up @ self.down)
        return product.T if self.transposed else product

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns what the adapter adds to the layer's output, without multiplying the factors."""
        down, up = self.down.to(inputs.dtype), self.up.to(inputs.dtype)
        return self.scale * (inputs @ down.T) @ up.T


def read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, Update]:
    """Reads a saved adapter as updates of a checkpoint's tensors."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / "adapter_model.safetensors")
        scale, transposed = float(config["lora_alpha"]) / int(config["r"]), bool(config["fan_in_fan_out"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RecoveryError(f"{folder} holds no adapter, or a damaged one: {reason(error)}") from error
    modules = {name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in stored if name.endswith(_DOWN)}
    if stored.keys() != {f"{_PREFIX}{module}{factor}" for module in modules for factor in (_DOWN, _UP)}:
        raise RecoveryError(f"{folder} is no LoRA adapter, or a damaged one: its tensors are not in pairs")
    updates, other = {}, f"{folder} is the adapter of another model"
    for module in sorted(modules):
        down, up = (stored[f"{_PREFIX}{module}{factor}"].float() for factor in (_DOWN, _UP))
        tensor, found = f"{module}.weight", (up.shape[0], down.shape[1])
        if tensor not in checkpoint:
            raise RecoveryError(f"{other}: {checkpoint.folder} has no tensor {tensor}")
        found, expected = found[::-1] if transposed else found, checkpoint.header(tensor).shape
        if found != expected:
            raise RecoveryError(
                f"{other}: it changes {tensor} by a matrix of {found}, but in {checkpoint.folder} it is {expected}"
            )
        updates[tensor] = Update(down, up, scale, transposed)
    return updates


def write_recovered(
    base: Checkpoint, trained: Path, folder: Path, *, max_shard_size: str = "5GB", progress: Progress = no_progress
) -> float:
    """Writes the merged checkpoint into a staged folder, holding one shard in memory at a time, and compares it.

    `trained` holds the adapter, or where every weight was trained the model. Returns how far the logits of the written
    model are from those of the trained one, as a root mean square in units of their standard deviation, in float64:
    what rounding the sums to the checkpoint's dtype costs.
    """
    adapted = (trained / _CONFIG).is_file()
    updates = read_adapter(trained, base) if adapted else {}
    merged = {name: partial(_merged, base, name, update) for name, update in updates.items()}
    weights = base.replaced(merged) if adapted else read_checkpoint(trained)

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
    advance: Advance,
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
