import copy
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.records import BadRecord, ChunkEncoder, RecordChunk
from dlm_jax.errors import ConfigError, DataError

BOS, EOS = 0, 1  # of the byte tokenizers
CHATML = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
          "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}" \
        "{% if add_generation_prompt %}assistant:{% endif %}"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "im_end"}, {"role": "user", "content": "More! ü"},
        {"role": "assistant", "content": "no more"}]


def make_format(tokenizer, format, length=64, train_on_padding=False, **settings):
    return PromptFormat(tokenizer, ExampleConfig(format=format, train_on_padding=train_on_padding, **settings), length)


def rows_of(prompt_format, records):
    """(tokens, starts, maskable, counts), one row an example."""
    counts = Counter()
    span = prompt_format.encode([prompt_format.parse(record)[1] for record in records], counts)
    assert (span.tokens.dtype, span.starts.dtype, span.noisable_mask.dtype) == (np.uint32, bool, bool)
    tokens, starts, noisable_mask = (part.reshape(-1, prompt_format.length) for part in
                                (span.tokens, span.starts, span.noisable_mask))
    assert starts[:, 0].all() and not noisable_mask[:, 0].any() and len(tokens) == counts["examples"]
    assert prompt_format.row_masks == (("noisable_mask",) if prompt_format.config.train_on_padding else ("starts", "noisable_mask"))
    assert "starts" in prompt_format.row_masks or not starts[:, 1:].any()  # what is not kept says nothing
    return tokens, starts, noisable_mask, counts


def random_text(source: random.Random, most: int) -> str:
    return "x" + "".join(source.choice("ab \n\t|#é🙂<>/s") for _ in range(source.randrange(most)))


def random_records(count: int = 60) -> list[dict[str, str]]:
    source = random.Random(0)
    return [{"prompt": random_text(source, 30), "response": random_text(source, 30)} for _ in range(count)]


