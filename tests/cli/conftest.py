"""A base model of a few kilobytes (architecture and tokenizer, no weights), a text to train on, and a recipe."""

import dataclasses
import itertools
import json
import pathlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.pipeline import DiffusionLM

TEXT = [f"The {animal} sat on {place} and saw {name}, who was happy that the sun was warm."
        for animal, place, name in itertools.product(("cat", "dog", "bird"), ("the mat", "a tree", "the grass"),
                                                     ("Tom", "Lily", "Ben", "Sue"))]

# A recipe for the tiny base; tests add lines and `    return config`.
RECIPE = """from dlm_jax.cli.config import train_defaults
def get_config():
    config = train_defaults()
    config.model.init = 'random'
    config.model.mask_token = '<|mask|>'
    config.data.length = 16
    config.data.batch_size = 8
    config.log.tensorboard = False
"""


def without_mask_token(lm: DiffusionLM, **changes) -> DiffusionLM:
    diffusion = dataclasses.replace(lm.pretrained.diffusion, mask_token_id=None)
    return DiffusionLM(dataclasses.replace(lm.pretrained, diffusion=diffusion, **changes))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": len(fast), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def model(base, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny base with random weights and a mask token."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, load_pretrained(base, mask_token="<|mask|>", init="random"))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT))
    return path
