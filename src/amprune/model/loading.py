"""A folder as a transformers model and tokenizer, always by the stock `from_pretrained`."""

import math
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from amprune.errors import CheckpointError, reason
from amprune.model.architecture import PreTrainedModel, quiet_transformers
from amprune.model.files import check_ends, check_no_pointer, stored_tensors
from amprune.model.quantization import quantization_of, require_library
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.streaming import streamed_model
from amprune.records import read_object
from amprune.settings import Compute

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json",
)  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")


@contextmanager
def loaded_model(
    source: Path | Checkpoint, *, dtype: str = "auto", device: str | None = None, device_map: str | None = None
) -> Iterator[PreTrainedModel]:
    """Loads a model in evaluation mode, always as the stock class: code that a checkpoint carries never runs.

    `source` is the Hugging Face folder of any causal language model, or one that is opened. The model computes in
    `dtype` (auto: that of its weights) on `device`, by default cuda where there is one, else cpu. The `device_map` auto
    spreads it over devices, memory and disk; disk streams each module from its file.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if device_map is not None and device is not None:
        raise CheckpointError("give a device or a device_map, not both")
    if device_map == "disk":
        checkpoint = read_checkpoint(source) if isinstance(source, Path) else source
        yield streamed_model(checkpoint, checkpoint.computed_in(dtype))
        return
    folder = source if isinstance(source, Path) else source.folder
    quantization = None  # of an opened checkpoint, which refuses quantised weights
    if isinstance(source, Path) and (file := folder / "config.json").is_file():
        quantization = quantization_of(read_object(file))
    if quantization is not None:
        require_library(str(quantization.get("quant_method")), f"{folder}, which is quantised,")
    # Quantised weights are unpacked for their device as they are loaded; not all can move afterwards.
    place = {"": device_of(device)} if quantization is not None and device_map is None else device_map
    with tempfile.TemporaryDirectory(prefix="amprune-offload-") as offload:
        try:
            with quiet_transformers(bars_on_terminal=True):
                load: Any = AutoModelForCausalLM.from_pretrained
                model, report = load(
                    folder,
                    dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                    device_map=place,
                    offload_folder=offload,
                    local_files_only=True,
                    trust_remote_code=False,  # else transformers asks on the terminal
                    output_loading_info=True,
                )
        except Exception as error:  # of a damaged config or tensor, transformers raises many types
            raise CheckpointError(f"transformers cannot load {folder}: {reason(error)}") from error
        # transformers draws at random what the folder lacks.
        if names := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise CheckpointError(
                f"the weights in {folder} are not those of its config.json: {len(names)} tensors are missing or of "
                f"another shape, such as {names[0]}; download the checkpoint again"
            )
        if place is None:
            _move(model, device_of(device))
        yield model.eval()


def loading_problems(folder: Path) -> dict[str, list[str]]:
    """Lists what stock `from_pretrained` finds missing, unexpected or mismatched in a folder.

    It is given the stored names and shapes without their data, so that a check of any size costs no memory.
    """
    stored = stored_tensors(folder)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            _, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict={
                    name: torch.empty(stored[name].header.shape, dtype=stored[name].header.dtype, device="meta")
                    for name in stored.keys() - _stored_twice(stored, model_class, config)
                },
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # of a damaged config, transformers raises many types
        raise CheckpointError(f"transformers cannot load {folder}: {reason(error)}") from error
    return {kind: sorted(map(str, names)) for kind, names in report.items() if names}


def _stored_twice(names: Collection[str], model_class: Any, config: Any) -> set[str]:
    """Returns what is tied to another tensor that is stored, too: loaders may compare the values of the two.

    Stored names may lack the prefix of the base model.
    """
    with torch.device("meta"):
        tied = model_class(config).all_tied_weights_keys
    prefix = f"{model_class.base_model_prefix}."
    bare = {name.removeprefix(prefix): name for name in names}
    pairs = ((target.removeprefix(prefix), source.removeprefix(prefix)) for target, source in tied.items())
    return {bare[target] for target, source in pairs if target in bare and source in bare}


def _move(model: Any, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"the model cannot be moved to the device {device!r} ({' '.join(str(error).split())}); choose another "
            "--device, or --device-map auto or disk for a model larger than its memory"
        ) from error


def device_of(name: str | None) -> str:
    """Returns the device to compute on: that which is named, where there is one, else cuda or the cpu.

    Raises CheckpointError for a device that this machine lacks, and for one that computes nothing.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"--device is {name!r}, which names no device; give cpu, cuda or cuda:1") from None
    backend: Any = torch if device.type == "cpu" else getattr(torch, device.type, None)
    there = device.type == "cpu" or (hasattr(backend, "is_available") and backend.is_available())
    count = backend.device_count() if there and hasattr(backend, "device_count") else 1
    if not there or (device.index or 0) >= count:
        raise CheckpointError(f"--device is {name}, but this machine has none; leave it out, or give cpu")
    return name


