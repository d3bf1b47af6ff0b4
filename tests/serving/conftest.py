"""Models of a few kilobytes that write text of broken characters, and servers for them in a thread."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.diffusion import BlockSpec
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.serving.app import AppConfig, Service
from dlm_jax.serving.engine import Engine
from dlm_jax.serving.jobs import ServedModel
from dlm_jax.serving.server import address, bind, uvicorn_config

# What decides the programs of a request is the same in most tests: compilation takes most of the time.
STEPS = {"num_steps": 5}
TEMPLATE = ("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}:"
            "{% endfor %}{% if add_generation_prompt %}a{% endif %}")
TEXTS = ["Zoë and the cat 🏠 sat on a mat.", "naïve café, 你好 and 🙂👩\u200d👧!", "a b c the the and and"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")


@pytest.fixture(scope="session")
def lms(tmp_path_factory) -> dict[str, DiffusionLM]:
    """A model trained on entire rows, one with blocks and one without a mask token, with the same random weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {"model_type": "gpt2", "vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2,
              "n_positions": 96, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.4}
    (folder / "config.json").write_text(json.dumps(config))
    full = DiffusionLM(load_pretrained(folder, mask_token="<mask>", init="random"))
    full.tokenizer.chat_template = TEMPLATE

    def with_diffusion(**changes) -> DiffusionLM:
        diffusion = dataclasses.replace(full.pretrained.diffusion, **changes)
        return DiffusionLM(dataclasses.replace(full.pretrained, diffusion=diffusion))

    return {"full": full, "blocks": with_diffusion(blocks=BlockSpec(4)), "causal": with_diffusion(mask_token_id=None)}


@contextlib.contextmanager
def serving(engine: Engine, config: AppConfig = AppConfig(), **model_settings) -> Iterator[str]:
    """Serves the engine's models in a thread; yields the address."""
    service = Service(engine, {name: ServedModel.make(name, lm, **model_settings)
                               for name, lm in engine.models.items()}, config)
    bound = bind("127.0.0.1", 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a slow reader is noticed soon
    where = address(bound)
    server = uvicorn.Server(uvicorn_config(service.app))
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield where
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def engine(lms) -> Iterator[Engine]:
    engine = Engine(lms, max_batch=1, max_queue=256)
    engine.start()
    yield engine
    engine.stop(drain=False)


@pytest.fixture(scope="session")
def server(engine) -> Iterator[str]:
    with serving(engine, AppConfig(body_seconds=1.0, send_seconds=1.0)) as where:
        yield where


@pytest.fixture
def stalled(lms) -> Iterator[tuple[Engine, threading.Event]]:
    """An engine in which everything waits until the event is set."""
    engine, event = Engine(lms, max_batch=4, max_queue=8), threading.Event()
    engine.start()
    engine.call(lambda: event.wait(60))
    yield engine, event
    event.set()
    engine.stop(drain=False)


def connect(where: str, **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{where}/v1", **{"api_key": "none", "max_retries": 0} | settings)


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client
