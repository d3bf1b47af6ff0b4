import copy
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import PromptFormat, prompt_format_from_run
from dlm_jax.data.records import BadRecord, ChunkEncoder, RecordChunk
from dlm_jax.data.tokenization import start_token
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


def encode(prompt_format, records):
    """Returns (tokens, starts, noisable_mask, counts), one row per example."""
    counts = Counter()
    span = prompt_format.encode([prompt_format.parse(record)[1] for record in records], counts)
    assert (span.tokens.dtype, span.starts.dtype, span.noisable_mask.dtype) == (np.uint32, bool, bool)
    tokens, starts, noisable_mask = (values.reshape(-1, prompt_format.length)
                                     for values in (span.tokens, span.starts, span.noisable_mask))
    assert starts[:, 0].all() and not noisable_mask[:, 0].any() and len(tokens) == counts["examples"]
    train_on_padding = prompt_format.config.train_on_padding
    assert prompt_format.row_masks == (("noisable_mask",) if train_on_padding else ("starts", "noisable_mask"))
    assert not train_on_padding or not starts[:, 1:].any()  # `starts` is then not stored
    return tokens, starts, noisable_mask, counts


@pytest.fixture(scope="module")
def gpt2(test_data):
    bpe = test_data / "gpt2_bpe"
    return GPT2TokenizerFast(vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe"))


@pytest.fixture
def chat_tokenizer(bos_tokenizer):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def template_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    return file


@pytest.mark.parametrize("train_on_padding", [False, True])
@pytest.mark.parametrize("separator", ["\n", "", "\n\n### "])
def test_row_is_bos_prompt_separator_response_eos_padding(bos_tokenizer, train_on_padding, separator):
    source = random.Random(0)
    texts = ["x" + "".join(source.choices("ab \n\t|#é🙂<>/s", k=source.randrange(30))) for _ in range(120)]
    records = [{"prompt": texts[i], "response": texts[i + 1]} for i in range(0, 120, 2)]
    prompt_format = make_format(bos_tokenizer, "prompt_response", 300, train_on_padding, separator=separator)
    for record, row, starts, noisable_mask in zip(records, *encode(prompt_format, records)[:3], strict=True):
        prompt = [BOS, *bos_tokenizer.encode(record["prompt"] + separator, add_special_tokens=False)]
        response = [*bos_tokenizer.encode(record["response"], add_special_tokens=False), EOS]
        start, end = len(prompt), len(prompt) + len(response)
        assert row.tolist() == prompt + response + [EOS] * (prompt_format.length - end)
        assert bos_tokenizer.decode(row[1:start]) == record["prompt"] + separator
        assert not noisable_mask[:start].any() and noisable_mask[start:end].all()
        assert (noisable_mask[end:] == train_on_padding).all()
        assert np.flatnonzero(starts).tolist() == ([0] if train_on_padding else [0, end])


def test_choice_of_the_padding_token(tokenizer):
    def padding(tokenizer, **settings):
        prompt_format = make_format(tokenizer, "prompt_response", **settings)
        return tokenizer.decode(encode(prompt_format, [{"prompt": "a", "response": "b"}])[0][0, -1])

    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert [padding(tokenizer), padding(padded), padding(padded, pad_token="<s>")] == ["</s>", "<pad>", "<s>"]


@pytest.mark.parametrize(("spare", "examples", "truncated", "dropped"), [
    (0, 1, 0, 0), (-1, 1, 1, 0), (-3, 1, 1, 0), (-4, 0, 0, 1), (-9, 0, 0, 1)])
def test_truncation_keeps_a_token_of_the_response(tokenizer, spare, examples, truncated, dropped):
    record = {"prompt": "abcdefgh", "response": "xyz"}  # 1 + 8 + 1 and 3 + 1 tokens
    prompt_format = make_format(tokenizer, "prompt_response", 14 + spare, overlong="truncate")
    tokens, starts, noisable_mask, counts = encode(prompt_format, [record])
    assert counts == Counter(examples=examples, truncated=truncated, dropped=dropped)
    if truncated:  # the row is full, and EOS is cut off
        assert tokenizer.decode(tokens[0][noisable_mask[0]]) == "xyz"[: 4 + spare]
        assert noisable_mask[0, -1] and starts.sum() == 1


def test_overlong_examples_are_dropped_or_refused(tokenizer):
    records = [{"prompt": "a", "response": "b" * n} for n in (60, 61, 62)]  # + 4 tokens
    tokens, _, _, counts = encode(make_format(tokenizer, "prompt_response", overlong="drop"), records)
    assert len(tokens) == 1 and counts == Counter(examples=1, dropped=2)
    assert encode(make_format(tokenizer, "prompt_response", 3, overlong="drop"), records)[0].shape == (0, 3)
    encoder = ChunkEncoder(make_format(tokenizer, "prompt_response"))
    assert encoder(RecordChunk("some.jsonl", "line", 8, records[:1])).counts["examples"] == 1
    with pytest.raises(DataError, match=r"line 9: .*data\.length.*data\.examples\.overlong"):
        encoder(RecordChunk("some.jsonl", "line", 8, records))


@pytest.mark.parametrize(("format", "record", "names"), [
    ("prompt_response", {"prompt": "a"}, "response"),
    ("prompt_response", {"prompt": " \n", "response": "b"}, "prompt"),
    ("prompt_response", {"prompt": "a", "response": ""}, "response"),
    ("prompt_response", {"prompt": "a", "response": 7}, "int.*response"),
    ("prompt_response", "just text", "prompt, response"),
    ("alpaca", {"instruction": " ", "input": "x", "output": "b"}, "prompt"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "int.*input"),
    ("gsm8k", {"question": "a"}, "answer"),
    ("gsm8k_symbolic", "a|b", r"\|\|"),
    ("gsm8k_symbolic", "a||", "response"),
    ("messages", {"chat": []}, "messages.*chat"),
    ("messages", {"messages": ["a"]}, "message 1"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "message 1.*content"),
    ("messages", {"messages": [{"from": ["gpt"], "value": "a"}]}, "message 1.*role"),
    ("messages", {"messages": TALK[:2]}, "assistant"),
    ("messages", {"messages": TALK[2:]}, "message 1"),
    ("messages", {"messages": [*TALK[:2], {"role": "assistant", "content": "\n"}]}, "message 3"),
])
def test_bad_records_name_the_fault(chat_tokenizer, format, record, names):
    with pytest.raises(BadRecord, match=names):
        make_format(chat_tokenizer, format).parse(record)


def test_settings_are_checked_before_the_first_record(tokenizer, tmp_path):
    missing, broken, silent = (tmp_path / f"{name}.jinja" for name in ("missing", "broken", "silent"))
    broken.write_text("{% for %}")
    silent.write_text("{{ messages[0].content }}")
    for error, match, settings in [
        (ConfigError, r"data\.examples\.format", {"format": "none"}),
        (ConfigError, r"data\.examples\.pad_token.*<pad>", {"format": "gsm8k", "pad_token": "<pad>"}),
        (DataError, r"data\.examples\.chat_template", {"format": "messages"}),
        (ConfigError, r"missing\.jinja", {"format": "messages", "chat_template": str(missing)}),
        (DataError, r"broken\.jinja", {"format": "messages", "chat_template": str(broken)}),
        (DataError, r"silent\.jinja", {"format": "messages", "chat_template": str(silent)}),
    ]:
        with pytest.raises(error, match=match):
            make_format(tokenizer, **settings)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="EOS"):
        make_format(endless, "gsm8k")


