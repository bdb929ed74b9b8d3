"""The plan as a value and as a file: the units that each layer keeps, and the invariants that they obey."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.heads import Budget
from amprune.records import Rule, Share, parse, read_object, short, write_text

_FORMATS = (1, 2)
_AGAIN = "make it with `amprune plan`"
_NEEDED = {"needed": True}


@dataclass(frozen=True)
class LayerPlan:
    """Units that one layer keeps, by their index in the dense model, ascending."""

    query_heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    neurons: tuple[int, ...]


_LISTS = ", ".join(field.name for field in fields(LayerPlan))
_Kept = Annotated[LayerPlan | None, Rule(f"an object with the lists {_LISTS}, or null where the block is removed")]


@dataclass(frozen=True)
class PruningPlan:
    """What a whole model keeps; made by `make_plan`, checked by `check_plan`."""

    ratio_target: Share
    ratio_actual: Share
    shape_before: ModelShape
    shape_after: ModelShape
    layers: tuple[_Kept, ...]
    """What each layer of the dense model keeps; None where the whole block is removed."""
    provenance: dict[str, Any]
    """Where it comes from, for those who read it: criterion, calibration, versions, measurements."""
    options: dict[str, Any] = field(default_factory=dict, metadata=_NEEDED)
    """What was asked for, with the `heads_mode` and the `neuron_multiple` that were used."""
    compensated: bool = field(default=False, metadata=_NEEDED)
    """Whether biases make up for the mean of what is removed."""
    refitted: bool = field(default=False, metadata=_NEEDED)
    """Whether the kept weights of the output projections are refitted."""

    @property
    def fingerprint(self) -> str | None:
        """Identifies the weights that the plan is for; None: any of this shape."""
        return self.provenance.get("fingerprint")

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The blocks that stay, by their index in the dense model, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer is not None)

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen, as it is told: the options, and `bias_compensation` or `reconstruct` where true."""
        chosen = {"bias_compensation": self.compensated, "reconstruct": self.refitted}
        return dict(sorted({**self.options, **{name: True for name, said in chosen.items() if said}}.items()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `plan.json`, one line a layer; the same plan gives the same bytes."""
        head = {
            "format": _FORMATS[-1],
            "ratio_target": self.ratio_target,
            "ratio_actual": self.ratio_actual,
            "shape_before": self.shape_before.to_dict(),
            "shape_after": self.shape_after.to_dict(),
            "options": self.options,
            "compensated": self.compensated,
            "refitted": self.refitted,
            "provenance": self.provenance,
        }
        entries = [f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(layer and vars(layer))}" for layer in self.layers)
        text = "{\n" + ",\n".join([*entries, f'  "layers": [\n{rows}\n  ]']) + "\n}\n"
        write_text(Path(path), text, error=PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Reads and checks a plan.

        Raises:
            PlanError: the file is missing, no plan, or edited into one that no model can keep.
        """
        where = str(path)
        content = read_object(Path(path), error=PlanError, hint=f"; {_AGAIN}")
        if content.get("format") not in _FORMATS:
            known = " or ".join(map(str, _FORMATS))
            raise PlanError(f"{where} is no plan of amprune (format {known}); {_AGAIN}")
        content = _renewed(content) if content["format"] == 1 else content
        plan = parse(cls, content, where=where, error=PlanError, remedy=_AGAIN, extra=False)
        for name in ("shape_before", "shape_after"):
            getattr(plan, name).check_sums(where=f"{where}: {name}", error=PlanError)
        parse(_Provenance, plan.provenance, where=f"{where}: provenance", error=PlanError, remedy=_AGAIN)
        check_plan(plan, where=where)
        return plan


@dataclass(frozen=True)
class _Damage:
    kl: float


@dataclass(frozen=True)
class _Split:
    budget: Budget
    ratio: float
    damage: _Damage
    refitted: _Damage | None = None
    measured_neurons: int | None = None


@dataclass(frozen=True)
class _Allocation:
    candidates: tuple[_Split, ...]
    chosen: int


@dataclass(frozen=True)
class _Provenance:
    """What of it is read again, to be shown or compared."""

    fingerprint: str | None = None
    criterion: str | None = None
    calibration: dict[str, Any] | None = None
    allocation: _Allocation | None = None
    speedup: dict[str, Any] | None = None
    preset: str | None = None


def _renewed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a plan of format 1 the fields of today: its provenance held the options, and what else was chosen."""
    provenance = content.get("provenance")
    found = provenance.get("options") if isinstance(provenance, dict) else None
    options = dict(found) if isinstance(found, dict) else {}
    new = {
        "compensated": options.pop("bias_compensation", None) is True,
        "refitted": options.pop("reconstruct", None) is True,
        "options": options,
    }
    if isinstance(provenance, dict):
        new["provenance"] = {name: value for name, value in provenance.items() if name != "options"}
    return {**content, **new}


def check_plan(plan: PruningPlan, *, where: str = "plan") -> None:
    """Holds a plan, of units or of blocks, to its invariants: sorted, in range, every layer alike, groups intact."""
    before, after = plan.shape_before, plan.shape_after
    if len(plan.layers) != before.num_layers:
        raise PlanError(f"{where}: has {len(plan.layers)} layers, but the model has {before.num_layers}")
    _check_blocks(plan, where)
    for index in plan.kept_layers:
        _check_layer(plan, index, f"{where}: layer {index}")
    expected = before.shrunk(
        query_heads=after.num_attention_heads, key_value_heads=after.num_key_value_heads,
        neurons=after.intermediate_size, layers=after.num_layers,
    )  # fmt: skip
    if after != expected:
        found, wanted = after.to_dict(), expected.to_dict()
        name = next(name for name in wanted if found[name] != wanted[name])
        raise PlanError(
            f"{where}: shape_after disagrees with shape_before and the kept units: {name} is {short(found[name])}, "
            f"expected {short(wanted[name])}"
        )
    heads = after.num_attention_heads
    if heads != before.num_attention_heads and before.heads_refused is not None:
        raise PlanError(f"{where}: removes heads of a {before.model_type} model: {before.heads_refused}")
    if heads not in (before.num_attention_heads, *before.query_head_counts):
        raise PlanError(
            f"{where}: keeps {heads} query heads, but transformers loads a {before.model_type} model of hidden size "
            f"{before.hidden_size} only with {', '.join(map(str, before.query_head_counts))}"
        )
    actual = 1 - after.parameters / before.parameters
    if abs(actual - plan.ratio_actual) > 1e-9:
        raise PlanError(f"{where}: ratio_actual is {plan.ratio_actual}, but the kept units give {actual}")


def _check_blocks(plan: PruningPlan, where: str) -> None:
    before, kept = plan.shape_before, len(plan.kept_layers)
    if kept == 0:
        raise PlanError(f"{where}: removes every block; at least one must stay")
    if kept != plan.shape_after.num_layers:
        raise PlanError(
            f"{where}: keeps {kept} of {before.num_layers} blocks, but shape_after says {plan.shape_after.num_layers}"
        )
    if kept < before.num_layers and before.blocks_refused is not None:
        raise PlanError(f"{where}: removes blocks of a {before.model_type} model: {before.blocks_refused}")
    if kept < before.num_layers and not before.layer_parameters:
        raise PlanError(f"{where}: removes blocks, but does not say how many parameters one holds (layer_parameters)")


def _check_layer(plan: PruningPlan, index: int, where: str) -> None:
    layer, before, after = plan.layers[index], plan.shape_before, plan.shape_after
    assert layer is not None
    for kind, total, kept in (
        ("query_heads", before.num_attention_heads, after.num_attention_heads),
        ("key_value_heads", before.num_key_value_heads, after.num_key_value_heads),
        ("neurons", before.intermediate_size, after.intermediate_size),
    ):
        _check_units(getattr(layer, kind), total, kept, f"{where}, {kind}")
    readers = dict.fromkeys(layer.key_value_heads, 0)
    for head in layer.query_heads:
        if (read := head // before.group_size) not in readers:
            raise PlanError(f"{where}: keeps query head {head} but not key-value head {read}, which it reads")
        readers[read] += 1
    fewest, most = min(readers, key=lambda k: readers[k]), max(readers, key=lambda k: readers[k])
    if readers[fewest] != readers[most]:
        raise PlanError(
            f"{where}: keeps {readers[fewest]} query heads for key-value head {fewest} and {readers[most]} for "
            f"key-value head {most}; grouped-query attention needs the same number in every group"
        )


def _check_units(units: Sequence[int], total: int, kept: int, where: str) -> None:
    if len(units) != kept:
        raise PlanError(f"{where}: keeps {len(units)} units, but shape_after says {kept} in every layer")
    if not units:
        raise PlanError(f"{where}: keeps no unit; at least one must stay")
    for left, right in itertools.pairwise(units):
        if left >= right:
            problem = "is listed twice" if left == right else f"comes after {left}; units must ascend"
            raise PlanError(f"{where}: unit {right} {problem}")
    if units[0] < 0 or units[-1] >= total:
        wrong = units[0] if units[0] < 0 else units[-1]
        raise PlanError(f"{where}: unit {wrong} is out of range, the model has 0 to {total - 1}")
