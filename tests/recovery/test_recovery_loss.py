"""The loss of recovery, held to computations of its own: response tokens, batches, packing, a teacher."""

from collections.abc import Callable
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GQA, MHA, Tiny, make_model
from tiny_recovery import (
    TOKENIZER,
    load,
    losses,
    mean_loss,
    plain_loss,
    save_chats,
    save_tiny,
    train,
    training_data,
    weights,
)
from torch.nn.functional import cross_entropy, linear, log_softmax, softmax

from amprune import RecoveryError
from amprune.recovery import distillation
from amprune.recovery.distillation import Teaching, summed_loss, teacher_hidden
from amprune.text.training import TrainingData


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chats(tmp_path_factory.mktemp("data"))


def tokenised(chats: Path, **options: Any) -> TrainingData:
    return training_data(chats, TOKENIZER, max_length=128, **{"validation_share": 0.0, **options})


# The data's loss.


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_loss_of_a_step_is_the_mean_over_the_response_tokens_of_all_its_batches(
    batch_size: int, model: Path, chats: Path, tmp_path: Path
) -> None:
    expected = mean_loss(load(model), tokenised(chats).training)
    apart = [total / count for total, count in (plain_loss(load(model), s) for s in tokenised(chats).training)]
    assert abs(sum(apart) / len(apart) - expected) > 1e-3  # lengths differ, so that the two means do
    log = train(
        model, chats, tmp_path / "out", batch_size=batch_size, gradient_accumulation=6 // batch_size, max_steps=1
    ).log
    assert losses(log)[0][1] == pytest.approx(expected, abs=1e-5)


def test_a_last_step_of_fewer_batches_is_the_mean_over_its_own(model: Path, chats: Path, tmp_path: Path) -> None:
    samples = tokenised(chats, samples=3).training
    result = train(model, chats, tmp_path / "out", samples=3, learning_rate=1e-30, max_steps=2)
    found = [loss for _, loss in losses(result.log)]
    dense = load(model)
    possible = [
        [mean_loss(dense, pair), mean_loss(dense, [sample for sample in samples if sample not in pair])]
        for pair in combinations(samples, 2)
    ]
    assert any(found == pytest.approx(pair, abs=1e-5) for pair in possible)


def test_padding_changes_neither_losses_nor_gradients_nor_weights(model: Path, chats: Path, tmp_path: Path) -> None:
    one = train(model, chats, tmp_path / "one", batch_size=1, gradient_accumulation=6)
    three = train(model, chats, tmp_path / "three", batch_size=3, gradient_accumulation=2)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert dict(losses(one.log, name)) == pytest.approx(dict(losses(three.log, name)), abs=1e-5)
    assert losses(one.log)[-1][1] < losses(one.log)[0][1]
    ours, theirs = weights(one.folder), weights(three.folder)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_a_tokenizer_that_pads_on_the_left_is_made_to_pad_on_the_right(chats: Path, tmp_path: Path) -> None:
    """GPT-2 counts positions from the first token of a row, padding or not."""
    tiny = Tiny("gpt2", "no dropout", {
        "n_head": 6, "n_embd": 48, "n_layer": 2, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    })  # fmt: skip
    make_model(tiny).save_pretrained(tmp_path / "model")
    left = TOKENIZER.__class__.from_pretrained(save_tiny(tmp_path / "any"), padding_side="left")
    left.save_pretrained(tmp_path / "model")
    log = train(tmp_path / "model", chats, tmp_path / "out", batch_size=6, gradient_accumulation=1, max_steps=1).log
    expected = mean_loss(load(tmp_path / "model"), tokenised(chats).training)
    assert losses(log)[0][1] == pytest.approx(expected, abs=1e-5)


def test_packed_sequences_are_one_text_each(model: Path, chats: Path, tmp_path: Path) -> None:
    packed = tokenised(chats, packing=True).training
    assert 1 < len(packed) < 6
    expected = mean_loss(load(model), packed)
    log = train(model, chats, tmp_path / "out", packing=True, gradient_accumulation=len(packed), max_steps=1).log
    assert losses(log)[0][1] == pytest.approx(expected, abs=1e-5)


