"""The plan as a value and as a file: the units that each layer keeps, and the invariants that they obey."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amprune.errors import PlanError
from amprune.model.shape import ModelShape

_FORMAT = 1
_FIELDS = ("format", "ratio_target", "ratio_actual", "shape_before", "shape_after", "provenance", "layers")
_KINDS = ("query_heads", "key_value_heads", "neurons")


@dataclass(frozen=True)
class LayerPlan:
    """Units that one layer keeps, by their index in the dense model, ascending."""

    query_heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """What a whole model keeps; made by `make_plan`, checked by `check_plan`."""

    ratio_target: float
    ratio_actual: float
    shape_before: ModelShape
    shape_after: ModelShape
    layers: tuple[LayerPlan | None, ...]
    """What each layer of the dense model keeps; None where the whole block is removed."""
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str | None:
        """Identifies the weights that the plan is for; None: any of this shape."""
        return self.provenance.get("fingerprint")

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The blocks that stay, by their index in the dense model, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer is not None)

    @property
    def compensates_biases(self) -> bool:
        """Whether biases make up for the mean of what is removed."""
        return self._says("bias_compensation")

    @property
    def refits_outputs(self) -> bool:
        """Whether the kept weights of the output projections are refitted."""
        return self._says("reconstruct")

    def _says(self, option: str) -> bool:
        options = self.provenance.get("options")
        return isinstance(options, dict) and options.get(option) is True

    def saying(self, option: str) -> "PruningPlan":
        """Returns the plan with an option that is true, such as `bias_compensation` or `reconstruct`."""
        options = self.provenance.get("options") or {}
        return replace(self, provenance={**self.provenance, "options": {**options, option: True}})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `plan.json`, one line a layer; the same plan gives the same bytes."""
        path = Path(path)
        head = {
            "format": _FORMAT,
            "ratio_target": self.ratio_target,
            "ratio_actual": self.ratio_actual,
            "shape_before": self.shape_before.to_dict(),
            "shape_after": self.shape_after.to_dict(),
            "provenance": self.provenance,
        }
        entries = [f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in head.items()]
        rows = ",\n".join(f"    {_written(layer)}" for layer in self.layers)
        text = "{\n" + ",\n".join([*entries, f'  "layers": [\n{rows}\n  ]']) + "\n}\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Reads and checks a plan.

        Raises:
            PlanError: the file is missing, no plan, or edited into one that no model can keep.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise PlanError(f"{path} is no plan of amprune (format {_FORMAT}); make it with `amprune plan`")
        where = str(path)
        _check_fields(content, _FIELDS, where)
        layers = content["layers"]
        if not isinstance(layers, list):
            raise PlanError(
                f"{where}: layers is {_short(layers)}, expected a list with an object for each layer, or null where "
                "the block is removed"
            )
        plan = cls(
            ratio_target=_number(content, "ratio_target", where),
            ratio_actual=_number(content, "ratio_actual", where),
            shape_before=ModelShape.from_dict(content["shape_before"], where=f"{where}: shape_before", error=PlanError),
            shape_after=ModelShape.from_dict(content["shape_after"], where=f"{where}: shape_after", error=PlanError),
            layers=tuple(_read_layer(entry, index, where) for index, entry in enumerate(layers)),
            provenance=_read_provenance(content["provenance"], where),
        )
        check_plan(plan, where=where)
        return plan


def _written(layer: LayerPlan | None) -> str:
    return json.dumps(layer and {kind: list(units) for kind, units in vars(layer).items()})


def _check_fields(content: Mapping[str, Any], expected: Sequence[str], where: str) -> None:
    if missing := [name for name in expected if name not in content]:
        raise PlanError(f"{where}: lacks the field {missing[0]}; make it with `amprune plan`")
    if unknown := sorted(set(content) - set(expected)):
        raise PlanError(f"{where}: has the unknown field {unknown[0]}, expected only {', '.join(expected)}")


