"""Zero-shot tasks, held to the harness itself: same questions, same figures, same definitions."""

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_evaluation import DATA_DIR, needs_data, tiny_model
from tiny_tokenizer import make_tokenizer
from transformers import PreTrainedModel

from amprune.errors import EvaluationError
from amprune.evaluation.comparison import average
from amprune.evaluation.data import TASK_FILES
from amprune.evaluation.measurement import Loaded, nan_refused
from amprune.evaluation.records import Record
from amprune.evaluation.zero_shot import headline_metric, measure_zero_shot, open_tasks
from amprune.settings import TASKS, EvaluationSettings

DEFINITIONS = {
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "copa": "super_glue/copa/default.yaml",
    "sciq": "sciq/sciq.yaml",
}
LIMIT = 6


@pytest.fixture(scope="module", autouse=True)
def one_index() -> Iterator[None]:
    """The harness reads thousands of files to learn its tasks: once is enough. Nobody reads its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        patch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)
        everything = lru_cache(TaskManager)
        patch.setattr(lm_eval.tasks, "TaskManager", lambda **given: TaskManager(**given) if given else everything())
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def measured(model: PreTrainedModel, task: str, folder: Path, **options: Any) -> dict[str, Record]:
    (opened,) = open_tasks([task], data_dir=folder)
    asked = EvaluationSettings(**{"batch_size": 4, **options})
    found = measure_zero_shot(Loaded(model, make_tokenizer()), task=opened, asked=asked)
    assert {accuracy.task for accuracy in found} == {task}
    return {accuracy.metric: accuracy for accuracy in found}


def reference(model: PreTrainedModel, task: str, file: Path, split: str, folder: Path, **options: Any) -> Any:
    """Runs the harness as its documentation says, on the registered task with its data replaced."""
    registered = Path(lm_eval.tasks.__file__).parent / DEFINITIONS[task]
    content = {
        "include": str(registered), "task": f"{task}_here", "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}}, f"{split}_split": split,
        **{f"{other}_split": None for other in ("training", "validation", "test") if other != split},
    }  # fmt: skip
    (folder / f"{task}_here.yaml").write_text(yaml.safe_dump(content))
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        language_model: Any = HFLM(
            pretrained=model, tokenizer=make_tokenizer(), batch_size=3, softmax_dtype=torch.float32
        )
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(
            language_model, tasks=[f"{task}_here"], task_manager=manager, bootstrap_iters=1000, **options
        )
    finally:
        logging.getLogger("lm_eval").setLevel(level)


def assert_same(found: dict[str, Record], expected: Any, task: str) -> None:
    figures, samples = expected["results"][f"{task}_here"], expected["samples"][f"{task}_here"]
    assert {f"{metric},none" for metric in found} == {
        name for name in figures if name.endswith(",none") and "_stderr" not in name
    }
    for metric, accuracy in found.items():
        assert accuracy.value == figures[f"{metric},none"]
        assert accuracy.standard_error == figures[f"{metric}_stderr,none"]
        assert list(accuracy.items) == [sample[metric] for sample in samples]
        assert accuracy.n == len(samples)
        assert accuracy.settings["task_version"] == str(expected["versions"][f"{task}_here"])
        assert accuracy.settings["num_fewshot"] == expected["n-shot"][f"{task}_here"]


# The paper's tasks, on the real questions


@pytest.fixture(scope="module")
def accuracies(model: PreTrainedModel) -> dict[str, dict[str, Record]]:
    return {task: measured(model, task, DATA_DIR, limit=LIMIT) for task in TASKS}


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_figures_are_those_of_the_harness(
    task: str, model: PreTrainedModel, accuracies: dict[str, dict[str, Record]], tmp_path: Path
) -> None:
    data = TASK_FILES[task]
    expected = reference(model, task, DATA_DIR / "tasks" / data.file, data.split, tmp_path, limit=LIMIT)
    assert_same(accuracies[task], expected, task)
    assert {accuracy.settings["num_fewshot"] for accuracy in accuracies[task].values()} == {0}


@needs_data
def test_a_random_model_gets_some_right_and_some_wrong(accuracies: dict[str, dict[str, Record]]) -> None:
    items = [item for found in accuracies.values() for accuracy in found.values() for item in accuracy.items]
    assert set(items) == {0.0, 1.0}


@needs_data
def test_items_carry_a_hash_of_the_questions(accuracies: dict[str, dict[str, Record]], model: PreTrainedModel) -> None:
    hashes = {task: {accuracy.items_hash for accuracy in found.values()} for task, found in accuracies.items()}
    assert all(len(found) == 1 and None not in found for found in hashes.values())
    assert len(set.union(*hashes.values())) == len(TASKS)
    other = measured(tiny_model(seed=1), "winogrande", DATA_DIR, limit=LIMIT)
    assert {accuracy.items_hash for accuracy in other.values()} == hashes["winogrande"]
    fewer = measured(model, "winogrande", DATA_DIR, limit=LIMIT - 1)
    assert {accuracy.items_hash for accuracy in fewer.values()} != hashes["winogrande"]


@needs_data
def test_the_headline_is_acc_norm_but_for_winogrande(accuracies: dict[str, dict[str, Record]]) -> None:
    chosen = {task: headline_metric(task, list(found)) for task, found in accuracies.items()}
    assert chosen == {"winogrande": "acc", **dict.fromkeys(TASKS[1:], "acc_norm")}
    assert headline_metric("winogrande", ["acc_norm", "acc"]) == "acc"
    assert headline_metric("copa", ["acc"]) == "acc"
    assert headline_metric("squad", ["f1", "exact"]) == "f1"


@needs_data
def test_the_average_of_the_five_is_unweighted(accuracies: dict[str, dict[str, Record]]) -> None:
    chosen = [found[headline_metric(task, list(found))] for task, found in accuracies.items()]
    mean, error = average([(accuracy.value, accuracy.standard_error) for accuracy in chosen])
    assert mean == pytest.approx(statistics.fmean(accuracy.value for accuracy in chosen))
    assert error == pytest.approx(math.sqrt(sum((accuracy.standard_error or 0) ** 2 for accuracy in chosen)) / 5)


@needs_data
def test_examples_before_a_question_are_the_harnesss(model: PreTrainedModel, tmp_path: Path) -> None:
    data = TASK_FILES["winogrande"]
    file, options = DATA_DIR / "tasks" / data.file, {"limit": 4, "num_fewshot": 2}
    found = measured(model, "winogrande", DATA_DIR, **options)
    assert_same(found, reference(model, "winogrande", file, data.split, tmp_path, **options), "winogrande")
    assert found["acc"].settings["num_fewshot"] == 2
    none = measured(model, "winogrande", DATA_DIR, limit=4)
    assert none["acc"].items_hash != found["acc"].items_hash


def comparable(value: Any) -> Any:
    """Functions are the same where they come from the same lines."""
    code = getattr(value, "__code__", None)
    return (code.co_filename, code.co_firstlineno, code.co_code) if code else value


@needs_data
@pytest.mark.parametrize("task", TASKS)
def test_the_definition_is_the_registered_one_but_for_its_data(task: str) -> None:
    (opened,) = open_tasks([task], data_dir=DATA_DIR)
    (loaded,) = opened.manager.load([task])["tasks"].values()
    registered = yaml_of(task)
    moved = {"dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "include", "tag",
             "metadata"}  # fmt: skip
    assert {"doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "output_type"} <= set(registered)
    for name in set(registered) - moved:
        assert comparable(getattr(loaded.config, name)) == comparable(registered[name]), name
    assert loaded.config.metadata["version"] == registered["metadata"]["version"]
    assert loaded.config.num_fewshot in (None, 0)
    assert loaded.config.description == ""


def yaml_of(task: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.tasks.__file__).parent / DEFINITIONS[task]
    return dict(load_yaml(path, resolve_func=True))


@needs_data
def test_log_probabilities_are_summed_in_float32(tmp_path: Path) -> None:
    model, data = tiny_model(dtype=torch.bfloat16), TASK_FILES["piqa"]
    found = measured(model, "piqa", DATA_DIR, limit=LIMIT)
    file = DATA_DIR / "tasks" / data.file
    assert_same(found, reference(model, "piqa", file, data.split, tmp_path, limit=LIMIT), "piqa")


def test_log_probabilities_of_a_bfloat16_model_have_the_digits_of_float32() -> None:
    from amprune.evaluation.zero_shot import _language_model

    model = tiny_model(dtype=torch.bfloat16)
    language_model = _language_model(Loaded(model, make_tokenizer()), 1, "task")
    context, choice = [1, 20, 30, 40], [50, 60, 70]
    ((found, _),) = language_model._loglikelihood_tokens([(("", ""), context, choice)])
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *choice]])).logits[0, len(context) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-6)


# Any other task whose file lies in the folder

COPA = [
    {"premise": "The dog barked.", "choice1": "The fox ran.", "choice2": "It was red.", "question": "effect"},
    {"premise": "The fox ran.", "choice1": "It was green.", "choice2": "The dog barked.", "question": "cause"},
    {"premise": "It was blue.", "choice1": "The lazy dog slept.", "choice2": "The sky was.", "question": "cause"},
]


def data_folder(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def likelihood(model: PreTrainedModel, context: str, choice: str) -> float:
    tokenizer = make_tokenizer()
    known, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, context + choice))
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[known.shape[1] - 1 :].sum())


def test_another_task_runs_on_a_file_of_its_name(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{**row, "label": number % 2, "idx": number} for number, row in enumerate(COPA)]
    found = measured(model, "copa", data_folder(tmp_path, "copa_validation", rows))
    expected = []
    for row in rows:
        context = f"{row['premise'][:-1]} {'because' if row['question'] == 'cause' else 'therefore'}"
        choices = [f" {row[name][0].lower()}{row[name][1:]}" for name in ("choice1", "choice2")]
        first, second = (likelihood(model, context, choice) for choice in choices)
        expected.append(float((second > first) == (row["label"] == 1)))
    assert list(found) == ["acc"]
    assert list(found["acc"].items) == expected
    assert found["acc"].value == pytest.approx(statistics.fmean(expected))


SCIQ = {"support": "", "question": "Why?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}


def test_the_test_split_goes_before_the_validation_split(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{**SCIQ, "correct_answer": f"because {number}"} for number in range(4)]
    data_folder(tmp_path, "sciq_validation", rows)
    assert measured(model, "sciq", tmp_path)["acc_norm"].n == 4
    data_folder(tmp_path, "sciq_test", rows[:3])
    assert measured(model, "sciq", tmp_path)["acc_norm"].n == 3


def test_a_task_of_free_answers(model: PreTrainedModel, tmp_path: Path) -> None:
    name, rows = "super_glue-copa-t5-prompt", [{**row, "label": 0, "idx": 0} for row in COPA]
    found = measured(model, name, data_folder(tmp_path, f"{name}_validation", rows))
    assert found["exact_match"].value == 0
    assert found["exact_match"].items == (0, 0, 0)


def test_a_task_with_examples_of_its_own_and_two_ways_to_read_an_answer(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"question": f"{number} and 1?", "answer": f"So. #### {number + 1}"} for number in range(8)]
    folder = data_folder(tmp_path, "gsm8k_test", rows)
    found = {count: measured(model, "gsm8k", folder, limit=2, num_fewshot=count) for count in (None, 5, 2)}
    metrics = ["exact_match (strict-match)", "exact_match (flexible-extract)"]
    assert all(list(accuracies) == metrics for accuracies in found.values())
    assert {accuracy.n for accuracies in found.values() for accuracy in accuracies.values()} == {2}
    assert {len(accuracy.items) for accuracies in found.values() for accuracy in accuracies.values()} == {2}
    first = {count: accuracies[metrics[0]] for count, accuracies in found.items()}
    assert {count: accuracy.settings["num_fewshot"] for count, accuracy in first.items()} == {None: 5, 5: 5, 2: 2}
    assert first[None].items_hash == first[5].items_hash != first[2].items_hash


def test_rows_without_the_fields_of_the_task(model: PreTrainedModel, tmp_path: Path) -> None:
    data_folder(tmp_path, "copa_validation", [{"premise": "The dog barked."}])
    with pytest.raises(EvaluationError, match=r"task copa cannot run on its items from .*copa_validation\.jsonl"):
        measured(model, "copa", tmp_path)


def test_a_damaged_file_of_another_task_is_refused_at_once(tmp_path: Path) -> None:
    file = data_folder(tmp_path, "copa_validation", COPA) / "tasks" / "copa_validation.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(EvaluationError, match=r"copa_validation\.jsonl, line 3: not JSON"):
        open_tasks(["copa"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"), [("hellaswga", "hellaswag"), ("arc", "arc_easy or arc_challenge"), ("piqua", "piqa")]
)
def test_an_unknown_task_suggests_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(EvaluationError, match=f"has no task '{name}'; did you mean .*({expected})"):
        open_tasks(["piqa", name])


def test_a_task_that_is_like_none() -> None:
    with pytest.raises(EvaluationError, match="has no task 'xxxxxxxxxxxx'; `lm-eval ls tasks` lists them"):
        open_tasks(["xxxxxxxxxxxx"])


@pytest.mark.parametrize("name", ["sciq", "piqa"])
def test_without_a_file_the_items_come_from_the_hub(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    (opened,) = open_tasks([name], data_dir=None if name in TASKS else tmp_path)
    assert opened.data is None
    with pytest.raises(EvaluationError, match=f"task {name} cannot run on its items from the hub; --data-dir FOLDER"):
        measure_zero_shot(Loaded(model, make_tokenizer()), task=opened, asked=EvaluationSettings(limit=2))


# What can go wrong while a task runs


@pytest.fixture
def sciq(tmp_path: Path) -> Path:
    rows = [{**SCIQ, "correct_answer": "because " * (1 + number)} for number in range(6)]
    return data_folder(tmp_path, "sciq_test", rows)


def short_of_memory(model: PreTrainedModel, sequences: int) -> Callable[[], None]:
    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs and len(inputs[0]) > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return model.register_forward_pre_hook(check).remove


def test_memory_that_runs_out_halves_the_batch(
    model: PreTrainedModel, sciq: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (opened,) = open_tasks(["sciq"], data_dir=sciq)
    given = Loaded(model, make_tokenizer())
    expected = measure_zero_shot(given, task=opened, asked=EvaluationSettings(batch_size=2))
    restore = short_of_memory(model, 2)
    with caplog.at_level(logging.WARNING, logger="amprune"):
        found = measure_zero_shot(given, task=opened, asked=EvaluationSettings(batch_size=16))
    restore()
    assert {record.note for record in expected} == {None}
    assert found == [replace(record, note="a batch of 2 instead of 16: memory ran out") for record in expected]
    assert [record.args for record in caplog.records if record.name.startswith("amprune")] == [
        ("sciq", 8), ("sciq", 4), ("sciq", 2),
    ]  # fmt: skip


def test_memory_too_small_for_one_sequence(model: PreTrainedModel, sciq: Path) -> None:
    restore = short_of_memory(model, 0)
    with pytest.raises(EvaluationError, match="sciq: memory runs out at a batch of one"):
        measured(model, "sciq", sciq)
    restore()


def test_logits_that_are_nan_are_refused(sciq: Path) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with nan_refused(model, "broken"), pytest.raises(EvaluationError, match="broken gives logits that are NaN"):
        measured(model, "sciq", sciq)


def test_an_answer_longer_than_the_positions(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{**SCIQ, "correct_answer": "blue " * 1100}]
    with pytest.raises(EvaluationError, match=r"task sciq cannot run.*longer than the 1,024 positions"):
        measured(model, "sciq", data_folder(tmp_path, "sciq_test", rows))


def test_logging_is_as_before_after_a_failure(model: PreTrainedModel, tmp_path: Path) -> None:
    from tqdm.std import tqdm

    before = (logging.getLogger("lm_eval").level, tqdm.__init__)
    data_folder(tmp_path, "copa_validation", [{"premise": "The dog barked."}])
    with pytest.raises(EvaluationError):
        measured(model, "copa", tmp_path)
    assert (logging.getLogger("lm_eval").level, tqdm.__init__) == before
