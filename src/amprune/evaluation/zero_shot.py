"""Zero-shot accuracy through lm-evaluation-harness, with its task definitions as they are (section IV-A)."""

import atexit
import difflib
import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from amprune.errors import AmpruneError, EvaluationError, reason
from amprune.evaluation.comparison import average
from amprune.evaluation.data import TASK_FILES, TaskData, find_task_data
from amprune.evaluation.guards import halve_until_it_fits
from amprune.evaluation.records import Record
from amprune.model.latency import dtype_of
from amprune.model.loading import input_device
from amprune.running import Progress, no_progress
from amprune.settings import TASKS, EvaluationSettings

_BOOTSTRAP = 1000
_FEWSHOT_SEED = 1234  # the harness's own default
_PAPER_FILES = {
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


@dataclass(frozen=True)
class Task:
    """A task of the harness, or a group of tasks, and where its items come from."""

    name: str
    manager: Any
    """The harness's `TaskManager` that knows it."""
    data: TaskData | None
    """None: from the hub."""


@dataclass(frozen=True)
class Accuracy:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    items: tuple[float, ...]
    """The metric of each question; empty where the harness has no such figure."""
    items_hash: str | None
    n: int
    version: str
    """Of the harness's task definition."""
    num_fewshot: int


def zero_shot_records(
    model: PreTrainedModel, tokenizer: Any, task: Task, asked: EvaluationSettings, progress: Progress
) -> list[Record]:
    """Every metric of one task of the harness."""
    found, fitted = measure_zero_shot(model, tokenizer, task, asked, progress=progress)
    note = None if fitted == asked.batch_size else f"a batch of {fitted} instead of {asked.batch_size}: memory ran out"
    return [
        Record(
            measurement="zero_shot", task=one.task, metric=one.metric, value=one.value,
            unit="accuracy" if one.metric.startswith("acc") else one.metric, n=one.n,
            standard_error=one.standard_error, items=one.items, items_hash=one.items_hash, note=note,
            settings={
                "limit": asked.limit, "num_fewshot": one.num_fewshot, "task_version": one.version,
                "dtype": dtype_of(model),
            },
            data={"name": task.data.file.name, "sha256": task.data.sha256} if task.data else {"name": "hub"},
        )
        for one in found
    ]  # fmt: skip


def average_records(records: Iterable[Record], same: dict[str, Any]) -> list[Record]:
    """The unweighted mean of the paper's five tasks, each by the metric that the paper reports; none if one lacks.

    `same` is what the settings of the records have to have in common.
    """
    alike = [record for record in records if same.items() <= record.settings.items()]
    chosen: list[Record] = []
    for task in TASKS:
        metrics = {record.metric: record for record in alike if record.task == task}
        if not metrics:
            return []
        chosen.append(metrics[headline_metric(task, list(metrics))])
    mean, error = average([(record.value, record.standard_error) for record in chosen])
    return [
        Record(
            measurement="zero_shot", task="average", metric="accuracy", value=mean, unit="accuracy",
            n=sum(record.n for record in chosen), standard_error=error, settings={**same, "tasks": list(TASKS)},
        )
    ]  # fmt: skip


def headline_metric(task: str, metrics: Sequence[str]) -> str:
    """Returns the metric that the paper reports: acc for WinoGrande, acc_norm for the others where there is one."""
    preferred = ("acc", "acc_norm") if task == "winogrande" else ("acc_norm", "acc")
    return next((metric for metric in preferred if metric in metrics), metrics[0])


def open_tasks(names: Sequence[str], *, data_dir: Path | None = None) -> tuple[Task, ...]:
    """Finds tasks and checks their files, so that nothing is loaded for a task that cannot run."""
    from lm_eval.tasks import TaskManager

    others = [name for name in names if name not in _PAPER_FILES]
    with _quiet_harness():
        everything = TaskManager() if others else None
    tasks = []
    for name in names:
        if everything is not None and name not in _PAPER_FILES:
            _check_known(name, everything)
        files, splits = _definition(name, everything)
        data = find_task_data(name, splits, data_dir) if data_dir is not None and files is not None else None
        if name in _PAPER_FILES or data is not None:
            tasks.append(Task(name, _overlay(name, str(files), data), data))
        else:
            tasks.append(Task(name, everything, None))
    return tuple(tasks)


def _check_known(name: str, manager: Any) -> None:
    if name not in manager.all_tasks:
        near = [task for task in TASKS if name in task]
        near = near or difflib.get_close_matches(name, [*TASKS, *manager.all_tasks], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`lm-eval ls tasks` lists them"
        raise EvaluationError(f"lm-evaluation-harness has no task {name!r}; {hint}")


def _definition(name: str, manager: Any) -> tuple[Path | None, tuple[str, ...]]:
    """Returns the file that defines a single task, None for a group, and the splits that it is evaluated on."""
    import lm_eval.tasks

    if name in _PAPER_FILES:
        return Path(lm_eval.tasks.__file__).parent / _PAPER_FILES[name], (TASK_FILES[name].split,)
    entry = manager.task_index[name]
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        return None, ()
    return Path(entry.yaml_path), ("test", "validation")


def _overlay(name: str, definition: str, data: TaskData | None) -> Any:
    """Builds a manager of one task that includes the registered definition and changes nothing but where its data lies.

    An inline dict would not inherit the registered task; a YAML file with `include` does.
    """
    from lm_eval.tasks import TaskManager

    content: dict[str, Any] = {"include": definition, "task": name}
    if data is not None:
        content |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {data.split: str(data.file.resolve())}},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            "fewshot_split": None,
            f"{data.split}_split": data.split,
        }
    folder = Path(tempfile.mkdtemp(prefix="amprune-task-"))  # the manager reads it when the task runs
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with _quiet_harness():
        return TaskManager(include_path=str(folder), include_defaults=False)


