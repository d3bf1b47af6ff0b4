"""`dlm chat`: lines in and answers out, a terminal, what is remembered, and what is refused."""

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
from dlm_jax.cli import chat, chat_terminal
from dlm_jax.cli.chat import FORMATS
from dlm_jax.cli.conversation import Conversation
from dlm_jax.cli.live import MASK, LiveAnswer
from dlm_jax.cli.main import main
from dlm_jax.data.config import ExampleConfig
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.sampling import SamplerConfig, Snapshot

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
def run(monkeypatch, lm):
    """Runs the command on some input, with the model that is loaded already."""
    def run(given: str | bytes, *argv: str, lm: DiffusionLM = lm) -> int:
        given = given.encode() if isinstance(given, str) else given
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        monkeypatch.setattr(chat, "load_model", lambda arguments: lm)
        return main(["chat", "--model=x", *argv])

    return run


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def with_form(lm, **settings):
    recipe = {f"data.examples.{name}": value for name, value in settings.items()}
    return DiffusionLM(dataclasses.replace(lm.pretrained, recipe=recipe))


def talk_of(lm, **settings):
    return Conversation(lm, lm.prompt_format(), SamplerConfig(num_steps=3),
                        **{"max_new_tokens": 5, "seed": 0} | settings)


def test_the_formats_are_those_of_examples():
    known = typing.get_args(typing.get_type_hints(ExampleConfig)["format"])
    assert set(FORMATS) == set(known) - {"none"}


def test_each_line_is_a_turn_of_one_conversation(capsys, run, lm):
    assert run("Tom?\n\n  \nBen\n", *FLAGS, "--seed=3") == 0
    first, = lm.respond([user("Tom?")], seed=3, **SHORT)
    second, = lm.respond([user("Tom?"), assistant(first), user("Ben")], seed=3, example_index=[1], **SHORT)
    assert capsys.readouterr() == (f"{first}\n{second}\n", "")
    assert run("Tom?\nBen", *FLAGS, "--seed=3", "--stream") == 0  # no terminal here, so nothing is drawn
    assert capsys.readouterr() == (f"{first}\n{second}\n", "")


def test_a_question_asked_again_has_another_answer_and_a_seed_its_own_session(lm):
    single = with_form(lm, format="prompt_response")
    sessions = []
    for seed in (0, 0, 1):
        talk = talk_of(single, seed=seed)
        sessions.append([talk.ask("Tom?").text for _ in range(3)])
    assert sessions[0] == sessions[1] != sessions[2] and len(set(sessions[0])) > 1
    talk.reset_seed(0)
    assert talk.ask("Tom?").text == sessions[0][0]  # a single question stands on its own


def test_the_oldest_exchanges_are_forgotten_when_they_no_longer_fit(capsys, run, lm, monkeypatch):
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
    told = re.findall(r"the oldest (exchange was|\d+ exchanges were) forgotten", err)
    told = sum(1 if words == "exchange was" else int(words.split()[0]) for words in told)
    assert told == len(asked) - 1 - (len(asked[-1]) - 2) // 2 > 0


def test_a_model_of_single_questions_remembers_nothing(capsys, run, lm):
    single = with_form(lm, format="prompt_response", separator=">")
    assert run("Tom?\nTom?\n", *FLAGS, lm=single) == 0
    answers = [single.respond("Tom?", example_index=[i], **SHORT)[0] for i in range(2)]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_flags_say_how_to_ask_where_the_record_does_not(capsys, run, lm, tmp_path):
    bare = with_form(lm)
    bare.tokenizer.chat_template, kept = None, bare.tokenizer.chat_template
    try:
        assert run("Tom?\n", lm=bare) == 1
        error = capsys.readouterr().err
        assert "--format" in error and "--chat_template" in error and error.count("\n") == 1
        assert run("Tom?\n", *FLAGS, "--format=prompt_response", "--separator=>", lm=bare) == 0
        given = with_form(lm, format="prompt_response", separator=">")
        assert capsys.readouterr().out == given.respond("Tom?", **SHORT)[0] + "\n"
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        assert run("Tom?\n", *FLAGS, f"--chat_template={tmp_path / 'chat.jinja'}", lm=bare) == 0
    finally:
        bare.tokenizer.chat_template = kept
    assert capsys.readouterr().out == lm.respond("Tom?", **SHORT)[0] + "\n"


def test_a_run_that_learnt_left_to_right_is_asked_so(capsys, run, lm):
    recipe = lm.pretrained.recipe | {"objective.name": "autoregressive"}
    parent = DiffusionLM(dataclasses.replace(lm.pretrained, recipe=recipe, diffusion=dataclasses.replace(lm.pretrained.diffusion, mask_token_id=None)))
    assert run("Tom?\n", "--max_new_tokens=5", lm=parent) == 0
    assert capsys.readouterr().out == parent.respond("Tom?", max_new_tokens=5, policy="autoregressive")[0] + "\n"


@pytest.mark.parametrize(("arguments", "says"), [
    (("--max_new_tokens=0",), "--max_new_tokens"), (("--seed=-1",), "--seed"), (("--policy=best",), "best"),
    (("--remask=2",), "remask")])
