"""The prompt_format of a run's examples, from its record."""

import copy

import pytest

from dlm_jax.data.config import DataConfig, ExampleConfig
from dlm_jax.data.prompts import prompt_format_from_run
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.training.config import TrainConfig, flat_dict

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def parse_record(**settings):
    return flat_dict(TrainConfig(data=DataConfig(examples=ExampleConfig(**settings))))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_run_s_record_gives_its_form(tokenizer):
    settings = dict(format="prompt_response", prompt_key="ask", separator=" => ", train_on_padding=True, pad_token="<s>")
    prompt_format = prompt_format_from_run(tokenizer, parse_record(**settings), 50)
    assert (prompt_format.config, prompt_format.length) == (ExampleConfig(**settings), 50)
    assert tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>a => "


def test_a_template_s_file_may_be_gone_for_the_tokenizer_has_it(chat_tokenizer):
    prompt_format = prompt_format_from_run(chat_tokenizer, parse_record(format="messages", chat_template="long/gone.jinja"), 50)
    assert chat_tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>user: a\n"


def test_what_is_given_counts_in_place_of_the_record(chat_tokenizer, tmp_path):
    record = parse_record(format="gsm8k", separator="=")
    assert chat_tokenizer.decode(prompt_format_from_run(chat_tokenizer, record, 50, separator="!").encode_prompt("a")) == "<s>a!"
    assert prompt_format_from_run(chat_tokenizer, record, 50, format="messages").config.format == "messages"
    file = tmp_path / "other.jinja"
    file.write_text("@" + TEMPLATE)
    for given in ({"format": "messages"}, {}):
        prompt_format = prompt_format_from_run(chat_tokenizer, {}, 50, chat_template=str(file), **given)
        assert chat_tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>@user: a\n"


@pytest.mark.parametrize("record", [{}, parse_record()])
def test_without_a_record_the_tokenizer_s_own_template_is_used_or_there_is_none(tokenizer, chat_tokenizer, record):
    assert prompt_format_from_run(chat_tokenizer, record, 50).config == ExampleConfig(format="messages")
    with pytest.raises(ConfigError, match=r"no prompt_format of question and answer.*--format.*--chat_template"):
        prompt_format_from_run(tokenizer, record, 50)


def test_settings_that_contradict_each_other_are_refused(tokenizer, chat_tokenizer):
    with pytest.raises(ConfigError, match="messages have no separator"):
        prompt_format_from_run(chat_tokenizer, {}, 50, separator="x")
    with pytest.raises(ConfigError, match="a chat template is for messages, and the format is gsm8k"):
        prompt_format_from_run(tokenizer, parse_record(format="gsm8k"), 50, chat_template="some.jinja")
    with pytest.raises(DataError, match="has no chat template"):
        prompt_format_from_run(tokenizer, parse_record(format="messages"), 50)
