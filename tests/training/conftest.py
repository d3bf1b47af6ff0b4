"""A tiny base model in HF layout, a tiny corpus, and an uninterrupted run on them."""

import dataclasses
import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.parallel import MeshConfig
from dlm_jax.training import train
from dlm_jax.training.config import (
    CheckpointConfig,
    LogConfig,
    ModelSource,
    TrainConfig,
    ValidationConfig,
)
from dlm_jax.training.optimizer import OptimizerConfig

LETTERS = "abcdefgh "


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    """A GPT-2 architecture and a tokenizer of single letters; there are no weights."""
    directory = tmp_path_factory.mktemp("base")
    (directory / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": 12, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "bos_token_id": 0, "eos_token_id": 0}))
    words = {"<eos>": 0} | {letter: i + 1 for i, letter in enumerate(LETTERS)} | {"<unk>": 10}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>",
                            unk_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pretrained(base, tmp_path_factory) -> pathlib.Path:
    """The tiny base, with weights."""
    directory = tmp_path_factory.mktemp("pretrained") / "base"
    save_pretrained(directory, load_pretrained(base, init="random", seed=5))
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("\n\n".join("".join(rng.choice(list(LETTERS), 40)) for _ in range(200)))
    return path


@pytest.fixture(scope="session")
def config(base, corpus) -> TrainConfig:
    """20 steps with everything turned on that needs no network."""
    return TrainConfig(
        seed=3, num_steps=20, mesh=MeshConfig(fsdp=2, data=4),
        model=ModelSource(source=str(base), init="random", mask_token="<mask>"),
        data=DataConfig(train=(str(corpus),), document_separator="\n\n", length=16, batch_size=16,
                        validation_fraction=0.2),
        objective=ObjectiveConfig(anneal_steps=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, ema_decay=0.9,
                                  accumulate_steps=2, schedule="constant"),
        checkpoint=CheckpointConfig(every=5, keep=2), validation=ValidationConfig(every=10, num_rows=20, num_samples=2),
        log=LogConfig(every=4))


@pytest.fixture(scope="session")
def full_run(config, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """The workdir of an uninterrupted run, and its summary."""
    workdir = tmp_path_factory.mktemp("runs") / "full"
    return workdir, train(config, workdir)


def checkpoint_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name."""
    with ocp.StandardCheckpointer() as reader:
        return {f"{item}/{name}": np.asarray(value) for item in ("params", "optimizer", "ema")
                for name, value in reader.restore(workdir / "checkpoints" / str(step) / item).items()}


def changed(config: object, key: str, value: object) -> object:
    """`config` with one dotted key changed."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})