def _number(content: Mapping[str, Any], name: str, where: str) -> float:
    value = content[name]
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise PlanError(f"{where}: {name} is {_short(value)}, expected a number of at least 0 and less than 1")
    return float(value)


def _read_provenance(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), (str, type(None))):
        raise PlanError(f"{where}: provenance is {_short(value)}, expected an object whose fingerprint is text or null")
    return value


def _read_layer(entry: object, index: int, where: str) -> LayerPlan | None:
    where = f"{where}: layer {index}"
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise PlanError(
            f"{where} is {_short(entry)}, expected an object with the lists {', '.join(_KINDS)}, or null where the "
            "block is removed"
        )
    _check_fields(entry, _KINDS, where)
    for kind in _KINDS:
        if not isinstance(entry[kind], list):
            raise PlanError(f"{where}, {kind} is {_short(entry[kind])}, expected a list of the units that stay")
        for unit in entry[kind]:
            if type(unit) is not int:
                raise PlanError(f"{where}, {kind}: unit {_short(unit)} is no whole number")
    return LayerPlan(**{kind: tuple(entry[kind]) for kind in _KINDS})


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_plan(plan: PruningPlan, *, where: str = "plan") -> None:
    """Holds a plan to its invariants: sorted, in range, the same counts in every layer, groups intact.

    Raises:
        PlanError: names the layer and the unit.
    """
    before, after = plan.shape_before, plan.shape_after
    if len(plan.layers) != before.num_layers:
        raise PlanError(f"{where}: has {len(plan.layers)} layers, but the model has {before.num_layers}")
    _check_blocks(plan, where)
    for index, layer in enumerate(plan.layers):
        if layer is None:
            continue
        for kind, total, kept in (
            ("query_heads", before.num_attention_heads, after.num_attention_heads),
            ("key_value_heads", before.num_key_value_heads, after.num_key_value_heads),
            ("neurons", before.intermediate_size, after.intermediate_size),
        ):
            _check_units(getattr(layer, kind), total, kept, f"{where}: layer {index}, {kind}")
        _check_groups(layer, before.group_size, f"{where}: layer {index}")
    expected = before.shrunk(
        query_heads=after.num_attention_heads,
        key_value_heads=after.num_key_value_heads,
        neurons=after.intermediate_size,
        layers=after.num_layers,
    )
    if after != expected:
        found, wanted = after.to_dict(), expected.to_dict()
        name = next(name for name in wanted if found[name] != wanted[name])
        raise PlanError(
            f"{where}: shape_after disagrees with shape_before and the kept units: {name} is {_short(found[name])}, "
            f"expected {_short(wanted[name])}"
        )
    if after.num_attention_heads != before.num_attention_heads:
        if before.heads_refused is not None:
            raise PlanError(f"{where}: removes heads of a {before.model_type} model: {before.heads_refused}")
        if after.num_attention_heads not in before.query_head_counts:
            raise PlanError(
                f"{where}: keeps {after.num_attention_heads} query heads, but transformers loads a {before.model_type} "
                f"model of hidden size {before.hidden_size} only with {', '.join(map(str, before.query_head_counts))}"
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


def _check_groups(layer: LayerPlan, group_size: int, where: str) -> None:
    readers = dict.fromkeys(layer.key_value_heads, 0)
    for head in layer.query_heads:
        if head // group_size not in readers:
            raise PlanError(
                f"{where}: keeps query head {head} but not key-value head {head // group_size}, which it reads"
            )
        readers[head // group_size] += 1
    fewest, most = min(readers, key=lambda k: readers[k]), max(readers, key=lambda k: readers[k])
    if readers[fewest] != readers[most]:
        raise PlanError(
            f"{where}: keeps {readers[fewest]} query heads for key-value head {fewest} and {readers[most]} for "
            f"key-value head {most}; grouped-query attention needs the same number in every group"
        )
