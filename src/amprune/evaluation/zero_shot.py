"""Zero-shot accuracy through lm-evaluation-harness, with its task definitions as they are (section IV-A)."""

import atexit
import difflib
import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from amprune.errors import AmpruneError, EvaluationError, reason
from amprune.evaluation.comparison import average
from amprune.evaluation.data import TASK_FILES, TaskData, find_task_data
from amprune.evaluation.measurement import Job, Loaded, halve_until_it_fits
from amprune.evaluation.records import Record
from amprune.model.latency import dtype_of
from amprune.model.loading import input_device
from amprune.records import resolved
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


def zero_shot_jobs(asked: EvaluationSettings) -> list[Job]:
    """Opens the tasks; returns a job a task, and one for the average of the paper's."""
    folder = None if asked.data_dir is None else Path(asked.data_dir).expanduser()
    jobs = []
    for task in open_tasks(asked.tasks, data_dir=folder):
        data = task.data.sha256 if task.data else task.name
        jobs.append(Job(task.name, partial(measure_zero_shot, task=task, asked=asked), data))
    return [*jobs, Job("average", partial(average_accuracy, asked=asked))]


def average_accuracy(given: Loaded, *, asked: EvaluationSettings) -> list[Record]:
    """The unweighted mean of the paper's five tasks, each by the metric that the paper reports; none if one lacks."""
    same = {"limit": asked.limit, "num_fewshot": asked.num_fewshot or 0, "dtype": dtype_of(given.model)}
    alike = [one for one in given.kept if one.measurement == "zero_shot" and same.items() <= one.settings.items()]
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
        files, splits = _definition(name, everything)
        data = find_task_data(name, splits, data_dir) if data_dir is not None and files is not None else None
        if name in _PAPER_FILES or data is not None:
            tasks.append(Task(name, _overlay(name, str(files), data), data))
        else:
            tasks.append(Task(name, everything, None))
    return tuple(tasks)


def _definition(name: str, manager: Any) -> tuple[Path | None, tuple[str, ...]]:
    """Returns the file that defines a single task, None for a group, and the splits that it is evaluated on."""
    import lm_eval.tasks

    if name in _PAPER_FILES:
        return Path(lm_eval.tasks.__file__).parent / _PAPER_FILES[name], (TASK_FILES[name].split,)
    if name not in manager.all_tasks:
        near = [task for task in TASKS if name in task]
        near = near or difflib.get_close_matches(name, [*TASKS, *manager.all_tasks], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`lm-eval ls tasks` lists them"
        raise EvaluationError(f"lm-evaluation-harness has no task {name!r}; {hint}")
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
            "dataset_kwargs": {"data_files": {data.split: str(resolved(data.file))}},
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


def measure_zero_shot(given: Loaded, *, task: Task, asked: EvaluationSettings) -> list[Record]:
    """Runs one task of the harness; returns a record a metric, of which the items are the questions where it tells.

    Log-probabilities are summed in float32 whatever the model's dtype: in bfloat16 many choices of a question tie.
    """

    def run(size: int) -> list[Record]:
        return _run(given, task, replace(asked, batch_size=size))

    found, fitted = halve_until_it_fits(run, asked.batch_size, what=task.name)
    note = None if fitted == asked.batch_size else f"a batch of {fitted} instead of {asked.batch_size}: memory ran out"
    return [replace(record, note=note) for record in found]


def _run(given: Loaded, task: Task, asked: EvaluationSettings) -> list[Record]:
    from lm_eval import evaluate

    with _quiet_harness():
        language_model = _language_model(given, asked.batch_size, task.name)
        try:
            loaded = task.manager.load([task.name])
            for single in loaded["tasks"].values():
                own = single.get_config("num_fewshot")  # of a task that says none, the number is set
                if own is None or (asked.num_fewshot is not None and own != 0):
                    single.set_config(key="num_fewshot", value=asked.num_fewshot or 0)
                single.set_fewshot_seed(seed=_FEWSHOT_SEED)
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
    common = Record(
        measurement="zero_shot", task=task.name, metric="", value=0, unit="",
        settings={"limit": asked.limit, "num_fewshot": 0, "task_version": "", "dtype": dtype_of(given.model)},
        data={"name": task.data.file.name, "sha256": task.data.sha256} if task.data else {"name": "hub"},
    )  # fmt: skip
    return [record for name in results["results"] for record in _records(name, results, common)]


def _records(name: str, results: dict[str, Any], common: Record) -> Iterator[Record]:
    """Yields a record of every metric of a task, or of one in a group."""
    found, samples = results["results"][name], results["samples"].get(name, [])
    count = results["n-samples"].get(name, {}).get("effective") or len(samples)
    settings = {
        **common.settings,
        "num_fewshot": int(results["n-shot"].get(name) or 0),
        "task_version": str(results["versions"].get(name, "")),
    }
    for key, value in found.items():
        metric, _, keeper = key.partition(",")
        if not keeper or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{keeper}")
        mine = [sample for sample in samples if sample.get("filter", keeper) == keeper]
        items = _items(mine, metric)
        metric = metric if keeper == "none" else f"{metric} ({keeper})"
        yield replace(
            common,
            task=name,
            metric=metric,
            value=float(value),
            unit="accuracy" if metric.startswith("acc") else metric,
            n=int(count) or len(items),
            standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            settings=settings,
            items=items,
            items_hash=_hash(name, mine) if items else None,
        )


def _items(samples: list[dict[str, Any]], metric: str) -> tuple[float, ...]:
    values = [sample.get(metric) for sample in samples]
    figures = tuple(float(value) for value in values if isinstance(value, int | float))
    return figures if len(figures) == len(values) else ()


def _hash(name: str, samples: list[dict[str, Any]]) -> str:
    """Identifies the questions by the harness's own hashes of documents and prompts, in order."""
    parts = [f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']}" for sample in samples]
    return hashlib.sha256("\n".join([name, *parts]).encode()).hexdigest()


def _language_model(given: Loaded, batch_size: int, description: str) -> Any:
    """Wraps a loaded model for the harness, on the device on which it is, with a bar of ours."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """The harness's own Hugging Face model, which tells how far it is."""

        _advance: Callable[[int], None] = staticmethod(lambda steps: None)

        @property
        def device(self) -> Any:
            return input_device(given.model)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            with given.progress(description, len(requests)) as self._advance:
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def _model_call(self, inps: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, **options)
            self._advance(len(inps))
            return logits

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with given.progress(description, len(requests)) as self._advance:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            generated = super()._model_generate(context, *arguments, **options)
            self._advance(len(context))
            return generated

    return Watched(
        pretrained=given.model, tokenizer=given.tokenizer, batch_size=batch_size, backend="causal",
        softmax_dtype="float32",
    )  # fmt: skip


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