@pytest.mark.parametrize(("template", "learned", "bos", "ends"), [
    (CHATML, ["im_end<|im_end|>", "no more<|im_end|>"], [], ["<|im_end|>", "</s>"]),
    (LLAMA2, [" im_end </s>", " no more </s>"], [], ["</s>"]),
    (PLAIN, [" im_end</s>", " no more</s>"], [BOS], ["</s>"]),  # no special tokens: BOS and EOS are added
])
def test_each_turn_of_the_assistant_is_an_example(chat_tokenizer, template_file, template, learned, bos, ends):
    template_file.write_text(template)
    talk = TALK[1:] if template == LLAMA2 else TALK
    prompt_format = make_format(chat_tokenizer, "messages", 200, chat_template=str(template_file))
    assert chat_tokenizer.convert_ids_to_tokens(prompt_format.end_token_ids) == ends
    tokens, starts, noisable_mask, counts = encode(prompt_format, [{"messages": talk}])
    assert counts["examples"] == 2
    turns = zip(tokens, starts, noisable_mask, learned, (len(talk) - 3, len(talk) - 1), strict=True)
    for row, row_starts, mask, response, turn in turns:
        prompt = chat_tokenizer.apply_chat_template(
            talk[:turn], chat_template=template, add_generation_prompt=True, return_dict=False)
        start, end = np.flatnonzero(mask)[[0, -1]]
        assert row[:start].tolist() == bos + prompt
        assert chat_tokenizer.decode(row[start : end + 1]) == response and row[end] in prompt_format.end_token_ids
        assert mask[start : end + 1].all() and np.flatnonzero(row_starts).tolist() == [0, end + 1]
    assert chat_tokenizer.chat_template == CHATML


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize(("format", "prompt", "response"), [
    ("prompt_response", {"prompt": "ab ü"}, {"response": "c"}),
    ("alpaca", {"instruction": "Say."}, {"output": "it"}),
    ("alpaca", {"instruction": "Say.", "input": ""}, {"output": "it"}),
    ("alpaca", {"instruction": "Say.", "input": "ab"}, {"output": "it"}),
    ("gsm8k", {"question": "1 + 1?"}, {"answer": "#### 2"}),
    ("messages", {"messages": TALK[:2]}, {"messages": TALK[:3]}),
    ("messages", {"messages": TALK[:4]}, {"messages": TALK}),
])
def test_prompts_have_the_ids_of_training_rows(chat_tokenizer, format, prompt, response, template, bos):
    chat_tokenizer.bos_token, chat_tokenizer.chat_template = bos, template.replace("{{ bos_token }}", "")
    prompt_format = make_format(chat_tokenizer, format, 400)
    tokens, _, noisable_mask, _ = encode(prompt_format, [prompt | response])
    start, end = np.flatnonzero(noisable_mask[-1])[[0, -1]]
    prompt_ids = prompt_format.encode_record_prompt(prompt)
    assert prompt_ids == tokens[-1, :start].tolist()
    if bos or format != "messages":
        assert prompt_ids[0] == (BOS if bos else EOS)
    if len(prompt) == 1:
        assert prompt_format.encode_prompt(next(iter(prompt.values()))) == prompt_ids
    ids = tokens[-1, start : end + 1].tolist()
    assert ids[-1] == prompt_format.end_token_ids[0] and not set(ids[:-1]) & set(prompt_format.end_token_ids)
    text = response["messages"][-1]["content"] if format == "messages" else next(iter(response.values()))
    assert prompt_format.decode_response(ids[:-1]) == text


