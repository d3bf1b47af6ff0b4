"""Real runs of the field's harness on tasks that ask for texts; its cache, and chat templates."""

import pathlib

import pytest
from lm_eval.api.instance import Instance

from dlm_jax import DiffusionLM
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.lm_eval import HarnessLM
from dlm_jax.evaluation.make_eval_model import make_eval_model
from tests.evaluation.lm_eval_tasks import SUMS, Scripted, by_hand, evaluate

SHIPPED = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def lm():
    return DiffusionLM.from_pretrained(SHIPPED, mask_token=4000)


def test_answers_that_are_written(harness_folder):
    model = Scripted({"one and one": "It is #### 2\nAnd #### 3", "two and two": "#### 5 END#### 4"}, max_length=64)
    lm = HarnessLM(model.eval_model, num_steps=9)
    results = evaluate(lm, harness_folder, "sums")
    assert results["results"]["sums"]["exact_match,number"] == 0.5
    assert [sample["resps"] for sample in results["samples"]["sums"]] == [[["It is #### 2"]], [["#### 5 "]]]
    requests, = model.requests
    assert [(request.before, request.after, request.lengths) for request in requests] == [
        ("one and one", "", range(7, 8)), ("two and two", "", range(7, 8))]
    assert model.calls == [{"temperature": 0.0, "num_steps": 9}] and lm.shortened == {}


def test_repetitions_are_drawn_apart_and_long_texts_are_shortened(harness_folder):
    model = Scripted({row["q"]: "x" for row in SUMS}, max_length=64)
    lm = HarnessLM(model.eval_model)
    evaluate(lm, harness_folder, "drawn")
    requests, = model.requests
    assert len({request.item for request in requests}) == len(requests) == 6
    assert {request.lengths for request in requests} == {range(32, 33)} and lm.shortened == {"drawn": (256, 32)}
    assert model.calls == [{"temperature": 0.7, "num_steps": None}]
    evaluate(HarnessLM(model.eval_model, max_gen_toks=5), harness_folder, "drawn")
    assert {request.lengths for request in model.requests[1]} == {range(5, 6)}


def test_what_a_task_may_ask_of_writing():
    def ask(**settings):
        model = Scripted({"": "some words here"})
        text, = HarnessLM(model.eval_model).generate_until(by_hand("generate_until", ("", settings)))
        return text, model.requests[0][0].lengths[-1], model.calls[0]["temperature"]

    assert ask() == ("some words here", 256, 0.0)
    assert ask(until=" here", max_new_tokens=3, temperature=0.5) == ("some words", 3, 0.5)
    assert ask(until=["here", "words", ""], temperature=0.5, do_sample=False, top_k=3) == ("some ", 256, 0.0)
    assert ask(until=None, do_sample=True, num_beams=1, top_p=1.0) == ("some words here", 256, 1.0)
    with pytest.raises(ConfigError, match="top_p=0.9"):
        ask(do_sample=True, top_p=0.9)
    with pytest.raises(ConfigError, match="num_beams=4"):
        ask(num_beams=4)
    with pytest.raises(DataError, match="max_gen_toks"):
        ask(max_gen_toks=0)


@pytest.mark.parametrize("autoregressive", [True, False])
def test_a_model_of_ours_writes(harness_folder, lm, autoregressive):
    eval_model = make_eval_model(lm.pretrained, "ours", autoregressive=autoregressive)
    harness = HarnessLM(eval_model, num_steps=4)
    long = "Once upon a time there was a girl. " * 60  # more than a row, of which the end is what counts
    arguments = [(text, {"until": ["."], "max_gen_toks": 8}) for text in ("Tom and Sue", long, long[35:])]
    found = harness.generate_until(by_hand("generate_until", *arguments))
    assert found[1] == found[2] and all("." not in text for text in found) and found[0] != found[1]
    together = [Instance("generate_until", {}, one, 0, ("a", n, 1)) for n, one in enumerate(arguments)]
    assert harness.generate_until(together[::-1])[::-1] == found  # the most likely tokens: no noise


def test_answers_are_kept_in_the_harness_s_cache(harness_folder, tmp_path):
    model = Scripted({row["q"]: "#### 2" for row in SUMS})
    cache = str(tmp_path / "answers")
    tasks = ("choice", "text", "last_word", "sums")
    first = evaluate(HarnessLM(model.eval_model), harness_folder, *tasks, use_cache=cache)
    asked = len(model.pairs), len(model.requests)
    again = evaluate(HarnessLM(model.eval_model), harness_folder, *tasks, use_cache=cache)
    assert (len(model.pairs), len(model.requests)) == asked and again["results"] == first["results"]


def test_chat_templates(harness_folder, lm):
    tokenizer = DiffusionLM.from_pretrained(SHIPPED).tokenizer
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<bot>{% endif %}")
    model = Scripted({f"<user>{row['q']}<bot>": "#### 4" for row in SUMS})
    with_template = HarnessLM(model.eval_model, tokenizer=tokenizer)
    found = evaluate(with_template, harness_folder, "sums", apply_chat_template=True)
    assert found["results"]["sums"]["exact_match,number"] == 0.5
    assert with_template.chat_template(True) == tokenizer.chat_template and with_template.chat_template() == ""
    assert "/" not in with_template.tokenizer_name
    for tokenizer in (None, lm.tokenizer):
        with pytest.raises(ConfigError, match="scripted"):
            evaluate(HarnessLM(model.eval_model, tokenizer=tokenizer), harness_folder, "sums", apply_chat_template=True)
