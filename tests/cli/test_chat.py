"""`dlm chat`: lines in and answers out, a terminal, the history, and refusals."""

import dataclasses
import io
import os
import re
import select
import subprocess
import sys
import time
import typing

import numpy as np
import pytest

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli import chat
from dlm_jax.cli.chat import FORMATS, Conversation, LiveAnswer
from dlm_jax.cli.main import main
from dlm_jax.cli.sample import MASK
from dlm_jax.data.config import ExampleConfig
from dlm_jax.errors import ConfigError
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.sampling import SamplerConfig, Snapshot
from tests.cli.conftest import without_mask_token

TEMPLATE = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|endoftext|>{% else %}"
            "{{ m.role[0] }}{{ m.content }}:{% endif %}{% endfor %}")
SHORT = {"max_new_tokens": 5, "num_steps": 3}
FLAGS = tuple(f"--{name}={value}" for name, value in SHORT.items())


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """The tiny base with random weights, as a run on conversations would have exported it."""
    pretrained = load_pretrained(base, mask_token="<|mask|>", init="random")
    pretrained.tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("export") / "talker"
    save_pretrained(folder, dataclasses.replace(pretrained, recipe={
        "data.examples.format": "messages", "data.examples.chat_template": "long/gone.jinja"}))
    return folder


@pytest.fixture(scope="module")
def lm(model):
    return DiffusionLM.from_pretrained(model)


@pytest.fixture
def run(monkeypatch, model, lm):
    """Runs the command on some input, with the model that is loaded already."""
    def run(given: str | bytes, *argv: str, lm: DiffusionLM = lm) -> int:
        given = given.encode() if isinstance(given, str) else given
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        monkeypatch.setattr(chat, "load_model", lambda arguments: lm)
        return main(["chat", f"--model={model}", *argv])

    return run


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def with_format(lm, **settings):
    recipe = {f"data.examples.{name}": value for name, value in settings.items()}
    return DiffusionLM(dataclasses.replace(lm.pretrained, recipe=recipe))


def conversation_with(lm, **settings):
    return Conversation(lm, lm.prompt_format(), SamplerConfig(num_steps=3),
                        **{"max_new_tokens": 5, "seed": 0} | settings)


def test_formats():
    known = typing.get_args(typing.get_type_hints(ExampleConfig)["format"])
    assert set(FORMATS) == set(known) - {"none"}


def test_lines_are_turns(capsys, run, lm):
    first, = lm.respond([user("Tom?")], seed=3, **SHORT)
    second, = lm.respond([user("Tom?"), assistant(first), user("Ben")], seed=3, example_index=[1], **SHORT)
    for stream in ((), ("--stream",)):  # no terminal here, so nothing is shown
        assert run("Tom?\n\n  \nBen\n", *FLAGS, "--seed=3", *stream) == 0
        assert capsys.readouterr() == (f"{first}\n{second}\n", "")


def test_seed_of_a_session(lm):
    single = with_format(lm, format="prompt_response")
    sessions = []
    for seed in (0, 0, 1):
        conversation = conversation_with(single, seed=seed)
        sessions.append([conversation.ask("Tom?").text for _ in range(3)])
    assert sessions[0] == sessions[1] != sessions[2] and len(set(sessions[0])) > 1
    conversation.reset_seed(0)
    assert conversation.ask("Tom?").text == sessions[0][0]  # without messages, a question does not see those before


def test_oldest_exchanges_are_dropped(capsys, run, lm, monkeypatch):
    asked = []
    respond = DiffusionLM.respond
    monkeypatch.setattr(DiffusionLM, "respond", lambda self, questions, *rest, **settings: (
        asked.append(questions[0]), respond(self, questions, *rest, **settings))[1])
    assert run("Tom?\nBen?\nSue?\nLily?\n", *FLAGS, "--system=Hm") == 0
    err = capsys.readouterr().err
    prompt_format = lm.prompt_format()
    for number, question in enumerate(asked):
        assert question[0] == {"role": "system", "content": "Hm"}
        assert question[-1] == user(("Tom?", "Ben?", "Sue?", "Lily?")[number])
        assert len(prompt_format.encode_prompt(question)) + SHORT["max_new_tokens"] <= 32
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][1] == user("Tom?") and asked[-1][1] != user("Tom?")
    reported = sum(int(count or 1) for count in re.findall(r"the oldest (\d*)", err))
    assert reported == len(asked) - 1 - (len(asked[-1]) - 2) // 2 > 0


def test_format_without_history(capsys, run, lm):
    single = with_format(lm, format="prompt_response", separator=">")
    assert run("Tom?\nTom?\n", *FLAGS, lm=single) == 0
    answers = [single.respond("Tom?", example_index=[i], **SHORT)[0] for i in range(2)]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_format_flags(capsys, run, lm, tmp_path):
    bare = with_format(lm)
    bare.tokenizer.chat_template, kept = None, bare.tokenizer.chat_template
    try:
        assert run("Tom?\n", lm=bare) == 1
        error = capsys.readouterr().err
        assert "--format" in error and "--chat_template" in error and error.count("\n") == 1
        assert run("Tom?\n", *FLAGS, "--format=prompt_response", "--separator=>", lm=bare) == 0
        given = with_format(lm, format="prompt_response", separator=">")
        assert capsys.readouterr().out == given.respond("Tom?", **SHORT)[0] + "\n"
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        assert run("Tom?\n", *FLAGS, f"--chat_template={tmp_path / 'chat.jinja'}", lm=bare) == 0
    finally:
        bare.tokenizer.chat_template = kept
    assert capsys.readouterr().out == lm.respond("Tom?", **SHORT)[0] + "\n"