def test_symbolic_gsm8k_prompts(tokenizer):
    prompt_format = make_format(tokenizer, "gsm8k_symbolic")
    assert prompt_format.parse(" \n") is None
    line = "1 + 1?||<<1+1=2>> #### 2"
    example, = prompt_format.parse(line)[1]
    assert prompt_format.encode_prompt("1 + 1?") == prompt_format.encode_record_prompt(line) == example.prompt


def test_plain_text_at_the_end_of_a_turn_is_not_part_of_the_response(chat_tokenizer):
    chat_tokenizer.chat_template = PLAIN.replace("\n\n{% endfor", "\n### End\n{% endfor")
    prompt_format = make_format(chat_tokenizer, "messages", 200)
    *response, end = prompt_format.parse({"messages": TALK[:3]})[1][0].response
    assert chat_tokenizer.decode(response) == " im_end\n### End" and end == EOS
    assert prompt_format.decode_response(response) == "im_end"


@pytest.mark.parametrize(("format", "prompt"), [
    ("gsm8k", " "), ("gsm8k", TALK[:2]), ("messages", " "), ("messages", [{"role": "user"}]), ("messages", "\ud800")])
def test_invalid_prompts_are_refused(chat_tokenizer, format, prompt):
    with pytest.raises(DataError, match=format):
        make_format(chat_tokenizer, format).encode_prompt(prompt)


def test_examples_are_held_out_by_their_first_prompt(chat_tokenizer):
    chat = make_format(chat_tokenizer, "messages", 200)
    assert chat.parse({"messages": TALK})[0] == chat.parse({"messages": TALK[:3]})[0]
    pairs = make_format(chat_tokenizer, "prompt_response")
    assert pairs.parse({"prompt": "a", "response": "b"})[0] == pairs.parse({"prompt": "a", "response": "c"})[0]


