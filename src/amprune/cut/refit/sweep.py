"""Layer by layer, two streams: the dense model's hidden states and those of the pruned and refitted layers so far."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from amprune.cut.refit.blocks import Blocks, Call, first_calls, observed, run_until_stop
from amprune.cut.refit.moments import FIRST_STRENGTH, Moments, Refit, solve
from amprune.cut.slicing import cuts_by_tensor, output_config, sliced_tensor
from amprune.errors import ReconstructionError
from amprune.model.families import ModelFamily, has_norm_after_output
from amprune.model.reader import Checkpoint
from amprune.plan.artefact import PruningPlan
from amprune.running import Progress

logger = logging.getLogger(__name__)

_NEAR = 1.05
"""More tokens are taken as long as they lower the held-out error by a twentieth."""


@dataclass(frozen=True)
class LayerRefit:
    """What became of one layer's two output projections."""

    attention: Refit
    mlp: Refit
    drift: float
    """Mean over the held-out tokens of the squared error of the layer's hidden states, as a share of their square."""
    tensors: Mapping[str, torch.Tensor]
    """What is refitted, by the names of the dense model, on the CPU in the dtypes of the checkpoint."""


@dataclass
class _Layer:
    """One layer under way: its block, whole and pruned, and the hidden states that enter both, a batch each."""

    whole: torch.nn.Module
    cut: torch.nn.Module
    calls: Mapping[int, Call]
    family: ModelFamily
    direct: bool
    """Projections give into the residual stream, with no norm between."""
    scale: float
    """What the outputs of the projections are multiplied with on their way into the residual stream."""
    entered: list[torch.Tensor]
    entered_cut: list[torch.Tensor]
    fitted: int
    """Batches that the fit sees; the others are held out."""
    moments_dtype: torch.dtype

    def batches(self) -> Iterator[tuple[int, Call, torch.Tensor, torch.Tensor]]:
        for index, (hidden, cut) in enumerate(zip(self.entered, self.entered_cut, strict=True)):
            yield index, self.calls[len(hidden)], hidden, cut


def sweep(
    dense: Checkpoint,
    plan: PruningPlan,
    batches: Sequence[torch.Tensor],
    counts: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    moments_dtype: torch.dtype,
    progress: Progress,
) -> Iterator[LayerRefit]:
    """Refits the output projections of each layer in turn and yields what changed.

    The target of a projection is what the dense model has in its residual stream there, less what the pruned model has
    without it: errors of the layers before are made up for, and not compounded. Where a norm follows the projection,
    the target is the projection's own output in the dense model.

    Args:
        dense: the checkpoint.
        plan: what to keep; of heads and neurons.
        batches: (rows, length) token ids.
        counts: how many of the batches hold a quarter, a half and all of the rows that the fit sees; the others are
            held out.
        device: where blocks and moments lie.
        dtype: of the computation.
        moments_dtype: of the moments and of the solution.
        progress: told of each layer.
    """
    architecture, family = dense.architecture, dense.architecture.family
    read = partial(sliced_tensor, dense, changes=cuts_by_tensor(architecture, plan))
    hidden, calls = first_calls(dense, batches, dtype, device)
    hidden_cut = hidden
    whole = Blocks(dense.config, architecture, dense.__getitem__, dtype, device)
    pruned = output_config(dense.config, architecture, plan)
    cut = Blocks(pruned, architecture, read, dtype, device)
    strengths, fitted = [FIRST_STRENGTH, FIRST_STRENGTH], counts[-1]
    with torch.inference_mode(), progress("Reconstructing", len(calls)) as advance:
        for index, call in enumerate(calls):
            with whole.block(index) as whole_block, cut.block(index) as cut_block:
                layer = _Layer(
                    whole_block, cut_block, call, family, not has_norm_after_output(family, dense.config),
                    _residual_scale(dense.config), hidden, hidden_cut, fitted, moments_dtype,
                )  # fmt: skip
                try:
                    if index == 0 and (enough := _enough(layer, counts)) < fitted:
                        hidden = hidden_cut = hidden[:enough] + hidden[fitted:]
                        fitted = enough
                        layer = replace(layer, entered=hidden, entered_cut=hidden, fitted=fitted)
                    hidden, targets, attention = _refit_attention(layer, strengths[0])
                    mlp = _refit_mlp(layer, hidden, targets, strengths[1])
                except ReconstructionError as error:
                    raise ReconstructionError(f"layer {index}: {error}") from None
                hidden_cut = [call.run(cut_block, entered) for _, call, _, entered in layer.batches()]
                strengths = [
                    refit.strength or before for refit, before in zip((attention, mlp), strengths, strict=True)
                ]
                prefix = family.layer_prefix.format(layer=index)
                refits = {family.attention_output: attention, family.mlp_output: mlp}
                tensors = _changed(read, prefix, cut_block, refits)
            yield LayerRefit(attention, mlp, _drift(hidden[fitted:], hidden_cut[fitted:]), tensors)
            advance(1)