def computing_dtype(dense: Checkpoint, where: Compute) -> torch.dtype:
    """Returns the dtype that a model is scored and refitted in; auto is that of most parameters.

    A processor without units for 16-bit floats emulates them, seven times slower than float32 (docs/decisions/0022).
    There, auto is float32, which holds their every value, unless the weights would fill more than half of the memory.
    """
    kind, streamed = dense.computed_in(where.dtype), where.device_map == "disk"
    on_cpu = streamed or torch.device(device_of(where.device)).type == "cpu"
    if where.dtype != "auto" or not on_cpu or not is_emulated(kind):
        return kind
    fits = streamed or 2 * dense.shape.parameters * torch.float32.itemsize <= psutil.virtual_memory().total
    return torch.float32 if fits else kind


def is_emulated(kind: torch.dtype) -> bool:
    """Tells whether this processor has no units that multiply matrices of a dtype."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(kind)
    known = name is not None and torch._C._has_mkldnn
    return known and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns how many token ids the model embeds."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where the model takes its input: for an offloaded model, where its embedding computes."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    found = torch.device(device) if device is not None else next(embedding.parameters()).device
    # A streamed model, whose weights are on no device between their turns, computes on the CPU.
    return torch.device("cpu") if found.type == "meta" else found


def has_tokenizer(folder: Path) -> bool:
    """Tells whether a folder holds any tokenizer file."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the folder's tokenizer; of code that the folder carries, at most the tokenizer's own runs."""
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}), and text needs one: copy the "
            "tokenizer files of the model into its folder"
        )
    check_ends(folder)
    for name in filter(lambda name: (folder / name).is_file(), _TOKENIZER_FILES):
        check_no_pointer(folder / name)
    try:
        with quiet_transformers():
            # Asked to trust, it would read the configuration by the model's own code, unless it is given one.
            known = (folder / "config.json").is_file() and trust_remote_code
            stock = {"config": AutoConfig.from_pretrained(folder, trust_remote_code=False)} if known else {}
            found: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True, **stock
            )
            found("A")
    except Exception as error:  # tokenizers raise many types
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return found


def weight_count(weight: torch.Tensor) -> int:
    """Returns how many weights a parameter stands for, however many of them are packed into a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def weight_bytes(weight: torch.Tensor) -> int:
    """Returns the bytes of a parameter or buffer, those of its scales included."""
    return sum(part.nbytes for part in _parts(weight))


def is_quantized(weight: torch.Tensor) -> bool:
    """Tells whether a library keeps a weight in another form than it shows."""
    return any(part is not weight for part in _parts(weight))


def _parts(weight: Any) -> Iterator[torch.Tensor]:
    """Yields the plain tensors that hold a weight: its own data, and what torchao and bitsandbytes keep beside it."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
        return
    yield weight
    state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    beside = [*(state.as_dict().values() if state is not None else ()), scales]
    yield from (part for part in beside if isinstance(part, torch.Tensor))