TOOLS = "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "{{ m.content | trim }}",
    "{{ m.content | trim }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}")
TOOL = {"type": "function", "function": {"name": "half", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_reach_the_template(chat_tokenizer, as_text):
    """As transformers writes them with arguments as objects; OpenAI's form has JSON text, and null as content."""
    call = {"id": "1", "type": "function", "function": {"name": "half", "arguments": {"x": 18}}}
    talk = [{"role": "user", "content": "Half of 18?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "9"}, {"role": "assistant", "content": "Nine."}]
    chat_tokenizer.chat_template = TOOLS
    expected = chat_tokenizer.apply_chat_template(talk, tools=[TOOL], tokenize=False)
    given = copy.deepcopy(talk)
    given[1]["content"] = None
    if as_text:
        given[1]["tool_calls"][0]["function"]["arguments"] = '{"x": 18}'
    record = {"messages": given, "tools": json.dumps([TOOL]) if as_text else [TOOL]}
    prompt_format = make_format(chat_tokenizer, "messages", 1000)
    tokens, _, noisable_mask, _ = encode(prompt_format, [record])
    assert [prompt_format.decode_response(row[mask]) for row, mask in zip(tokens, noisable_mask, strict=True)] == [
        "18", "Nine."]
    start = "".join(chat_tokenizer.decode(prompt_format.encode_record_prompt({**record, "messages": given[:1]})))
    assert expected.startswith("<tools>") and (start.removeprefix("<s>") + "18<|im_end|>") in expected
    for bad in ({**record, "tools": "{"}, {**record, "tools": {"a": 1}},
                {"messages": [talk[0], {**talk[1], "tool_calls": "half"}]},
                {"messages": talk, "functions": [TOOL["function"]]},
                {"messages": [talk[0], {**talk[3], "function_call": call["function"]}]}):
        with pytest.raises(BadRecord, match="tool"):
            prompt_format.parse(bad)
    chat_tokenizer.chat_template = CHATML  # which writes neither
    for lost in ({"messages": [TALK[1], TALK[2]], "tools": [TOOL]}, {"messages": talk}):
        with pytest.raises(BadRecord, match="tool"):
            make_format(chat_tokenizer, "messages").parse(lost)


def test_weight_of_an_answer(chat_tokenizer):
    """OpenAI's form gives 0 to answers that are not to be learned."""
    prompt_format, talk = make_format(chat_tokenizer, "messages", 200), [*TALK[:2], {**TALK[2], "weight": 1}, *TALK[3:]]
    assert prompt_format.parse({"messages": talk}) == prompt_format.parse({"messages": TALK})
    talk[2]["weight"] = 0
    with pytest.raises(BadRecord, match="weight"):
        prompt_format.parse({"messages": talk})


def test_other_spellings_of_roles_and_prompts(chat_tokenizer, tmp_path):
    prompt_format = make_format(chat_tokenizer, "messages", 200)
    expected = prompt_format.parse({"messages": TALK})
    roles = iter(["SYSTEM", "Human", "gpt", "user ", "Model"])
    assert prompt_format.parse({"messages": [{**message, "role": next(roles)} for message in TALK]}) == expected
    assert prompt_format.parse({"messages": TALK[1:], "system": TALK[0]["content"]}) == expected
    with pytest.raises(BadRecord, match="system"):
        prompt_format.parse({"messages": TALK, "system": "Be long."})
    (tmp_path / "with_bom.jinja").write_text(CHATML, encoding="utf-8-sig")
    template = str(tmp_path / "with_bom.jinja")
    assert make_format(chat_tokenizer, "messages", 200, chat_template=template).parse({"messages": TALK}) == expected


def test_sharegpt_is_read_as_messages(chat_tokenizer):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    prompt_format = make_format(chat_tokenizer, "messages", 200, messages_key="conversations")
    assert prompt_format.columns == ("conversations", "tools", "functions", "system")
    assert prompt_format.parse({"conversations": shared}) == prompt_format.parse({"conversations": TALK})


@pytest.mark.parametrize("template", [
    "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML,
    CHATML + "{% if messages | length > 2 %}{{ messages | length }}{% endif %}",
    "{{ messages | length }}" + CHATML,
])
def test_conversations_that_a_template_cannot_write_are_bad_records(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    with pytest.raises(BadRecord, match="message 3"):
        make_format(chat_tokenizer, "messages").parse({"messages": TALK[:3]})


def test_pickled_format_contains_its_template(chat_tokenizer, template_file):
    prompt_format = make_format(chat_tokenizer, "messages", 200, chat_template=str(template_file))
    pickled = pickle.dumps(prompt_format)
    template_file.unlink()
    records = [{"messages": TALK}]
    for here, there in zip(encode(prompt_format, records), encode(pickle.loads(pickled), records), strict=True):
        np.testing.assert_equal(here, there)


def test_gsm8k_examples(gpt2, test_data):
    records = [json.loads(line) for line in (test_data / "gsm8k/test.jsonl").open(encoding="utf-8")]
    tokens, _, noisable_mask, counts = encode(make_format(gpt2, "gsm8k", 640), records)
    assert counts == Counter(examples=len(records)) and (tokens[:, 0] == gpt2.bos_token_id).all()
    answers = gpt2.batch_decode([row[mask] for row, mask in zip(tokens, noisable_mask, strict=True)])
    assert answers == [record["answer"] + "<|endoftext|>" for record in records]


@pytest.mark.parametrize("as_record", [str, lambda line: {"text": line}])
def test_symbolic_gsm8k_examples(gpt2, test_data, as_record):
    lines = (test_data / "gsm8k_icot/test.txt").read_text(encoding="utf-8").splitlines()
    tokens, _, noisable_mask, _ = encode(make_format(gpt2, "gsm8k_symbolic", 512), map(as_record, lines))
    for line, row, mask in zip(lines, tokens, noisable_mask, strict=True):
        start, end = np.flatnonzero(mask)[[0, -1]]
        assert f"{gpt2.decode(row[1 : start - 1])}||{gpt2.decode(row[start:end])}" == line
        assert gpt2.decode(row[start - 1]) == "\n"


def test_alpaca_examples_with_and_without_input(gpt2, test_data):
    records = json.loads((test_data / "alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))[:300]
    truncating, dropping = (make_format(gpt2, "alpaca", 192, overlong=policy) for policy in ("truncate", "drop"))
    tokens, _, noisable_mask, counts = encode(truncating, records)
    assert 0 < counts["truncated"] < counts["examples"] == len(records) - counts["dropped"]
    fewer_tokens, _, _, fewer = encode(dropping, records)
    assert fewer == Counter(examples=counts["examples"] - counts["truncated"],
                            dropped=counts["dropped"] + counts["truncated"])
    complete = ~(noisable_mask[:, -1] & (tokens[:, -1] != gpt2.eos_token_id))
    np.testing.assert_array_equal(tokens[complete], fewer_tokens)
    fitting = (record for record in records if len(truncating.parse(record)[1][0].prompt) < 192)
    for record, row, mask in zip(fitting, tokens, noisable_mask, strict=True):
        prompt = gpt2.decode(row[1:np.flatnonzero(mask)[0]])
        assert prompt.startswith("Below is an instruction that describes a task")
        assert prompt.endswith("### Response:\n") and f"### Instruction:\n{record['instruction']}\n\n" in prompt
        assert ("### Input:" in prompt) == ("further context" in prompt) == bool(record["input"])
        assert record["input"] in prompt
        assert (record["output"] + "<|endoftext|>").startswith(gpt2.decode(row[mask]).rstrip("�"))


def test_split_digits(gpt2, test_data):
    """As in DiffuGPT-M's fine-tuning: runs without digits and single digits are tokenized separately."""
    prompt_format = make_format(gpt2, "gsm8k_symbolic", separator="======", split_digits=True)
    tokens, _, noisable_mask, _ = encode(prompt_format, ["It costs 1250, or 37%.||<<1250-37=1213>> #### 1213"])
    prompt = ["It costs ", *"1250", ", or ", *"37", "%.======"]
    response = ["<<", *"1250", "-", *"37", "=", *"1213", ">> #### ", *"1213"]
    prompt, response = ([token for text in texts for token in gpt2.encode(text)] for texts in (prompt, response))
    expected = [gpt2.eos_token_id, *prompt, *response, gpt2.eos_token_id]
    np.testing.assert_array_equal(tokens[0, : len(expected)], expected)
    assert noisable_mask[0].argmax() == 1 + len(prompt)
    spacing = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")  # decodes with spaces between digits
    with pytest.raises(ConfigError, match=r"data\.examples\.split_digits"):
        make_format(spacing, "gsm8k_symbolic", split_digits=True)


def recipe(**settings):
    return {f"data.examples.{name}": value for name, value in vars(ExampleConfig(**settings)).items()}


def test_prompt_format_of_a_run(bos_tokenizer, chat_tokenizer):
    tokenizer = bos_tokenizer
    settings = dict(format="prompt_response", prompt_key="ask", separator=" => ", pad_token="<s>")
    prompt_format = prompt_format_from_run(tokenizer, recipe(**settings), 50)
    assert (prompt_format.config, prompt_format.length) == (ExampleConfig(**settings), 50)
    assert tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>a => "
    # The template's file may be gone: training stored its content in the tokenizer.
    prompt_format = prompt_format_from_run(chat_tokenizer, recipe(format="messages", chat_template="gone.jinja"), 50)
    assert prompt_format.config.chat_template is None


def test_given_settings_override_the_run(chat_tokenizer, template_file):
    record = recipe(format="gsm8k", separator="=")
    prompt_format = prompt_format_from_run(chat_tokenizer, record, 50, separator="!")
    assert chat_tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>a!"
    assert prompt_format_from_run(chat_tokenizer, record, 50, format="messages").config.format == "messages"
    template_file.write_text(PLAIN)
    for given in ({"format": "messages"}, {}):
        prompt_format = prompt_format_from_run(chat_tokenizer, {}, 50, chat_template=str(template_file), **given)
        assert chat_tokenizer.decode(prompt_format.encode_prompt("a")) == "<s>user: a\n\nassistant:"


@pytest.mark.parametrize("record", [{}, recipe()])
def test_without_a_record_the_chat_template_is_used(tokenizer, chat_tokenizer, record):
    assert prompt_format_from_run(chat_tokenizer, record, 50).config == ExampleConfig(format="messages")
    with pytest.raises(ConfigError, match=r"--format.*--chat_template"):
        prompt_format_from_run(tokenizer, record, 50)


def test_contradicting_settings_are_refused(tokenizer, chat_tokenizer):
    with pytest.raises(ConfigError, match="separator"):
        prompt_format_from_run(chat_tokenizer, {}, 50, separator="x")
    with pytest.raises(ConfigError, match="chat_template"):
        prompt_format_from_run(tokenizer, recipe(format="gsm8k"), 50, chat_template="some.jinja")
    with pytest.raises(DataError, match="chat_template"):
        prompt_format_from_run(tokenizer, recipe(format="messages"), 50)


def test_special_tokens_in_prompts_and_answers_are_text(bos_tokenizer):
    record = {"prompt": "what ends a page? </s>", "response": "</s> does, <s> starts it"}
    tokens, _, noisable_mask, _ = encode(make_format(bos_tokenizer, "prompt_response", 100), [record])
    end = np.flatnonzero(noisable_mask[0])[-1]
    assert np.flatnonzero(np.isin(tokens[0, : end + 1], (BOS, EOS))).tolist() == [0, end]
    assert bos_tokenizer.decode(tokens[0, 1:end]) == f"{record['prompt']}\n{record['response']}"


def test_prompt_that_a_template_has_written_gets_no_second_bos(bos_tokenizer):
    format = make_format(bos_tokenizer, "prompt_response", 100)
    assert format.encode_prompt("<s>a</s>b") == [BOS, *bos_tokenizer.encode("a</s>b\n", add_special_tokens=False)]
    assert format.encode_prompt("<s>a</s>b").count(EOS) == 1


def test_position_0_is_what_is_before_documents(tokenizer, bos_tokenizer):
    for given, start in ((tokenizer, EOS), (bos_tokenizer, BOS)):
        assert make_format(given, "prompt_response").encode_prompt("a")[0] == start == start_token(given)
    assert start_token(tokenizer, add_bos=True) == start_token(tokenizer, packing="document_mask") == BOS
    record = {"data.examples.format": "prompt_response", "data.add_bos": True}
    assert prompt_format_from_run(tokenizer, record, 50).encode_prompt("a")[0] == BOS