def _enough(layer: _Layer, counts: Sequence[int]) -> int:
    """Returns which of the counts of batches is enough, by the held-out error of the first layer's MLP.

    The fewest win that come within 5 % of the best.
    """
    output = layer.cut.get_submodule(layer.family.mlp_output)
    moments, errors, tokens = _moments(layer, output), dict[int, float](), dict[int, int]()
    order = sorted(layer.batches(), key=lambda batch: batch[0] < layer.fitted)  # held-out ones first
    for index, call, hidden, hidden_cut in order:
        with observed(layer.whole.get_submodule(layer.family.mlp_output)) as dense:
            call.run(layer.whole, hidden)
        with observed(output) as found:
            call.run(layer.cut, hidden_cut)
        missing = dense["gives"].float() - found["gives"].float()
        _add(moments, output, found, missing, held_out=index >= layer.fitted)
        if index + 1 in counts:
            errors[index + 1] = _solved(output, moments, FIRST_STRENGTH, "MLP").held_out_after
            tokens[index + 1] = moments.tokens
    enough = next(count for count in sorted(errors) if errors[count] <= _NEAR * min(errors.values()))
    tried = ", ".join(f"{error:.4f} with {tokens[count]:,}" for count, error in sorted(errors.items()))
    logger.info("held-out error of the first layer's MLP by tokens of the fit: %s; %s taken", tried, tokens[enough])
    return enough


def _residual_scale(config: Mapping[str, Any]) -> float:
    return float(config.get("residual_multiplier") or 1.0)


def _refit_attention(layer: _Layer, strength: float) -> tuple[list[torch.Tensor], list[torch.Tensor], Refit]:
    """Returns what leaves the dense block, what its MLP gives where a norm follows, and the refit."""
    family = layer.family
    output = layer.cut.get_submodule(family.attention_output)
    moments = _moments(layer, output)
    left: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for index, call, hidden, hidden_cut in layer.batches():
        with (
            observed(layer.whole.get_submodule(family.attention_output)) as dense,
            observed(layer.whole.get_submodule(family.mlp_output)) as dense_mlp,
        ):
            left.append(call.run(layer.whole, hidden))
        with observed(output, stop=True) as found:
            run_until_stop(call, layer.cut, hidden_cut)
        missing = dense["gives"].float() - found["gives"].float()
        if layer.direct:
            missing += (hidden.float() - hidden_cut.float()) / layer.scale
        else:
            targets.append(dense_mlp["gives"])
        _add(moments, output, found, missing, held_out=index >= layer.fitted)
    return left, targets, _refit(output, moments, strength, "attention")


def _refit_mlp(layer: _Layer, left: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], strength: float) -> Refit:
    output = layer.cut.get_submodule(layer.family.mlp_output)
    moments = _moments(layer, output)
    for index, call, _, hidden_cut in layer.batches():
        with observed(output) as found:
            left_cut = call.run(layer.cut, hidden_cut)
        if layer.direct:
            missing = (left[index].float() - left_cut.float()) / layer.scale
        else:
            missing = targets[index].float() - found["gives"].float()
        _add(moments, output, found, missing, held_out=index >= layer.fitted)
    return _refit(output, moments, strength, "MLP")


def _by_input(module: Any) -> torch.Tensor:
    """Returns a projection's weight as (inputs, outputs)."""
    weight: torch.Tensor = module.weight
    return weight if isinstance(module, Conv1D) else weight.T


def _moments(layer: _Layer, module: Any) -> Moments:
    inputs, outputs = _by_input(module).shape
    return Moments(inputs + (module.bias is not None), outputs, module.weight.device, layer.moments_dtype)


def _add(
    moments: Moments, module: Any, found: Mapping[str, torch.Tensor], missing: torch.Tensor, *, held_out: bool
) -> None:
    given = found["given"].float()
    if module.bias is not None:
        given = torch.cat([given, torch.ones_like(given[..., :1])], dim=-1)
    moments.add(given, missing, missing + found["gives"].float().view_as(missing), held_out=held_out)


def _solved(module: Any, moments: Moments, strength: float, part: str) -> Refit:
    try:
        return solve(moments, bias=module.bias is not None, strength=strength)
    except ReconstructionError as error:
        raise ReconstructionError(f"the {part} {error}") from None


def _refit(module: Any, moments: Moments, strength: float, part: str) -> Refit:
    refit = _solved(module, moments, strength, part)
    if refit.change is not None:
        _by_input(module).copy_(_by_input(module).double() + refit.change)
    if refit.bias_change is not None:
        module.bias.copy_(module.bias.double() + refit.bias_change)
    return refit


def _changed(
    read: Callable[[str], torch.Tensor], prefix: str, block: torch.nn.Module, refits: Mapping[str, Refit]
) -> dict[str, torch.Tensor]:
    """Adds the changes to what is stored, which may be more exact than what was computed with."""
    changed = {}
    for output, refit in refits.items():
        changes = {"bias": refit.bias_change}
        if refit.change is not None:
            transposed = isinstance(block.get_submodule(output), Conv1D)
            changes["weight"] = refit.change if transposed else refit.change.T
        for own, change in changes.items():
            if change is not None:
                stored = read(name := f"{prefix}{output}.{own}")
                changed[name] = (stored.double() + change.cpu()).to(stored.dtype).contiguous()
    return changed


def _drift(hidden: Sequence[torch.Tensor], hidden_cut: Sequence[torch.Tensor]) -> float:
    errors = [
        (one.float() - other.float()).square().sum(-1) / one.float().square().sum(-1).clamp_min(1e-30)
        for one, other in zip(hidden, hidden_cut, strict=True)
    ]
    return float(torch.cat([error.flatten() for error in errors]).double().mean())
