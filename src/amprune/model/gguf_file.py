"""A GGUF file: what it says of itself, and what it holds as a model of transformers."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from amprune.errors import CheckpointError, reason, required
from amprune.model.architecture import PreTrainedModel, config_with_heads, describe, make_config
from amprune.model.families import find_family

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    row: int
    """Elements of a row, by which llama.cpp quantises."""
    matrix: bool
    elements: int
    bytes: int
    type: str
    """Such as F32, Q8_0 or Q4_K."""


@dataclass(frozen=True)
class GgufFile:
    """A file without its weights."""

    path: Path
    architecture: str
    fields: dict[str, Any]
    """Numbers and texts of the header, those of the architecture without its name in front."""
    control_tokens: frozenset[int]
    """Ids that stand for no text, among which are those that end it."""
    tensors: tuple[GgufTensor, ...]

    @property
    def type(self) -> str:
        """The type of the file, such as q4_k_m; that of most weights where the header says none."""
        import gguf

        try:
            name: str = gguf.LlamaFileType(self.fields["general.file_type"]).name
        except (KeyError, ValueError):
            return max(self.types, key=lambda kind: self.types[kind][1]).lower()
        return name.removeprefix("ALL_").removeprefix("MOSTLY_").lower()

    @property
    def types(self) -> dict[str, tuple[int, int]]:
        """Numbers of tensors and bytes by type, the largest first."""
        count, size = Counter[str](), Counter[str]()
        for tensor in self.tensors:
            count[tensor.type] += 1
            size[tensor.type] += tensor.bytes
        return {kind: (count[kind], total) for kind, total in size.most_common()}

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def vocabulary(self) -> int:
        """Token ids that it embeds."""
        table = next(tensor for tensor in self.tensors if tensor.name == _EMBEDDING)
        return table.elements // table.row

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes read to decode one token: all tensors but an embedding table that the head does not share."""
        looked_up = any(tensor.name == _HEAD for tensor in self.tensors)
        return sum(tensor.bytes for tensor in self.tensors if not (looked_up and tensor.name == _EMBEDDING))

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a token adds to the key-value cache, of float16 in llama.cpp where nothing else is said."""
        heads, width = self.fields["attention.head_count_kv"], self.fields.get("attention.key_length")
        if width is None:
            width = self.fields["embedding_length"] // self.fields["attention.head_count"]
        return int(self.fields["block_count"] * heads * (width + self.fields.get("attention.value_length", width)) * 2)


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, and holds it to the tensors that are there."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    required(f"{path}, a GGUF file,", "gguf")
    file = _read(path, path.stat().st_mtime_ns)
    _check_claims(file)
    return file


def _check_claims(file: GgufFile) -> None:
    """Refuses a part of a model, and sizes in the header that the tensors do not have."""
    if (parts := file.fields.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{file.path} is part {file.fields.get('split.no', 0) + 1} of {parts} of a model; join the parts into one "
            "file (`llama-gguf-split --merge FIRST-PART WHOLE.gguf`), or give the Hugging Face folder that they were "
            "made from"
        )
    names = [tensor.name for tensor in file.tensors]
    blocks = {int(found[1]) for name in names if (found := _BLOCK.match(name))}
    rows = {tensor.name: tensor.row for tensor in file.tensors}
    _check_claim(file, "block_count", len(blocks) if blocks == set(range(len(blocks))) else None)
    _check_claim(file, "embedding_length", rows.get(_EMBEDDING))


def _check_claim(file: GgufFile, name: str, there: int | None) -> None:
    claimed = file.fields.get(name)
    if isinstance(claimed, int) and claimed != there:
        raise CheckpointError(
            f"{file.path} says {name} {claimed:,}, but its {len(file.tensors)} tensors have {there or 'others'}; it is "
            "incomplete or damaged: download it again, or give the Hugging Face folder that it was made from"
        )


def set_width(file: GgufFile, neurons: int) -> GgufFile:
    """Puts the number of neurons into the header in place, where a converter wrote four times the hidden size.

    That is what llama.cpp's converter assumes of families whose MLPs are always so wide, such as Phi-2. Returns the
    file as it is then.
    """
    if not file.fields.get("feed_forward_length") == 4 * file.fields["embedding_length"] != neurons:
        return file
    from gguf import GGUFReader

    reader = GGUFReader(file.path, "r+")
    field = reader.fields[f"{file.architecture}.feed_forward_length"]
    field.parts[field.data[0]][0] = neurons
    reader.data.flush()
    _read.cache_clear()  # the time of change may be the same
    return read_gguf(file.path)


@lru_cache(maxsize=16)
def _read(path: Path, _changed: int) -> GgufFile:
    from gguf import GGUFReader, TokenType

    control = TokenType.CONTROL.value
    try:
        reader = GGUFReader(path)
        kind = str(reader.fields["general.architecture"].contents())
        kinds = reader.fields.get("tokenizer.ggml.token_type")
        return GgufFile(
            path=path,
            architecture=kind,
            fields={
                name.removeprefix(f"{kind}."): field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("tokenizer.")
            },
            control_tokens=frozenset(
                index for index, found in enumerate(kinds.contents() if kinds else ()) if found == control
            ),
            tensors=tuple(
                GgufTensor(
                    tensor.name,
                    int(tensor.shape[0]),
                    len(tensor.shape) > 1,
                    int(tensor.n_elements),
                    int(tensor.n_bytes),
                    tensor.tensor_type.name,
                )
                for tensor in reader.tensors
            ),
        )
    except (OSError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is no GGUF file, or truncated: {reason(error)}") from error


_COMPUTED = "rope_"
"""What tensors are called that a model computes from its config."""
_ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
"""Of any hidden size."""


def load_gguf(gguf: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Returns the model, dequantised, and the tokenizer of a GGUF file.

    Args:
        gguf: the file.
        dtype: of the weights.
        options: what tells transformers to unpack them.
    """
    file = read_gguf(gguf)
    stored = {tensor.name: tensor.elements for tensor in file.tensors}
    widths = [tensor.row for tensor in file.tensors if tensor.name == "blk.0.ffn_down.weight"]
    _check_claim(file, "feed_forward_length", next(iter(widths), None))
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _any_heads():
        config = AutoConfig.from_pretrained(**where)
        if config.model_type == "llama":
            config.attention_bias = "blk.0.attn_q.bias" in stored
            config.mlp_bias = "blk.0.ffn_down.bias" in stored
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, config=config, **options, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    model, report = loaded
    _check_whole(gguf, stored, model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    _check_rotation(file, model)
    odd = config.model_type == "llama" and config.hidden_size % config.num_attention_heads
    return _as_equivalent(model) if odd else model, tokenizer


@contextmanager
def _any_heads() -> Iterator[None]:
    """Lets a LlamaConfig have heads that do not divide the hidden size, as llama.cpp does."""
    config: Any = LlamaConfig
    validators = config.__class_validators__
    config.__class_validators__ = [check for check in validators if check.__name__ != "validate_architecture"]
    try:
        yield
    finally:
        config.__class_validators__ = validators


def _check_whole(gguf: Path, stored: Mapping[str, int], model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuses a model that has weights which are not the file's, and one that has fewer.

    A bias that the file lacks is none, as in llama.cpp: it is set to zero here, whatever it was drawn as.
    """
    none = {name for name in missing if name.endswith(".bias")}
    for name in none:
        model.get_parameter(name).data.zero_()
    if missing := set(missing) - none:
        raise CheckpointError(
            f"{gguf} lacks {len(missing)} tensors of a {model.config.model_type}, such as {min(missing)}, or has them "
            "in another shape; give the Hugging Face folder that the file was made from"
        )
    weights = sum(count for name, count in stored.items() if not name.startswith(_COMPUTED))
    read = sum(tensor.numel() for name, tensor in model.named_parameters() if name not in none)
    if weights > read:
        raise CheckpointError(
            f"{gguf} has {weights:,} weights, of which transformers reads {read:,} as a {model.config.model_type}; "
            "give the Hugging Face folder that the file was made from"
        )


def _check_rotation(file: GgufFile, model: PreTrainedModel) -> None:
    """Refuses a model that rotates another part of each head than the file says, since its reader does not ask."""
    rotated = file.fields.get("rope.dimension_count")
    widths = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")}
    if rotated is not None and widths and rotated not in widths:
        raise CheckpointError(
            f"{file.path} rotates {rotated} numbers of each head, but transformers reads {min(widths)}; give the "
            "Hugging Face folder that the file was made from"
        )


def _as_equivalent(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model of an architecture that accepts its number of heads, with the same tensors."""
    raw = {**model.config.to_dict(), **_ONE_HEAD}
    shape = replace(describe(raw).shape, **{name: getattr(model.config, name) for name in _ONE_HEAD})
    entries = config_with_heads(raw, find_family("llama"), shape)
    with torch.device("meta"):
        other: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(entries, where="config.json"))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other
