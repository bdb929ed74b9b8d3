"""The sizes of a model that pruning depends on, as plain numbers: no weights, no torch."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from amprune.errors import AmpruneError
from amprune.records import Count, Whole, parse

_AGAIN = "make the file again"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model and what one unit of each kind costs.

    `parameters` counts the whole model, tied embeddings once. The three `*_parameters` of units are per layer: weights
    and biases that disappear with one query head, one key-value head, one neuron. `layer_parameters` disappear with a
    whole decoder block, norms included; 0 where it is not known.
    """

    model_type: str
    num_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    intermediate_size: Count
    parameters: Count
    query_head_parameters: Whole
    key_value_head_parameters: Whole
    neuron_parameters: Whole
    query_head_counts: tuple[int, ...]
    """Numbers of query heads with which stock transformers accepts the config."""
    heads_refused: str | None = None
    """Why heads cannot be removed, or None when they can."""
    layer_parameters: Whole = 0
    blocks_refused: str | None = None
    """Why whole blocks cannot be removed, or None when they can."""

    @property
    def group_size(self) -> int:
        """Query heads that read one key-value head (`num_key_value_groups` in transformers)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_parameters(self) -> int:
        """A of the budget: what all attention modules hold in tensors that shrink with heads."""
        heads = self.num_attention_heads * self.query_head_parameters
        return self.num_layers * (heads + self.num_key_value_heads * self.key_value_head_parameters)

    @property
    def mlp_parameters(self) -> int:
        """M of the budget: what all MLPs hold in tensors that shrink with neurons."""
        return self.num_layers * self.intermediate_size * self.neuron_parameters

    def shrunk(
        self, *, query_heads: int, key_value_heads: int, neurons: int, layers: int | None = None
    ) -> "ModelShape":
        """Returns the shape with these numbers of units kept in every layer, and this many layers (None: all)."""
        layers = self.num_layers if layers is None else layers
        removed = (self.num_attention_heads - query_heads) * self.query_head_parameters
        removed += (self.num_key_value_heads - key_value_heads) * self.key_value_head_parameters
        removed += (self.intermediate_size - neurons) * self.neuron_parameters
        gone = (self.num_layers - layers) * self.layer_parameters
        return replace(
            self,
            num_layers=layers,
            num_attention_heads=query_heads,
            num_key_value_heads=key_value_heads,
            intermediate_size=neurons,
            parameters=self.parameters - gone - layers * removed,
            layer_parameters=max(self.layer_parameters - removed, 0),
            query_head_counts=tuple(count for count in self.query_head_counts if count <= query_heads),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `from_dict` is its inverse."""
        return {**asdict(self), "query_head_counts": list(self.query_head_counts)}

    @classmethod
    def from_dict(cls, values: object, *, where: str, error: type[AmpruneError]) -> "ModelShape":
        """Reads the JSON form, raising `error` with the place `where` when a field is missing or of a wrong type."""
        shape = parse(cls, values, where=where, error=error, remedy=_AGAIN, extra=False)
        shape.check_sums(where=where, error=error)
        return shape

    def check_sums(self, *, where: str, error: type[AmpruneError]) -> None:
        """Raises `error` with the place `where` for sizes that contradict each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise error(
                f"{where}: {self.num_attention_heads} query heads cannot be shared out evenly among "
                f"{self.num_key_value_heads} key-value heads; {_AGAIN}"
            )
        units = max(self.attention_parameters + self.mlp_parameters, self.num_layers * self.layer_parameters)
        if self.parameters < units:
            raise error(
                f"{where}: parameters is {self.parameters}, but heads and neurons, or blocks, alone have {units}; "
                f"{_AGAIN}"
            )

    def differences(self, other: "ModelShape") -> list[str]:
        """Names every size in which two shapes differ, as `name mine != theirs`."""
        silent = {"heads_refused", "blocks_refused", "query_head_counts"}
        if not (self.layer_parameters and other.layer_parameters):
            silent.add("layer_parameters")
        names = (field.name for field in fields(self) if field.name not in silent)
        return [
            f"{name} {getattr(self, name)} != {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
