"""What a GGUF file says of itself: architecture, sizes, tensors and their types."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from amprune.errors import CheckpointError, reason, required

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


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
    """Reads the header of a GGUF file."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    required(f"{path}, a GGUF file,", "gguf")
    return _read(path, path.stat().st_mtime_ns)


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