def test_the_validation_loss_is_the_mean_over_samples_before_during_and_after(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    data = tokenised(chats, validation_share=0.5)
    result = train(model, chats, tmp_path / "out", validation_share=0.5, validation_steps=2, max_steps=5)

    def expected(folder: Path) -> float:
        found = [plain_loss(load(folder), sample) for sample in data.validation]
        return sum(total / count for total, count in found) / len(found)

    found = losses(result.log, "validation_loss")
    assert [step for step, _ in found] == [0, 2, 4, 5]
    assert found[0][1] == pytest.approx(expected(model), abs=1e-5)
    assert found[-1][1] == pytest.approx(expected(result.folder), abs=1e-4)
    assert (result.record["validation_before"], result.record["validation_after"]) == (found[0][1], found[-1][1])


# The teacher's part.


def plain_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) * T^2 over the whole vocabulary at once, from its definition."""
    wanted = softmax(teacher.float() / temperature, dim=-1)
    ours = log_softmax(student.float() / temperature, dim=-1)
    return (wanted * (wanted.log() - ours)).sum() * temperature**2


HEADS = {
    "llama": Tiny("llama", "plain", {**GQA, "head_dim": 16}),
    "gemma2, capped": Tiny(
        "gemma2", "capped", {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 0.5}
    ),
    "cohere, scaled": Tiny("cohere", "scaled", {**GQA, "head_dim": 16, "logit_scale": 7.0}),
    "granite, divided": Tiny("granite", "divided", {**GQA, "head_dim": 16, "logits_scaling": 0.2}),
    "phi, biased head": Tiny("phi", "biased", {"num_attention_heads": 6}),
    "gpt2, tied": Tiny("gpt2", "tied", {"n_head": 6, "n_embd": 48, "n_layer": 2, "n_positions": 300}),
    "opt": Tiny("opt", "mha", {"num_attention_heads": 6, "ffn_dim": 80, "word_embed_proj_dim": 48,
                               "max_position_embeddings": 300}),
}  # fmt: skip


CHUNK = 64


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 160 * CHUNK)


def divergence(logits: torch.Tensor, hidden: torch.Tensor, teacher: Any, temperature: float) -> torch.Tensor:
    """The loss of a copy, since the gradient takes the place of the logits."""
    nothing = torch.zeros(len(logits), dtype=torch.long)
    return summed_loss(logits * 1, nothing, Teaching(teacher, hidden, 1.0, temperature))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_the_divergence_and_its_gradient_are_those_of_the_formula(head: str, dtype: torch.dtype) -> None:
    teacher = make_model(HEADS[head], dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(160, (1, 2 * CHUNK + 1), generator=generator)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = teacher(input_ids=ids, attention_mask=mask).logits[0]
    hidden = teacher_hidden(teacher, ids, mask)[0]
    before = dict(vars(teacher.get_decoder()))
    for tokens in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1):
        for temperature in (1.0, 2.5):
            student = (2 * torch.randn(tokens, 160, generator=generator)).to(dtype)
            ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
            found = divergence(ours, hidden[:tokens], teacher, temperature)
            expected = plain_divergence(theirs, wanted[:tokens], temperature)
            found.backward()
            expected.backward()
            assert found.dtype == torch.float32
            exact = dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 1e-3, atol=1e-5)
            assert ours.grad is not None
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-4 if exact else 0.02, atol=1e-6 if exact else 1e-3
            )
    assert dict(vars(teacher.get_decoder())) == before


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_the_loss_of_data_and_teacher_and_its_gradient_count_the_tokens_that_count(weight: float | None) -> None:
    teacher, generator = make_model(HEADS["llama"]).requires_grad_(False), torch.Generator().manual_seed(2)
    hidden = torch.randn(150, 48, generator=generator)
    student, targets = torch.randn(150, 160, generator=generator), torch.randint(160, (150,), generator=generator)
    counted = torch.rand(150, generator=generator) < 0.7
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    teaching = None if weight is None else Teaching(teacher, hidden, weight, 2.0)
    found = 3.0 * summed_loss(ours * 1, targets, teaching, counted)
    apart = plain_divergence(theirs[counted], teacher.lm_head(hidden)[counted], 2.0)
    data = cross_entropy(theirs[counted], targets[counted], reduction="sum")
    expected = 3.0 * (data if weight is None else (1 - weight) * data + weight * apart)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_logits_that_are_read_again_after_the_loss_are_refused_not_wrong() -> None:
    logits = torch.randn(4, 160, requires_grad=True).tanh()  # whose derivative needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed_loss(logits, torch.zeros(4, dtype=torch.long)).backward()


def test_a_student_that_is_its_teacher_diverges_by_nothing() -> None:
    teacher = make_model(HEADS["llama"])
    ids = torch.randint(160, (1, 100), generator=torch.Generator().manual_seed(1))
    logits = teacher(ids).logits[0].detach().requires_grad_()
    found = divergence(logits, teacher_hidden(teacher, ids, torch.ones_like(ids))[0], teacher, 1.0)
    found.backward()
    assert abs(float(found.detach())) < 1e-4
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_with_a_teacher_is_the_weighted_sum(weight: float, model: Path, chats: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", seed=1)
    student, wise, samples = load(model), load(teacher), tokenised(chats).training
    apart, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        places = [place - 1 for place, label in enumerate(sample["labels"]) if label != -100]
        with torch.no_grad():
            apart += float(plain_divergence(student(ids).logits[0, places], wise(ids).logits[0, places], 2.0))
        count += len(places)
    log = train(
        model, chats, tmp_path / "out", teacher=teacher, teacher_weight=weight, temperature=2.0, batch_size=2,
        gradient_accumulation=3, max_steps=1, validation_share=0.0,
    ).log  # fmt: skip
    expected = (1 - weight) * mean_loss(student, samples) + weight * apart / count
    assert losses(log)[0][1] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_alone_teaches_itself_learns_nothing_and_validates_by_the_divergence(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    result = train(
        model, chats, tmp_path / "out", teacher=model, teacher_weight=1.0, gradient_accumulation=5, max_steps=1,
        validation_share=0.1,
    )  # fmt: skip
    assert abs(losses(result.log)[0][1]) < 1e-6
    assert losses(result.log, "grad_norm")[0][1] < 1e-5
    assert result.record["validation"] == "divergence"
    assert abs(result.record["validation_before"]) < 1e-6


def test_a_model_that_is_taught_in_part_validates_on_the_data(model: Path, chats: Path, tmp_path: Path) -> None:
    result = train(model, chats, tmp_path / "out", teacher=model, teacher_weight=0.5, max_steps=1, validation_share=0.1)
    held = tokenised(chats, validation_share=0.1).validation
    assert result.record["validation"] == "loss"
    assert result.record["validation_before"] == pytest.approx(mean_loss(load(model), held), abs=1e-5)


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_written(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    teacher = save_tiny(tmp_path / "teacher", Tiny("llama", "narrow", {**MHA, "vocab_size": 150}))
    with pytest.raises(RecoveryError, match="teacher has a vocabulary of 150 tokens, the student one of 160; give the"):
        train(model, chats, tmp_path / "out", teacher=teacher)
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


@pytest.mark.parametrize("rows", [165, 200])
def test_a_teacher_whose_vocabulary_is_padded_otherwise_teaches_what_both_have(
    rows: int, chats: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", Tiny("llama", "padded", {**MHA, "vocab_size": 176}))
    teacher = save_tiny(tmp_path / "teacher", Tiny("llama", "wide", {**MHA, "vocab_size": rows}), seed=1)
    student, wise, samples, known = load(model), load(teacher), tokenised(chats).training, min(rows, 176)
    apart, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        places = [place - 1 for place, label in enumerate(sample["labels"]) if label != -100]
        with torch.no_grad():
            logits = (one(ids).logits[0, places, :known] for one in (student, wise))
            apart += float(plain_divergence(*logits, 1.0))
        count += len(places)
    result = train(
        model, chats, tmp_path / "out", teacher=teacher, teacher_weight=1.0, batch_size=2,
        gradient_accumulation=3, max_steps=1, validation_share=0.0, full=True, learning_rate=1e-3,
    )  # fmt: skip
    assert losses(result.log)[0][1] == pytest.approx(apart / count, abs=1e-5)
    before, after = load(model).lm_head.weight, load(result.folder).lm_head.weight
    assert not torch.equal(before[:known], after[:known])


def peak(work: Callable[[], object]) -> int:
    """Returns by how many bytes the tensors that ``work`` allocates and releases grow at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_a_large_vocabulary_takes_far_less_memory_than_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 512, 50_000
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * vocabulary * CHUNK)
    tiny = Tiny("llama", "wide", {**MHA, "vocab_size": vocabulary, "num_hidden_layers": 1})
    teacher = make_model(tiny, dtype=torch.bfloat16).requires_grad_(False)
    hidden, targets = torch.randn(tokens, 48, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.long)
    head = torch.zeros(vocabulary, 48, dtype=torch.bfloat16, requires_grad=True)
    results = []

    def ours() -> None:
        found = summed_loss(linear(hidden, head), targets, Teaching(teacher, hidden))
        found.backward()
        results.append(float(found.detach()))

    def plain() -> None:
        found = plain_divergence(linear(hidden, head), teacher.lm_head(hidden), 1.0)
        found.backward()
        results.append(float(found.detach()))

    size = tokens * vocabulary * 2
    assert peak(ours) < 2.5 * size < 6 * size < peak(plain)
    assert results[0] == pytest.approx(results[-1], rel=1e-3)