def test_autoregressive_run(capsys, run, lm):
    parent = without_mask_token(lm, recipe=lm.pretrained.recipe | {"objective.name": "autoregressive"})
    assert run("Tom?\n", "--max_new_tokens=5", lm=parent) == 0
    assert capsys.readouterr().out == parent.respond("Tom?", max_new_tokens=5, policy="autoregressive")[0] + "\n"
    assert run("Tom", lm=without_mask_token(lm)) == 1
    assert "--mask_token" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--max_new_tokens=0", "--seed=-1", "--policy=best", "--remask=2"])
def test_bad_settings(capsys, monkeypatch, model, argument):
    monkeypatch.setattr(chat, "load_model", lambda arguments: pytest.fail("the model was loaded"))
    assert main(["chat", f"--model={model}", argument]) == 1
    error = capsys.readouterr().err
    assert argument.strip("-").split("=")[0] in error and error.count("\n") == 1


@pytest.mark.parametrize(("given", "arguments", "mentions"), [
    ("Tom " * 20, (), "--max_new_tokens"),
    ("Tom", ("--max_new_tokens=32",), "at most 32"),
    (b"\xff\n", (), "UTF-8"),
    ("Tom", ("--separator=x",), "separator"),
    ("Tom", ("--format=alpaca", "--system=x"), "alpaca"),
    ("Tom", ("--format=alpaca", f"--chat_template={__file__}"), "alpaca"),
    ("Tom", ("--chat_template=no/file",), "no/file"),
])
def test_bad_input(capsys, run, given, arguments, mentions):
    assert run(given, *arguments) == 1
    out, err = capsys.readouterr()
    assert mentions in err and err.count("\n") == 1 and not out


def test_live_answer(monkeypatch, lm):
    shown = []
    monkeypatch.setattr(LiveAnswer, "show", lambda self, step, texts: shown.append(texts))
    prompt, answer = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The cat", " sat on"))
    end = lm.tokenizer.eos_token_id
    tokens = np.array([[*prompt, *answer, end, *prompt, 0, 0]])
    lengths, places = np.array([tokens.shape[1] - 2]), np.arange(tokens.shape[1])
    live = LiveAnswer(lm.tokenizer, [end], show_text=True)
    for step, masked in enumerate((places >= len(prompt), places == len(prompt))):
        live(Snapshot(step, np.zeros(1, int), lengths, tokens, masked[None], np.zeros(tokens.shape)))
    assert shown == [[MASK * (lengths[0] - len(prompt))], [MASK + lm.tokenizer.decode(answer[1:])]]


def test_commands_and_interrupts(capsys, monkeypatch, lm):
    """Lines come from a script; the next test has a terminal."""
    conversation, script, asked = conversation_with(lm), [], []

    def type_line(prompt):
        line = script.pop(0)
        if isinstance(line, type):
            raise line
        return line

    ask = Conversation.ask

    def patched_ask(self, text, on_step):
        if text == "slow":
            def on_step(snapshot):
                raise KeyboardInterrupt
        asked.append(text)
        return ask(self, text, on_step)

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(Conversation, "ask", patched_ask)
    script += ["Tom?", " ", KeyboardInterrupt, "slow", "/system Hm", "/rset", "/seed x", "/seed -1", "/seed 7",
               "/reset", "/reset now", "/help", "Tom? " * 20, "Ben", "/system", "/exit", "never"]
    chat.chat_in_terminal(conversation, stream=False)
    out, err = capsys.readouterr()
    assert script == ["never"] and asked == ["Tom?", "slow", ("Tom? " * 20).strip(), "Ben"]
    first, = lm.respond([user("Tom?")], **SHORT)
    last, = lm.respond([{"role": "system", "content": "Hm"}, user("Ben")], seed=7, **SHORT)
    assert out.splitlines()[1] == first and out.endswith(f"{last}\n")
    assert all(f"\n{command} " in out for command in chat.COMMANDS)
    assert [line for line in err.splitlines() if "/rset" in line and "did you mean /reset?" in line]
    assert err.count("/seed") == 2 and "--max_new_tokens" in err
    with pytest.raises(ConfigError, match="gsm8k"):
        conversation_with(with_format(lm, format="gsm8k"), system="Hm")


# A process that starts a session and then opens a terminal owns it: Ctrl-C typed there reaches it, and is not ignored,
# as it may be in what a shell runs in the background.
IN_A_TERMINAL = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.execv(sys.executable, [sys.executable, "-m", "dlm_jax.cli.main", *sys.argv[2:]])"""


def test_real_terminal(model):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", IN_A_TERMINAL, os.ttyname(slave), "chat", f"--model={model}",
                              *FLAGS, "--stream"], start_new_session=True,
                             env=os.environ | {
                                 "TERM": "xterm", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
                                 "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")})

    def read_until(end: str) -> str:
        shown, limit = b"", time.monotonic() + 120
        while not shown.endswith(end.encode()):
            assert select.select([master], [], [], max(limit - time.monotonic(), 0))[0], shown
            shown += os.read(master, 1 << 16)
        return shown.decode()

    def type_keys(keys: str, end: str = "> ") -> str:
        os.write(master, keys.encode())
        return read_until(end)

    try:
        assert "talker" in read_until("> ")
        shown = [type_keys("Tom?\n")]
        assert "step 0\r\n" + 5 * MASK in shown[0] and "step 3" in shown[0]
        type_keys("half a line", end="half a line")
        time.sleep(0.5)  # until it waits for the next key again
        assert "Traceback" not in type_keys("\x03")
        type_keys("/reset\n")
        type_keys("/seed 0\n")
        shown.append(type_keys("Tom?\n"))
        answers = [re.split(r"\x1b\[\??[0-9;]*[A-Za-z]", text)[-1] for text in shown]
        assert answers[0] == answers[1]
        os.write(master, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)
        os.close(slave)