def measure_zero_shot(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    asked: EvaluationSettings,
    *,
    progress: Progress = no_progress,
) -> tuple[list[Accuracy], int]:
    """Runs one task of the harness; returns its metrics and the batch size that fitted.

    Log-probabilities are summed in float32 whatever the model's dtype: in bfloat16 many choices of a question tie.
    """

    def run(size: int) -> list[Accuracy]:
        return _run(model, tokenizer, task, replace(asked, batch_size=size), progress)

    return halve_until_it_fits(run, asked.batch_size, what=task.name)


def _run(
    model: PreTrainedModel, tokenizer: Any, task: Task, asked: EvaluationSettings, progress: Progress
) -> list[Accuracy]:
    from lm_eval import evaluate

    with _quiet_harness():
        language_model = _language_model(model, tokenizer, asked.batch_size, progress, task.name)
        try:
            loaded = task.manager.load([task.name])
            for single in loaded["tasks"].values():
                _set_examples(single, asked.num_fewshot)
            results: Any = evaluate(language_model, loaded, limit=asked.limit, bootstrap_iters=_BOOTSTRAP)
        except (AmpruneError, MemoryError, RuntimeError):
            raise
        except AssertionError as error:
            raise EvaluationError(
                f"task {task.name} cannot run: {reason(error)} in the harness; is an item longer than the "
                f"{language_model.max_length:,} positions of the model?"
            ) from error
        except Exception as error:  # data sets fail in many types
            where = f"{task.data.file}" if task.data else "the hub; --data-dir FOLDER takes them from FOLDER/tasks"
            raise EvaluationError(f"task {task.name} cannot run on its items from {where}: {reason(error)}") from error
    return [accuracy for name in results["results"] for accuracy in _accuracies(name, results)]


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """Sets the number of examples before a question, which a task that says none itself has none of."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _accuracies(name: str, results: dict[str, Any]) -> Iterator[Accuracy]:
    found, samples = results["results"][name], results["samples"].get(name, [])
    count = results["n-samples"].get(name, {}).get("effective") or len(samples)
    for key, value in found.items():
        metric, _, keeper = key.partition(",")
        if not keeper or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{keeper}")
        mine = [sample for sample in samples if sample.get("filter", keeper) == keeper]
        items = _items(mine, metric)
        yield Accuracy(
            task=name,
            metric=metric if keeper == "none" else f"{metric} ({keeper})",
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            items=items,
            items_hash=_hash(name, mine) if items else None,
            n=int(count) or len(items),
            version=str(results["versions"].get(name, "")),
            num_fewshot=int(results["n-shot"].get(name) or 0),
        )


def _items(samples: list[dict[str, Any]], metric: str) -> tuple[float, ...]:
    values = [sample.get(metric) for sample in samples]
    figures = tuple(float(value) for value in values if isinstance(value, int | float))
    return figures if len(figures) == len(values) else ()


def _hash(name: str, samples: list[dict[str, Any]]) -> str:
    """Identifies the questions by the harness's own hashes of documents and prompts, in order."""
    parts = [f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']}" for sample in samples]
    return hashlib.sha256("\n".join([name, *parts]).encode()).hexdigest()


def _language_model(
    model: PreTrainedModel, tokenizer: Any, batch_size: int, progress: Progress, description: str
) -> Any:
    """Wraps a loaded model for the harness, on the device on which it is, with a bar of ours."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """The harness's own Hugging Face model, which tells how far it is."""

        _advance: Callable[[int], None] = staticmethod(lambda steps: None)

        @property
        def device(self) -> Any:
            return input_device(model)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            with progress(description, len(requests)) as self._advance:
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def _model_call(self, inps: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, **options)
            self._advance(len(inps))
            return logits

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with progress(description, len(requests)) as self._advance:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            generated = super()._model_generate(context, *arguments, **options)
            self._advance(len(context))
            return generated

    return Watched(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", softmax_dtype="float32"
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keeps the harness's own log and the bars of its libraries off the terminal."""
    from tqdm.std import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels, start = [logger.level for logger in loggers], tqdm.__init__

    def start_hidden(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "disable": True})

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = start_hidden
    try:
        yield
    finally:
        tqdm.__init__ = start
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