def test_what_is_wrong_is_said_before_a_model_is_loaded(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(chat, "load_model", lambda arguments: pytest.fail("the model was loaded"))
    assert main(["chat", "--model=x", *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(("given", "arguments", "says"), [
    ("Tom " * 20, (), "and the model takes at most 32; ask in fewer words, or lower --max_new_tokens"),
    ("Tom", ("--max_new_tokens=32",), "at most 32"),
    (b"\xff\n", (), "standard input is not UTF-8"),
    ("Tom", ("--separator=x",), "messages have no separator"),
    ("Tom", ("--format=alpaca", "--system=x"), "a system text is for messages, and this model is asked as alpaca"),
    ("Tom", ("--format=alpaca", "--chat_template=x"), "a chat template is for messages, and the format is alpaca"),
    ("Tom", ("--chat_template=no/file",), "the chat template no/file cannot be read"),
])
def test_what_cannot_be_asked_is_one_sentence(capsys, run, given, arguments, says):
    assert run(given, *arguments) == 1
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out


def test_without_a_mask_token_nothing_is_denoised(capsys, run, lm):
    bare = DiffusionLM(dataclasses.replace(lm.pretrained, diffusion=dataclasses.replace(lm.pretrained.diffusion, mask_token_id=None)))
    assert run("Tom", lm=bare) == 1
    assert "records no mask token; name one with --mask_token" in capsys.readouterr().err


def test_live_shows_the_answer_alone_and_nothing_behind_its_end(capsys, monkeypatch, lm):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    prompt, said = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The cat", " sat on"))
    end = lm.tokenizer.eos_token_id
    tokens = np.array([[*prompt, *said, end, *prompt, 0, 0]])
    lengths, places = np.array([tokens.shape[1] - 2]), np.arange(tokens.shape[1])
    live = LiveAnswer(lm.tokenizer, [end])
    for step, masked in enumerate((places >= len(prompt), places == len(prompt))):
        live(Snapshot(step, np.zeros(1, int), lengths, tokens, masked[None], np.zeros(tokens.shape)))
    shown = [frame.split("\n")[1] for frame in capsys.readouterr().out.split("\x1b[J")[1:]]
    assert shown == [MASK * (lengths[0] - len(prompt)), MASK + lm.tokenizer.decode(said[1:])]


def test_what_can_be_typed_in_a_terminal(capsys, monkeypatch, lm):
    """The lines are a script; the real thing is below."""
    talk, script, asked = talk_of(lm), [], []

    def type_line(prompt):
        line = script.pop(0)
        if isinstance(line, type):
            raise line
        return line

    ask = Conversation.ask

    def answer(self, text, on_step):
        if text == "slow":
            def on_step(snapshot):
                raise KeyboardInterrupt
        asked.append(text)
        return ask(self, text, on_step)

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(Conversation, "ask", answer)
    script += ["Tom?", " ", KeyboardInterrupt, "slow", "/system Hm", "/rset", "/seed x", "/seed -1", "/seed 7",
               "/reset", "/reset now", "/help", "Tom? " * 20, "Ben", "/system", "/exit", "never"]
    chat_terminal.talk(talk, stream=False)
    out, err = capsys.readouterr()
    assert script == ["never"] and asked == ["Tom?", "slow", "Tom? " * 19 + "Tom?", "Ben"]
    first, = lm.respond([user("Tom?")], **SHORT)
    last, = lm.respond([{"role": "system", "content": "Hm"}, user("Ben")], seed=7, **SHORT)
    assert out.startswith(f"talker, asked as messages; /help for help\n{first}\n") and out.endswith(f"{last}\n")
    assert all(f"\n{command} " in out for command in chat_terminal.COMMANDS)
    for sentence in ("there is no command /rset (did you mean /reset?)", "/seed takes a number, not 'x'",
                     "/seed must lie between 0", "/reset stands alone", "ask in fewer words"):
        assert err.count(sentence) == 1
    with pytest.raises(ConfigError, match="a system text is for messages"):
        talk_of(with_form(lm, format="gsm8k"), system="Hm")
    with pytest.raises(DataError, match="at most 32"):
        talk.ask("Tom? " * 20, None)


# Whoever begins a session and then opens a terminal has it for his own: Ctrl-C typed there reaches him,
# and is heeded, which what a shell runs in the background would not do otherwise.
IN_A_TERMINAL = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.execv(sys.executable, [sys.executable, "-m", "dlm_jax.cli.main", *sys.argv[2:]])"""


def test_in_a_real_terminal(model):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", IN_A_TERMINAL, os.ttyname(slave), "chat", f"--model={model}",
                              *FLAGS, "--stream"], start_new_session=True,
                             env=os.environ | {"TERM": "xterm", "XLA_FLAGS": ""})

    def shown_until(mark: str) -> str:
        shown, limit = b"", time.monotonic() + 120
        while not shown.endswith(mark.encode()):
            assert select.select([master], [], [], max(limit - time.monotonic(), 0))[0], shown
            shown += os.read(master, 1 << 16)
        return shown.decode()

    def typed(keys: str, mark: str = "> ") -> str:
        os.write(master, keys.encode())
        return shown_until(mark)

    try:
        assert "talker, asked as messages" in shown_until("> ")
        answers = [typed("Tom?\n")]
        assert "step 0\r\n" + 5 * MASK in answers[0] and "step 3" in answers[0]
        typed("half a line", mark="half a line")
        time.sleep(0.5)  # until it waits for the next key again
        assert "Traceback" not in typed("\x03")
        typed("/reset\n")
        typed("/seed 0\n")
        answers.append(typed("Tom?\n"))
        assert answers[0].rpartition("\x1b[J")[2] == answers[1].rpartition("\x1b[J")[2]  # what is left of it
        os.write(master, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)
        os.close(slave)
