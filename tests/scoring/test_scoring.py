"""Scores: the equations held to a few-line reference, whatever the batch, the dtype or the way of loading."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_calibration import CALIBRATION, architecture_of, random_samples
from tiny_models import VOCABULARY, Tiny, find, make_model, save_model
from tiny_tokenizer import make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from amprune import CalibrationSet, CheckpointError, ImportanceScores, ScoresError, score
from amprune.model.architecture import Architecture
from amprune.model.loading import computing_dtype
from amprune.model.reader import read_checkpoint
from amprune.model.shape import ModelShape
from amprune.scoring.activations import measure_activations
from amprune.scoring.formulas import amp, contribution_norms, input_moments
from amprune.scoring.scores import LayerScores
from amprune.settings import Compute

KINDS = ("heads", "groups", "neurons")


def score_model(model: PreTrainedModel, tiny: Tiny, calibration: CalibrationSet, **options: Any) -> list[LayerScores]:
    return score_layers(model, architecture_of(tiny), calibration, **options)


def score_layers(model: PreTrainedModel, architecture: Architecture, *args: Any, **options: Any) -> list[LayerScores]:
    return [amp(layer, architecture.shape) for layer in measure_activations(model, architecture, *args, **options)]


def reference(model: PreTrainedModel, tiny: Tiny, samples: Sequence[Sequence[int]]) -> list[LayerScores]:
    """Equations 8 and 9 written out over whole tensors in float64, one sample at a time."""
    family, shape = architecture_of(tiny).family, architecture_of(tiny).shape
    heads, groups, layers = shape.num_attention_heads, shape.num_key_value_heads, []
    for layer in range(shape.num_layers):
        prefix = family.layer_prefix.format(layer=layer)
        out, down = (model.get_submodule(prefix + name) for name in (family.attention_output, family.mlp_output))
        weight = out.weight.detach().double()
        weight = weight if tiny.model_type == "gpt2" else weight.T
        blocks = weight.reshape(heads, shape.head_dim, shape.hidden_size)
        sums = [torch.zeros(count, dtype=torch.float64) for count in (heads, groups, shape.intermediate_size)]
        for sample in samples:
            attention, mlp = inputs_of(model, (out, down), sample)
            h = attention.double().reshape(len(sample), heads, shape.head_dim)
            added = torch.einsum("snd,ndh->snh", h, blocks)
            joint = added.reshape(len(sample), groups, heads // groups, shape.hidden_size).sum(dim=2)
            sums[0] += added.abs().sum(dim=(0, 2)) / len(sample)
            sums[1] += joint.abs().sum(dim=(0, 2)) / len(sample)
            sums[2] += mlp.double().reshape(len(sample), -1).abs().mean(dim=0)
        layers.append(LayerScores(*((total / len(samples)).numpy() for total in sums)))
    return layers


def inputs_of(model: PreTrainedModel, modules: Sequence[Any], sample: Sequence[int]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, index=index: found.__setitem__(index, inputs[0]))
        for index, module in enumerate(modules)
    ]
    with torch.inference_mode():
        model(torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[index] for index in range(len(modules))]


def assert_close(found: Sequence[LayerScores], expected: Sequence[LayerScores], tolerance: float) -> None:
    assert len(found) == len(expected)
    for layer, other in zip(found, expected, strict=True):
        for kind in KINDS:
            np.testing.assert_allclose(getattr(layer, kind), getattr(other, kind), rtol=tolerance, atol=0)


def same(one: Sequence[LayerScores], other: Sequence[LayerScores]) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for a, b in zip(one, other, strict=True) for k in KINDS)


# The equations

FAMILIES = [
    "llama-mha", "llama-gqa", "llama-mqa", "llama-biases", "phi3-gqa", "phi-gqa", "starcoder2-gqa", "gpt2-mha",
    "falcon-mqa", "falcon-gqa", "falcon-biases", "gemma2-gqa", "cohere-qk-norm", "opt-mha", "gpt_neox-mha", "gptj-mha",
    "glm4-gqa", "olmo2-gqa",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_equations(name: str, dtype: torch.dtype) -> None:
    tiny = find(name)
    model = make_model(tiny, dtype=dtype)
    found = score_model(model, tiny, CALIBRATION, batch_tokens=1)
    assert_close(found, reference(model, tiny, CALIBRATION.samples), 1e-5)


def test_heads_of_their_own_key_value_head_score_as_their_group() -> None:
    tiny = find("llama-mha")
    for layer in score_model(make_model(tiny), tiny, CALIBRATION):
        np.testing.assert_array_equal(layer.heads, layer.groups)


def test_criteria_by_hand() -> None:
    """Two heads of size 1 in one group, which cancel each other in the first of two tokens."""
    outputs, weight = torch.tensor([[1.0, -1.0], [2.0, 1.0]]), torch.tensor([[1.0, -3.0], [1.0, -3.0]])
    scores = contribution_norms(outputs, weight, num_heads=2, num_groups=1)
    assert scores[0].tolist() == [(4 + 8) / 2, (4 + 4) / 2, (0 + 12) / 2]
    assert scores[1].tolist() == pytest.approx([((10 + 40) / 2) ** 0.5, ((10 + 10) / 2) ** 0.5, (90 / 2) ** 0.5])
    mean, absolute, square, root = input_moments(torch.tensor([[1.0, -2.0], [-3.0, 0.5]])).tolist()
    assert (mean, absolute, square) == ([-1.0, -0.75], [2.0, 1.25], [5.0, 2.125])
    assert root == pytest.approx([5**0.5, 2.125**0.5])


def test_float16_does_not_overflow_in_the_sums() -> None:
    outputs, weight = torch.full((64, 8), 60_000.0).half(), torch.full((8, 16), 2.0).half()
    scores = contribution_norms(outputs, weight, num_heads=2, num_groups=1)
    assert scores[0].tolist() == pytest.approx([60_000.0 * 2 * 4 * 16] * 2 + [60_000.0 * 2 * 8 * 16])
    assert input_moments(outputs)[1].tolist() == pytest.approx([60_000.0] * 8)


class _LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_no_tensor_of_all_heads_contributions_is_held(groups: int) -> None:
    tokens, heads, hidden, head_dim = 512, 16, 256, 16
    outputs, weight = torch.randn(tokens, heads * head_dim), torch.randn(heads * head_dim, hidden)
    with _LargestTensor() as recorder:
        contribution_norms(outputs, weight, num_heads=heads, num_groups=groups)
    assert 0 < recorder.elements <= tokens * hidden < tokens * heads * hidden / 8


# Batches

SLIDING = Tiny("gemma3_text", "sliding", {**find("gemma3_text-gqa").entries, "sliding_window": 8,
                                          "layer_types": ["sliding_attention", "full_attention"]})  # fmt: skip
BATCHED = [find(name) for name in ("llama-gqa", "opt-mha", "gpt2-mha", "gptj-mha", "falcon-mqa", "falcon-biases",
                                   "phi-gqa", "cohere2-gqa", "glm4-gqa")] + [SLIDING]  # fmt: skip
UNEVEN = random_samples(1, 100, 3, 37, 2, 64, 5, 5)


@pytest.mark.parametrize("tiny", BATCHED, ids=lambda tiny: tiny.id)
def test_padding_and_batch_size_change_no_score(tiny: Tiny) -> None:
    model = make_model(tiny)
    alone = score_model(model, tiny, UNEVEN, batch_tokens=1)
    for batch_tokens in (4096, 150):
        assert_close(score_model(model, tiny, UNEVEN, batch_tokens=batch_tokens), alone, 1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_order_of_samples_does_not_matter(batch_tokens: int) -> None:
    tiny = find("llama-gqa")
    model, turned = make_model(tiny), replace(UNEVEN, samples=UNEVEN.samples[::-1])
    found = [score_model(model, tiny, samples, batch_tokens=batch_tokens) for samples in (UNEVEN, turned)]
    assert_close(found[0], found[1], 1e-6)


def test_each_sample_is_averaged_over_its_own_tokens_first() -> None:
    tiny = find("llama-gqa")
    model, short, long = make_model(tiny), random_samples(2), random_samples(40, seed=1)
    both = score_model(model, tiny, CalibrationSet("both", short.samples + long.samples))
    one, other = score_model(model, tiny, short), score_model(model, tiny, long)
    mean = [
        LayerScores(*((getattr(a, kind) + getattr(b, kind)) / 2 for kind in KINDS))
        for a, b in zip(one, other, strict=True)
    ]
    assert_close(both, mean, 1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_every_sample_is_counted_once_and_batches_obey_their_bound(batch_tokens: int) -> None:
    tiny, sizes, advanced = find("llama-gqa"), [], []
    model = make_model(tiny)
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))

    class Told:
        def __enter__(self) -> Callable[[int], None]:
            return advanced.append

        def __exit__(self, *_: object) -> None: ...

    score_model(model, tiny, UNEVEN, batch_tokens=batch_tokens, progress=lambda *_: Told())
    assert sum(advanced) == sum(rows for rows, _ in sizes) == len(UNEVEN.samples)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in sizes)


# Files and ways of loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama-gqa", "gpt2-mha", "falcon-mqa", "gemma2-gqa", "llama-tied"):
        save_model(find(name), root / name)
        save_model(find(name), root / f"{name}-bfloat16", dtype=torch.bfloat16)
    make_tokenizer().save_pretrained(root / "llama-gqa")
    return root


@pytest.mark.parametrize("stored", ["", "-bfloat16"], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "falcon-mqa", "gemma2-gqa", "llama-tied"])
def test_a_model_streamed_from_disk_scores_as_a_loaded_one(name: str, stored: str, folders: Path) -> None:
    options: dict[str, Any] = {"calibration": CALIBRATION, "dtype": "float32", "preset": "paper"}
    loaded = score(folders / f"{name}{stored}", device="cpu", **options)
    streamed = score(folders / f"{name}{stored}", device_map="disk", **options)
    assert_close(streamed.layers, loaded.layers, 1e-6)
    assert streamed.settings == loaded.settings
    assert streamed.fingerprint == loaded.fingerprint


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "llama-tied"])
def test_an_offloaded_model_scores_as_one_in_place(name: str) -> None:
    tiny = find(name)
    model = make_model(tiny)
    expected = score_model(model, tiny, CALIBRATION)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert_close(score_model(model, tiny, CALIBRATION), expected, 1e-6)


@pytest.mark.parametrize("units", [True, False], ids=["native", "emulated"])
def test_the_computation_follows_the_dtype_of_the_checkpoint_unless_told(
    units: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor emulates it, float32 is computed in instead, which holds the same weights."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: units)
    folder = folders / "llama-gqa-bfloat16"
    auto = score(folder, calibration=CALIBRATION, preset="paper", device="cpu")
    narrow = score(folder, calibration=CALIBRATION, preset="paper", device="cpu", dtype="bfloat16")
    wide = score(folder, calibration=CALIBRATION, preset="paper", device="cpu", dtype="float32")
    assert (auto.settings["dtype"], narrow.settings["dtype"], wide.settings["dtype"]) == (
        "bfloat16" if units else "float32", "bfloat16", "float32",
    )  # fmt: skip
    assert same(auto.layers, narrow.layers if units else wide.layers)
    assert not same(narrow.layers, wide.layers)
    assert_close(narrow.layers, wide.layers, 0.1)


def test_a_model_keeps_its_dtype_where_float32_would_fill_the_memory(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    dense = read_checkpoint(folders / "llama-gqa-bfloat16")
    weights = 4 * dense.shape.parameters
    for total, expected in ((2 * weights, torch.float32), (2 * weights - 1, torch.bfloat16)):
        monkeypatch.setattr("psutil.virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert computing_dtype(dense, Compute(device="cpu")) == expected
        assert computing_dtype(dense, Compute(device_map="disk")) == torch.float32


def test_the_built_in_set_needs_only_a_folder_with_a_tokenizer(folders: Path) -> None:
    scores = score(folders / "llama-gqa", calibration="builtin", samples=8, device="cpu", preset="paper")
    assert scores.calibration["name"] == "builtin"
    assert scores.calibration["samples"] == 8
    assert scores.calibration["max_length"] == 128  # the model's positions
    assert all((getattr(layer, kind) > 0).all() for layer in scores.layers for kind in KINDS)


def test_without_a_tokenizer_text_is_refused(folders: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gpt2-mha has no tokenizer .* copy the tokenizer files"):
        score(folders / "gpt2-mha", calibration="builtin", samples=8)


def test_scoring_changes_neither_files_nor_model(folders: Path) -> None:
    def digests() -> dict[Path, str]:
        files = (file for file in sorted(folders.rglob("*")) if file.is_file())
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = digests()
    score(folders / "llama-gqa", calibration=CALIBRATION, preset="paper")
    score(folders / "llama-gqa", calibration=CALIBRATION, preset="paper", device_map="disk")
    assert digests() == before
    tiny = find("llama-gqa")
    model = make_model(tiny)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, training = model.config.to_dict(), model.training
    score_model(model, tiny, CALIBRATION)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.config.to_dict(), model.training) == (config, training)


def hooks_of(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_no_hooks_are_left_behind() -> None:
    tiny = find("llama-gqa")
    model = make_model(tiny)
    before = hooks_of(model)  # transformers may have some of its own
    score_model(model, tiny, CALIBRATION)
    assert hooks_of(model) == before
    model.model.layers[1].mlp.forward = None  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        score_model(model, tiny, CALIBRATION)
    assert hooks_of(model) == before
    other = find("gpt2-mha")
    with pytest.raises(AttributeError):
        score_layers(model, architecture_of(other), CALIBRATION)
    assert hooks_of(model) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "falcon-mqa", "gemma2-gqa"])
def test_cuda_scores_as_the_cpu(name: str, folders: Path) -> None:
    here = score(folders / name, calibration=UNEVEN, preset="paper", device="cpu")
    there = score(folders / name, calibration=UNEVEN, preset="paper", device="cuda")
    assert there.settings["device"] == "cuda"
    assert_close(there.layers, here.layers, 1e-4)


# The score file


@pytest.fixture(scope="module")
def scores(folders: Path) -> ImportanceScores:
    return score(folders / "llama-gqa", calibration=CALIBRATION, preset="paper", device="cpu")


@pytest.fixture
def file(scores: ImportanceScores, tmp_path: Path) -> Path:
    scores.save(tmp_path / "new" / "scores.safetensors")
    return tmp_path / "new" / "scores.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert list(metadata) == ["amprune"]
    header: dict[str, Any] = json.loads(metadata["amprune"])
    return header


def test_scores_survive_their_file(scores: ImportanceScores, file: Path) -> None:
    loaded = ImportanceScores.load(file)
    assert same(loaded.layers, scores.layers)
    assert replace(loaded, layers=()) == replace(scores, layers=())
    assert ImportanceScores.load(str(file)).shape == scores.shape


def test_the_same_scores_give_the_same_bytes(scores: ImportanceScores, file: Path, folders: Path) -> None:
    scores.save(file.parent / "again")
    score(folders / "llama-gqa", calibration=CALIBRATION, preset="paper", device="cpu").save(file.parent / "twice")
    ImportanceScores.load(file).save(file.parent / "loaded")
    contents = {(file.parent / name).read_bytes() for name in (file.name, "again", "twice", "loaded")}
    assert len(contents) == 1


def test_the_file_holds_what_is_documented(scores: ImportanceScores, file: Path) -> None:
    sizes = {"heads": (12,), "groups": (4,), "neurons": (80,)}
    expected = {
        f"layers.{layer}.{kind}": (size, np.dtype("float32")) for layer in (0, 1) for kind, size in sizes.items()
    }
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()} == expected
    header = header_of(file)
    assert set(header) == {"format", "shape", "fingerprint", "criterion", "calibration", "settings"}
    assert (header["format"], header["criterion"], header["fingerprint"]) == (1, "amp", scores.fingerprint)
    assert header["shape"] == scores.shape.to_dict()
    assert header["calibration"] == {
        "name": "random", "samples": 4, "tokens": 72, "seed": None, "max_length": None, "prompts_only": False,
        "sha256": CALIBRATION.sha256,
    }  # fmt: skip
    assert set(header["settings"]) == {"dtype", "device", "amprune", "torch", "transformers"}
    assert (header["settings"]["dtype"], header["settings"]["device"]) == ("float32", "cpu")


def test_scores_of_another_precision_are_stored_as_float32(scores: ImportanceScores, tmp_path: Path) -> None:
    wide = tuple(LayerScores(*(getattr(layer, k).astype(np.float64) for k in KINDS)) for layer in scores.layers)
    replace(scores, layers=wide).save(tmp_path / "scores.safetensors")
    assert same(ImportanceScores.load(tmp_path / "scores.safetensors").layers, scores.layers)


def test_scores_that_cannot_be_written_are_a_scores_error(scores: ImportanceScores, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoresError, match=r"cannot write .*s\.safetensors"):
        scores.save(tmp_path / "file" / "s.safetensors")


Parts = tuple[dict[str, np.ndarray], dict[str, Any]]


def _tensor(name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        if change is None:
            del parts[0][name]
        else:
            parts[0][name] = change(parts[0][name])

    return edit


def _entry(name: str, value: object, *, of: str | None = None) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        (parts[1][of] if of else parts[1])[name] = value

    return edit


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tensor: np.where(np.arange(len(tensor)) == 1, np.float32(value), tensor)


DAMAGED: dict[str, tuple[Callable[[Parts], None], str]] = {
    "missing": (_tensor("layers.1.groups", None), r"layers\.1\.groups is missing, expected float32 of shape \(4,\)"),
    "short": (_tensor("layers.0.heads", lambda t: t[:-1]), r"layers\.0\.heads is float32 of shape \(11,\), expected"),
    "two axes": (_tensor("layers.0.neurons", lambda t: t.reshape(8, 10)), r"layers\.0\.neurons is .*\(8, 10\)"),
    "float64": (_tensor("layers.1.neurons", lambda t: t.astype(np.float64)), r"layers\.1\.neurons is float64"),
    "integers": (_tensor("layers.1.heads", lambda t: t.astype(np.int32)), r"layers\.1\.heads is int32"),
    "nan": (_tensor("layers.1.neurons", _with(np.nan)), r"layers\.1\.neurons holds values that are not finite"),
    "infinity": (_tensor("layers.0.heads", _with(np.inf)), r"layers\.0\.heads holds values that are not finite"),
    "format": (_entry("format", 2), r"is no score file of amprune \(format 1\)"),
    "shape null": (_entry("shape", None), "metadata: shape is null, expected an object; score again"),
    "another width": (
        _entry("intermediate_size", 79, of="shape"),
        r"layers\.0\.neurons is .*\(80,\), expected .*\(79,\)",
    ),
    "more layers": (
        _entry("num_layers", 3, of="shape"),
        "parameters is 87792, but heads and neurons, or blocks, alone have",
    ),
    "float16": (_tensor("layers.0.heads", lambda t: t.astype(np.float16)), r"layers\.0\.heads is float16"),
    "no layers": (
        _entry("num_layers", 0, of="shape"),
        "metadata: shape: num_layers is 0, expected a whole number of",
    ),
    "shape with text": (
        _entry("hidden_size", "48", of="shape"),
        'hidden_size is "48", expected a whole number of at',
    ),
    "fingerprint": (_entry("fingerprint", None), "metadata: fingerprint is null, expected text"),
    "criterion": (_entry("criterion", 3), "metadata: criterion is 3, expected text"),
    "calibration": (_entry("calibration", [1]), r"metadata: calibration is \[1\], expected an object"),
    "settings": (_entry("settings", "none"), 'metadata: settings is "none", expected an object'),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_score_file_is_refused_by_its_name(
    edit: Callable[[Parts], None], message: str, file: Path, tmp_path: Path
) -> None:
    parts = load_file(file), header_of(file)
    edit(parts)
    damaged = tmp_path / "damaged.safetensors"
    save_file(parts[0], damaged, metadata={"amprune": json.dumps(parts[1])})
    with pytest.raises(ScoresError, match=message) as caught:
        ImportanceScores.load(damaged)
    assert str(damaged) in str(caught.value)


def _text(path: Path) -> None:
    path.write_text("no scores")


def _truncated(path: Path) -> None:
    save_file({"x": np.zeros(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-50])


NO_SCORES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, r"is missing; make it with `amprune score`"),
    "empty": (Path.touch, "cannot read the scores"),
    "text": (_text, "cannot read the scores"),
    "truncated": (_truncated, "cannot read the scores"),
    "folder": (Path.mkdir, r"cannot be read: it is a folder, .* make it with `amprune score`"),
    "no metadata": (lambda path: save_file({"x": np.zeros(2)}, path), "is no score file of amprune"),
    "other metadata": (lambda path: save_file({"x": np.zeros(2)}, path, {"format": "pt"}), "is no score file"),
    "metadata no JSON": (lambda path: save_file({"x": np.zeros(2)}, path, {"amprune": "{"}), "is no score file"),
    "metadata a list": (lambda path: save_file({"x": np.zeros(2)}, path, {"amprune": "[1]"}), "is no score file"),
}


@pytest.mark.parametrize(("make", "message"), NO_SCORES.values(), ids=NO_SCORES)
def test_what_is_no_score_file_is_refused_by_its_name(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    make(path)
    with pytest.raises(ScoresError, match=message) as caught:
        ImportanceScores.load(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_is_no_score_file(folders: Path) -> None:
    for name in ("llama-gqa", "llama-gqa-bfloat16"):
        with pytest.raises(ScoresError, match="is no score file of amprune"):
            ImportanceScores.load(folders / name / "model.safetensors")


# Bad input


@pytest.mark.parametrize(
    ("value", "dtype", "part"),
    [
        (float("inf"), torch.float32, "mlp.up_proj"),
        (float("nan"), torch.float32, "mlp.up_proj"),
        (60_000.0, torch.float16, "mlp.up_proj"),
        (float("inf"), torch.bfloat16, "self_attn.v_proj"),
        (60_000.0, torch.float16, "self_attn.v_proj"),
        (float("nan"), torch.float32, "self_attn.o_proj"),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_activations_that_are_not_finite_name_the_layer_and_the_part(
    value: float, dtype: torch.dtype, part: str, batch_tokens: int
) -> None:
    tiny = find("llama-gqa")
    model = make_model(tiny, dtype=dtype)
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{part}").weight[3] = value
    name = "MLP" if part.startswith("mlp") else "attention"
    with pytest.raises(ScoresError, match=f"layer 1: the {name} gives activations that are not finite.*--dtype"):
        score_model(model, tiny, CALIBRATION, batch_tokens=batch_tokens)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ((), {}, "'mine' is empty or holds an empty sample"),
        (((1, 2), ()), {}, "'mine' is empty or holds an empty sample"),
        (((1, 2), (3, VOCABULARY)), {}, "holds token id 160, but the model embeds the ids 0 to 159"),
        (((1, 2), (-1, 3)), {}, "holds token id -1, but the model embeds the ids 0 to 159"),
        ((tuple([1] * 129),), {}, "a sample of 129 tokens, but the model has 128 positions"),
        (((1, 2),), {"batch_tokens": 0}, "batch_tokens is 0, expected at least 1"),
        (((1, 2),), {"batch_tokens": -5}, "batch_tokens is -5, expected at least 1"),
    ],
    ids=["no sample", "empty sample", "large id", "negative id", "long sample", "no batch", "negative batch"],
)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "opt-mha"])
def test_bad_calibration_sets_and_options_are_refused(
    name: str, samples: Any, options: dict[str, Any], message: str
) -> None:
    tiny = find(name)
    with pytest.raises(ScoresError, match=re.escape(message)):
        score_model(make_model(tiny), tiny, CalibrationSet("mine", samples), **options)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "opt-mha", "gptj-mha", "gemma2-gqa"])
def test_a_sample_may_fill_all_positions(name: str) -> None:
    tiny = find(name)
    layers = score_model(make_model(tiny), tiny, random_samples(128))
    assert all(np.isfinite(getattr(layer, kind)).all() for layer in layers for kind in KINDS)


def test_shapes_in_files_are_read_as_they_were_written(scores: ImportanceScores) -> None:
    values = json.loads(json.dumps(scores.shape.to_dict()))
    assert ModelShape.from_dict(values, where="here", error=ScoresError) == scores.shape