@pytest.fixture(scope="module")
def gpt2(test_data):
    bpe = test_data / "gpt2_bpe"
    return GPT2TokenizerFast(vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe"))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("train_on_padding", [False, True])
@pytest.mark.parametrize("separator", ["\n", "", "\n\n### "])
def test_a_row_is_bos_prompt_separator_response_eos_padding(bos_tokenizer, train_on_padding, separator):
    records = random_records()
    prompt_format = make_format(bos_tokenizer, "prompt_response", 300, train_on_padding=train_on_padding, separator=separator)
    for record, row, starts, noisable_mask in zip(records, *rows_of(prompt_format, records)[:3], strict=True):
        prompt = [BOS, *bos_tokenizer.encode(record["prompt"] + separator, add_special_tokens=False)]
        response = [*bos_tokenizer.encode(record["response"], add_special_tokens=False), EOS]
        begin, end = len(prompt), len(prompt) + len(response)
        assert row.tolist() == prompt + response + [EOS] * (prompt_format.length - end)
        assert not noisable_mask[:begin].any() and noisable_mask[begin:end].all()
        assert bos_tokenizer.decode(row[1:begin]) == record["prompt"] + separator
        assert bos_tokenizer.decode(row[begin : end - 1]) == record["response"]
        if not train_on_padding:
            assert noisable_mask.sum() == len(response) and (row[noisable_mask] == EOS).sum() == 1
            assert np.flatnonzero(starts).tolist() == [0, end]
        else:
            assert noisable_mask[end:].all() and np.flatnonzero(starts).tolist() == [0]


def test_without_bos_a_row_begins_with_eos_as_generation_does(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    tokens, _, noisable_mask, _ = rows_of(make_format(bare, "prompt_response"), [{"prompt": "ab", "response": "c"}])
    assert bare.decode(tokens[0, :4]) == "</s>ab\n"
    assert np.flatnonzero(noisable_mask[0]).tolist() == [4, 5]


def test_padding_is_the_token_asked_for_else_the_tokenizers_own_else_eos(tokenizer):
    def last(tokenizer, **settings):
        prompt_format = make_format(tokenizer, "prompt_response", **settings)
        return tokenizer.decode(rows_of(prompt_format, [{"prompt": "a", "response": "b"}])[0][0, -1])

    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert [last(tokenizer), last(padded), last(padded, pad_token="<s>")] == ["</s>", "<pad>", "<s>"]


@pytest.mark.parametrize(("spare", "examples", "truncated", "dropped"), [
    (0, 1, 0, 0), (-1, 1, 1, 0), (-3, 1, 1, 0), (-4, 0, 0, 1), (-9, 0, 0, 1)])
def test_too_long_truncates_down_to_one_token_of_response(tokenizer, spare, examples, truncated, dropped):
    record = {"prompt": "abcdefgh", "response": "xyz"}  # 1 + 8 + 1 and 3 + 1 tokens
    prompt_format = make_format(tokenizer, "prompt_response", 14 + spare, overlong="truncate")
    tokens, starts, noisable_mask, counts = rows_of(prompt_format, [record])
    assert counts == Counter(examples=examples, truncated=truncated, dropped=dropped)
    if truncated:  # the row is full, and does not say that the response ends here
        assert tokenizer.decode(tokens[0][noisable_mask[0]]) == "xyz"[: 4 + spare]
        assert noisable_mask[0, -1] and starts.sum() == 1


def test_too_long_drops_or_refuses(tokenizer):
    records = [{"prompt": "a", "response": "b" * n} for n in (60, 61, 62)]  # + 4 tokens
    tokens, _, _, counts = rows_of(make_format(tokenizer, "prompt_response", overlong="drop"), records)
    assert len(tokens) == 1 and counts == Counter(examples=1, dropped=2)
    encoder = ChunkEncoder(make_format(tokenizer, "prompt_response"))
    assert encoder(RecordChunk("some.jsonl", "line", 8, records[:1])).counts["examples"] == 1
    with pytest.raises(DataError, match=r"line 9: an example of 65 tokens .* of 64; .*data.length.*overlong"):
        encoder(RecordChunk("some.jsonl", "line", 8, records))


def test_all_examples_dropped_is_an_empty_piece(tokenizer):
    prompt_format = make_format(tokenizer, "prompt_response", 3, overlong="drop")
    assert rows_of(prompt_format, [{"prompt": "a", "response": "b"}])[0].shape == (0, 3)


@pytest.mark.parametrize(("format", "record", "reason"), [
    ("prompt_response", {"prompt": "a"}, "no key 'response'"),
    ("prompt_response", {"prompt": " \n", "response": "b"}, "blank prompt"),
    ("prompt_response", {"prompt": "a", "response": ""}, "blank response"),
    ("prompt_response", {"prompt": "a", "response": 7}, "int under 'response'"),
    ("prompt_response", {"prompt": "a", "response": "b</s>c"}, "EOS in its midst"),
    ("prompt_response", "just text", "prompt, response was expected"),
    ("alpaca", {"instruction": " ", "input": "x", "output": "b"}, "blank prompt"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "int under 'input'"),
    ("gsm8k", {"question": "a"}, "no key 'answer'"),
    ("gsm8k_symbolic", "a|b", r"no \|\|"),
    ("gsm8k_symbolic", "a||", "blank response"),
    ("messages", {"chat": []}, r"no list of messages under 'messages' \(it has chat\)"),
    ("messages", {"messages": ["a"]}, "message 1: str"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "message 1: NoneType under 'content'"),
    ("messages", {"messages": [{"from": ["gpt"], "value": "a"}]}, "message 1: list under 'role'"),
    ("messages", {"messages": TALK[:2]}, "no message is the assistant's"),
    ("messages", {"messages": TALK[2:]}, "blank history before message 1"),
    ("messages", {"messages": [*TALK[:2], {"role": "assistant", "content": "\n"}]}, "blank message 3"),
])
def test_bad_records_say_why(chat_tokenizer, format, record, reason):
    with pytest.raises(BadRecord, match=reason):
        make_format(chat_tokenizer, format).read(record)


def test_blank_lines_are_no_records(tokenizer):
    assert make_format(tokenizer, "gsm8k_symbolic").read(" \n") is None


def test_settings_are_checked_before_the_first_record(tokenizer, tmp_path):
    missing, broken, silent = (tmp_path / f"{name}.jinja" for name in ("missing", "broken", "silent"))
    broken.write_text("{% for %}")
    silent.write_text("{{ messages[0].content }}")
    for error, match, settings in [
        (ConfigError, "format is 'none'", {"format": "none"}),
        (ConfigError, "pad_token is '<pad>'", {"format": "gsm8k", "pad_token": "<pad>"}),
        (DataError, "no chat template.*data.examples.chat_template", {"format": "messages"}),
        (ConfigError, "missing.jinja cannot be read", {"format": "messages", "chat_template": str(missing)}),
        (DataError, "broken.jinja.*Expected an expression", {"format": "messages", "chat_template": str(broken)}),
        (DataError, "silent.jinja.*leaves out the answer", {"format": "messages", "chat_template": str(silent)}),
    ]:
        with pytest.raises(error, match=match):
            make_format(tokenizer, **settings)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        make_format(endless, "gsm8k")


@pytest.mark.parametrize(("template", "learnt", "bos"), [
    (CHATML, ["im_end<|im_end|>", "no more<|im_end|>"], []),
    (LLAMA2, [" im_end </s>", " no more </s>"], []),
    (PLAIN, [" im_end</s>", " no more</s>"], [BOS]),  # no mark of its own: BOS and EOS are added
])
def test_each_turn_of_the_assistant_is_an_example(chat_tokenizer, tmp_path, template, learnt, bos):
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    talk = TALK[1:] if template == LLAMA2 else TALK
    prompt_format = make_format(chat_tokenizer, "messages", 200, chat_template=str(file))
    tokens, starts, noisable_mask, counts = rows_of(prompt_format, [{"messages": talk}])
    assert counts["examples"] == 2
    for row, row_starts, row_maskable, response, turn in zip(
            tokens, starts, noisable_mask, learnt, (len(talk) - 3, len(talk) - 1), strict=True):
        prompt = chat_tokenizer.apply_chat_template(
            talk[:turn], chat_template=template, add_generation_prompt=True, return_dict=False)
        begin, end = np.flatnonzero(row_maskable)[[0, -1]]
        assert row[:begin].tolist() == bos + prompt
        assert chat_tokenizer.decode(row[begin : end + 1]) == response
        assert row_maskable[begin : end + 1].all() and np.flatnonzero(row_starts).tolist() == [0, end + 1]
    assert chat_tokenizer.chat_template == CHATML


ASKED = [
    ("prompt_response", {"prompt": "ab ü"}, {"response": "c"}),
    ("alpaca", {"instruction": "Say."}, {"output": "it"}),
    ("alpaca", {"instruction": "Say.", "input": ""}, {"output": "it"}),
    ("alpaca", {"instruction": "Say.", "input": "ab"}, {"output": "it"}),
    ("gsm8k", {"question": "1 + 1?"}, {"answer": "#### 2"}),
    ("messages", {"messages": TALK[:2]}, {"messages": TALK[:3]}),
    ("messages", {"messages": TALK[:4]}, {"messages": TALK}),
]


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize(("format", "question", "rest"), ASKED)
def test_what_is_asked_has_the_ids_that_a_row_has_before_its_response(chat_tokenizer, format, question, rest, template,
                                                                      bos):
    chat_tokenizer.bos_token, chat_tokenizer.chat_template = bos, template.replace("{{ bos_token }}", "")
    prompt_format = make_format(chat_tokenizer, format, 400)
    tokens, _, noisable_mask, _ = rows_of(prompt_format, [question | rest])
    begin, end = np.flatnonzero(noisable_mask[-1])[[0, -1]]
    asked = prompt_format.encode_record_prompt(question)
    assert asked == tokens[-1, :begin].tolist()
    if bos or format != "messages":
        assert asked[0] == (BOS if bos else EOS)
    if len(question) == 1:  # as somebody would ask it
        assert prompt_format.encode_prompt(next(iter(question.values()))) == asked
    response = tokens[-1, begin : end + 1].tolist()
    assert response[-1] == prompt_format.end_token_ids[0] and not set(response[:-1]) & set(prompt_format.end_token_ids)
    said = rest["messages"][-1]["content"] if format == "messages" else next(iter(rest.values()))
    assert prompt_format.decode_response(response[:-1]) == said


def test_symbolic_gsm8k_is_asked_as_it_was_learnt(tokenizer):
    prompt_format = make_format(tokenizer, "gsm8k_symbolic")
    example, = prompt_format.parse("1 + 1?||<<1+1=2>> #### 2")[1]
    assert prompt_format.encode_prompt("1 + 1?") == prompt_format.encode_record_prompt("1 + 1?||<<1+1=2>> #### 2") == example.prompt


@pytest.mark.parametrize(("template", "ends"), [
    (CHATML, ["<|im_end|>", "</s>"]), (LLAMA2, ["</s>"]), (PLAIN, ["</s>"])])
def test_a_response_ends_with_the_template_s_mark_or_eos(chat_tokenizer, template, ends):
    chat_tokenizer.chat_template = template
    prompt_format = make_format(chat_tokenizer, "messages", 200)
    assert chat_tokenizer.convert_ids_to_tokens(prompt_format.end_token_ids) == ends
    for example in prompt_format.parse({"messages": TALK[1:]})[1]:
        assert example.response[-1] in prompt_format.end_token_ids


def test_an_end_written_in_plain_text_is_no_part_of_what_is_said(chat_tokenizer):
    chat_tokenizer.chat_template = PLAIN.replace("\n\n{% endfor", "\n### End\n{% endfor")
    prompt_format = make_format(chat_tokenizer, "messages", 200)
    *response, end = prompt_format.parse({"messages": TALK[:3]})[1][0].response
    assert chat_tokenizer.decode(response) == " im_end\n### End" and end == EOS
    assert prompt_format.decode_response(response) == "im_end"


@pytest.mark.parametrize(("format", "question", "reason"), [
    ("gsm8k", " ", "asked as gsm8k: a blank prompt"), ("gsm8k", TALK[:2], "list under 'question'"),
    ("messages", " ", "asked as messages: a blank history"), ("messages", [{"role": "user"}], "message 1: no key"),
    ("messages", "\ud800", "not valid Unicode")])
def test_what_cannot_be_asked_says_why(chat_tokenizer, format, question, reason):
    with pytest.raises(DataError, match=reason):
        make_format(chat_tokenizer, format).encode_prompt(question)


def test_a_conversation_is_held_out_as_one_by_its_first_prompt(chat_tokenizer):
    prompt_format = make_format(chat_tokenizer, "messages", 200)
    assert prompt_format.parse({"messages": TALK})[0] == prompt_format.parse({"messages": TALK[:3]})[0]
    pairs = make_format(chat_tokenizer, "prompt_response")
    assert pairs.read({"prompt": "a", "response": "b"})[0] == pairs.read({"prompt": "a", "response": "c"})[0]


def test_sharegpt_is_read_as_messages(chat_tokenizer):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    prompt_format = make_format(chat_tokenizer, "messages", 200, messages_key="conversations")
    assert prompt_format.columns == ("conversations",)
    assert prompt_format.parse({"conversations": shared}) == prompt_format.parse({"conversations": TALK})


@pytest.mark.parametrize(("template", "reason"), [
    ("{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML,
     r"fails at message 3 \(one turn only"),
    (CHATML + "{% if messages | length > 2 %}{{ messages | length }}{% endif %}", "ends message 3 with"),
    ("{{ messages | length }}" + CHATML, "tokens before message 3"),
])
def test_what_a_template_cannot_write_is_a_bad_record(chat_tokenizer, template, reason):
    chat_tokenizer.chat_template = template
    with pytest.raises(BadRecord, match=reason):
        make_format(chat_tokenizer, "messages").read({"messages": TALK[:3]})


def test_a_form_travels_to_workers(chat_tokenizer, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    prompt_format = make_format(chat_tokenizer, "messages", 200, chat_template=str(file))
    travelled = pickle.dumps(prompt_format)
    file.unlink()  # the template travels with it
    for here, there in zip(rows_of(prompt_format, [{"messages": TALK}]), rows_of(pickle.loads(travelled), [{"messages": TALK}]),
                           strict=True):
        np.testing.assert_equal(here, there)


def test_gsm8k_is_learnt_word_for_word(gpt2, test_data):
    records = [json.loads(line) for line in (test_data / "gsm8k/test.jsonl").open(encoding="utf-8")]
    tokens, _, noisable_mask, counts = rows_of(make_format(gpt2, "gsm8k", 640), records)
    assert counts == Counter(examples=len(records)) and (tokens[:, 0] == gpt2.bos_token_id).all()
    answers = gpt2.batch_decode([row[learnt] for row, learnt in zip(tokens, noisable_mask, strict=True)])
    assert answers == [record["answer"] + "<|endoftext|>" for record in records]


@pytest.mark.parametrize("as_record", [str, lambda line: {"text": line}])
def test_symbolic_gsm8k_is_parted_at_its_bars(gpt2, test_data, as_record):
    lines = (test_data / "gsm8k_icot/test.txt").read_text(encoding="utf-8").splitlines()
    tokens, _, noisable_mask, _ = rows_of(make_format(gpt2, "gsm8k_symbolic", 512), map(as_record, lines))
    for line, row, learnt in zip(lines, tokens, noisable_mask, strict=True):
        begin, end = np.flatnonzero(learnt)[[0, -1]]
        assert f"{gpt2.decode(row[1 : begin - 1])}||{gpt2.decode(row[begin:end])}" == line
        assert gpt2.decode(row[begin - 1]) == "\n"


def test_alpaca_asks_with_and_without_input(gpt2, test_data):
    records = json.loads((test_data / "alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))[:300]
    cut, left_out = (make_format(gpt2, "alpaca", 192, overlong=policy) for policy in ("truncate", "drop"))
    tokens, _, noisable_mask, counts = rows_of(cut, records)
    assert 0 < counts["truncated"] < counts["examples"] == len(records) - counts["dropped"]
    few, _, _, fewer = rows_of(left_out, records)
    assert fewer == Counter(examples=counts["examples"] - counts["truncated"],
                            dropped=counts["dropped"] + counts["truncated"])
    whole = ~(noisable_mask[:, -1] & (tokens[:, -1] != gpt2.eos_token_id))
    np.testing.assert_array_equal(tokens[whole], few)
    fitting = (record for record in records if len(cut.read(record)[1][0].prompt) < 192)
    for record, row, learnt in zip(fitting, tokens, noisable_mask, strict=True):
        begin = np.flatnonzero(learnt)[0]
        prompt = gpt2.decode(row[1:begin])
        assert prompt.startswith("Below is an instruction that describes a task")
        assert prompt.endswith("### Response:\n") and f"### Instruction:\n{record['instruction']}\n\n" in prompt
        assert ("### Input:" in prompt) == ("further context" in prompt) == bool(record["input"])
        assert record["input"] in prompt
        assert (record["output"] + "<|endoftext|>").startswith(gpt2.decode(row[learnt]).rstrip("�"))


def test_digits_are_tokens_of_their_own(gpt2):
    """As in DiffuGPT-M's fine-tuning: question and answer in runs without digits and single digits, each by itself."""
    prompt_format = make_format(gpt2, "gsm8k_symbolic", separator="======", split_digits=True)
    tokens, _, noisable_mask, _ = rows_of(prompt_format, ["It costs 1250, or 37%.||<<1250-37=1213>> #### 1213"])
    parts = ["It costs ", *"1250", ", or ", *"37", "%.======", "<<", *"1250", "-", *"37", "=", *"1213", ">> #### ",
             *"1213"]
    expected = [gpt2.eos_token_id] + [token for part in parts for token in gpt2.encode(part)] + [gpt2.eos_token_id]
    np.testing.assert_array_equal(tokens[0, : len(expected)], expected)
    assert noisable_mask[0].argmax() == len(gpt2.encode("It costs ")) + len(gpt2.encode(", or ")) + 9
    with pytest.raises(ConfigError, match="split_digits is not for messages"):
        ExampleConfig("messages", split_digits=True)


def test_digits_are_not_split_where_a_tokenizer_puts_spaces_between(test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    with pytest.raises(ConfigError, match="split_digits does not go with the tokenizer"):
        make_format(tokenizer, "gsm8k_symbolic", split_digits=True)
