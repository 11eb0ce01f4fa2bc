"""The command `vllm serve` itself, asked over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from served_models import checkpoints
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

PROMPTS = [list(range(5, 21)), [7, 3, 99, 12]]
# Seconds that a server has to answer: several times what it takes on two busy cores.
PATIENCE = 540


def words(folder: Path) -> None:
    """A tokenizer of 256 words: the server has none otherwise."""
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def asked(server: subprocess.Popen[Any], port: int, path: str, content: Any = None) -> Any:
    """The answer to a request, once the server takes requests."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"} if body else {}
    )
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None and time.monotonic() < until, "the server did not come up"
            time.sleep(1)


def served(folder: Path, *options: str) -> list[list[int]]:
    """Greedy tokens of each prompt from a server of a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port", str(port), *options]
    command += ["--served-model-name", "model", "--max-model-len", "64", "--enforce-eager"]
    few = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=os.environ | few | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as server:
        try:
            asked(server, port, "/health")
            wanted = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            answer = asked(server, port, "/v1/completions", {"model": "model", "prompt": PROMPTS, **wanted})
            return [choice["token_ids"] for choice in answer["choices"]]
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                # One that is told to end while it starts may wait for its engine, which has ended.
                server.kill()


@pytest.mark.timeout(1500)
def test_requests_are_answered_with_the_masked_models_tokens(tmp_path: Path) -> None:
    masked, packed = checkpoints("llama", tmp_path)
    words(masked), words(packed)
    dense = served(masked)
    assert len({token for tokens in dense for token in tokens}) > 4
    assert served(packed) == dense
