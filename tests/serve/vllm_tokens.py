"""Greedy tokens of checkpoints by vLLM, run by the Python of an environment that has it.

    python vllm_tokens.py JOB RESULTS

JOB is JSON: `count` of tokens to make, and `models`, each a `folder`, its `prompts` as token ids and `options` of
`vllm.LLM`. RESULTS gets one line for every model as soon as it is done: its tokens, their log-probabilities and the
class that computed them, or the error.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str, results_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    for model in job["models"]:
        try:
            result = greedy(model["folder"], model["prompts"], job["count"], model["options"])
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        with Path(results_file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"folder": model["folder"], **result}) + "\n")
        clear()


def greedy(folder: str, prompts: list[list[int]], count: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, skip_tokenizer_init=True, **options)
    asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    answers = [request.outputs[0] for request in found]
    return {
        "implementation": implementation(llm.model_config),
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [choices[token].logprob for token, choices in zip(answer.token_ids, answer.logprobs or [], strict=True)]
            for answer in answers
        ],
    }


def implementation(config: Any) -> str:
    """Names the class that computes the model: its architecture's own, or one that runs the code of transformers."""
    found, _ = config.registry.resolve_model_cls(config.architecture, model_config=config)
    return str(found.__name__)


def clear() -> None:
    """Hands the model's memory and process group back, so that the next model finds neither."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
