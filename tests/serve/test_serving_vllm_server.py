"""The commands of docs/serving.md: pruned SmolLM2-135M behind vLLM's server answers what transformers answers."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving_models import NEW_TOKENS, run_amprune, smollm2_folder, transformers_answers
from serving_page import ASK, PRUNE, SERVE
from serving_vllm import free_port, request, running_server, vllm_python
from transformers import AutoTokenizer, GenerationConfig

pytestmark = pytest.mark.serving

# A smaller calibration set than the default's.
PRUNE_QUICK = ["--calibration", "builtin", "--tokens", "4096"]
PORT = "8000"  # on the page


@dataclass(frozen=True)
class Running:
    """A server: its port and what it serves."""

    port: str
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    vllm_python(), smollm2_folder()
    place = tmp_path_factory.mktemp("server")
    running = Running(str(free_port()), run_amprune(PRUNE, place, *PRUNE_QUICK))
    python, *arguments = shlex.split(SERVE.replace(PORT, running.port))
    assert python == ".venv-serving/bin/python"
    with running_server([vllm_python(), *arguments], running.address, place):
        yield running


def continuation(folder: Path, ids: list[int]) -> str:
    """Returns what transformers continues a prompt with, in words."""
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    (tokens,) = transformers_answers(folder, [ids]).tokens
    end = next(
        (place for place, token in enumerate(tokens) if token in (ends if isinstance(ends, list) else [ends])), None
    )
    text = AutoTokenizer.from_pretrained(folder).decode(tokens[:end], skip_special_tokens=True)
    return str(text)


def test_the_server_names_the_model(server: Running) -> None:
    assert [model["id"] for model in request(server.address, "/v1/models")["data"]] == ["pruned"]


@pytest.mark.parametrize("prompt", ["The sun rises in the east and", "Water boils at", "Once upon a time,"])
def test_a_completion_is_that_of_transformers(prompt: str, server: Running) -> None:
    body = {"model": "pruned", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    (choice,) = request(server.address, "/v1/completions", body)["choices"]
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    assert choice["text"] == continuation(server.folder, tokenizer(prompt)["input_ids"])
    assert len(choice["text"].split()) > 3


def test_a_chat_goes_through_the_template_of_the_checkpoint(server: Running) -> None:
    messages = [{"role": "user", "content": "Name three colours of the rainbow."}]
    body = {"model": "pruned", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    (choice,) = request(server.address, "/v1/chat/completions", body)["choices"]
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert choice["message"]["content"] == continuation(server.folder, ids)


def test_the_request_of_the_page_is_answered(server: Running) -> None:
    curl, *arguments = shlex.split(ASK.replace(PORT, server.port))
    if shutil.which(curl) is None:
        pytest.skip("needs curl")
    answer = json.loads(subprocess.run([curl, *arguments], check=True, capture_output=True, timeout=120).stdout)
    prompt = json.loads(arguments[arguments.index("-d") + 1])["prompt"]
    ids = AutoTokenizer.from_pretrained(server.folder)(prompt)["input_ids"]
    assert answer["choices"][0]["text"] == continuation(server.folder, ids)
