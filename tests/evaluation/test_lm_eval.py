"""Runs of lm-eval on local files: likelihoods and texts against the model's own."""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import BlockSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import EvalModel, Pair
from dlm_jax.evaluation.lm_eval import LmEvalAdapter
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.sampling.batching import SamplingStats
from tests.evaluation.lm_eval_tasks import SUMS, TEXTS, Scripted, by_hand, decode, encode, evaluate

pytestmark = pytest.mark.usefixtures("offline")


def with_blocks(pretrained, blocks):
    return dataclasses.replace(pretrained, diffusion=dataclasses.replace(pretrained.diffusion, blocks=blocks))


def test_multiple_choice_by_hand(harness_folder):
    model = Scripted()
    results = evaluate(LmEvalAdapter(model.eval_model), harness_folder, "choice")
    assert results["config"]["model"] == "scripted"
    assert results["results"]["choice"]["acc,none"] == pytest.approx(2 / 3)  # the shortest: 0, 0, 1; right: 0, 1, 1
    assert results["results"]["choice"]["acc_bytes,none"] == pytest.approx(1 / 3)  # sqrt(n) / n: the longest, 1, 1, 0
    asked, = model.pairs  # all in one call
    assert [(decode(pair.context), decode(pair.continuation)) for pair in asked[:2]] == [
        ("Q: The boy", " ran."), ("Q: The boy", " was red.")]
    sample = results["samples"]["choice"][1]
    assert [answer[0] for answer in sample["filtered_resps"]] == [-len(" sat.") ** 0.5, -len(" had fun.") ** 0.5]
    assert model.looked == []  # no metric needs it


def test_blocks_of_one_token_are_the_parent(lm):
    """Scores, texts in windows, greedy checks and generated texts."""
    requests = by_hand("loglikelihood", ("Once", " upon a time"), ("Tom", " ran home to his mum."))
    texts = by_hand("loglikelihood_rolling", ("Once upon a time there was a little girl. " * 4,), ("Sue sat.",))
    asked = by_hand("generate_until", ("Once upon", {"until": ["\n\n"], "max_gen_toks": 9}))
    parent = LmEvalAdapter(make_eval_model(lm.pretrained, "parent", autoregressive=True))
    blocks = LmEvalAdapter(make_eval_model(with_blocks(lm.pretrained, BlockSpec(1)), "blocks", num_samples=2))
    expected, found = parent.loglikelihood(requests), blocks.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert blocks.loglikelihood_rolling(texts) == pytest.approx(parent.loglikelihood_rolling(texts), rel=1e-5)
    assert blocks.generate_until(asked) == parent.generate_until(asked) != [""]


def test_options_share_noise(harness_folder):
    model = Scripted()
    evaluate(LmEvalAdapter(model.eval_model), harness_folder, "choice", "other_choice")
    both = [pair.item for pairs in model.pairs for pair in pairs]
    assert both[0::2] == both[1::2] and len(set(both)) == 6
    assert all(0 <= item < 2**32 for item in both)
    evaluate(LmEvalAdapter(model.eval_model), harness_folder, "other_choice", limit=2)
    assert [pair.item for pair in model.pairs.pop()] == both[6:10]
    lm = LmEvalAdapter(model.eval_model)
    lm.loglikelihood(by_hand("loglikelihood", ("a", " b"), ("a", " c"), ("d", " b"), ("a", " b")))
    one, two, three, again = (pair.item for pair in model.pairs.pop())
    assert one == two and len({one, three, again}) == 3  # a repetition has noise of its own


def test_bound_depends_on_its_request_alone(harness_folder, lm):
    arguments = [("Once", " upon a time there was a little girl who was very happy."), ("Tom", " ran home to his mum."),
                 ("Sue sat on the big red mat and", " Tom did not like it one bit, so he ran off.")]
    requests = [Instance("loglikelihood", {}, one, 0, ("made", number, 1)) for number, one in enumerate(arguments)]
    found = [LmEvalAdapter(make_eval_model(lm.pretrained, "ours", num_samples=5, batch_size=size), is_greedy=False)
             .loglikelihood(requests) for size in (16, 3)]
    alone = LmEvalAdapter(make_eval_model(lm.pretrained, "ours", num_samples=5),
                      is_greedy=False).loglikelihood(requests[2:])
    np.testing.assert_allclose([score for score, _ in found[0]], [score for score, _ in found[1]], rtol=1e-5)
    np.testing.assert_allclose(found[0][2][0], alone[0][0], rtol=1e-5)
    other = LmEvalAdapter(make_eval_model(lm.pretrained, "ours", num_samples=5, seed=1), is_greedy=False)
    assert abs(other.loglikelihood(requests)[2][0] - alone[0][0]) > 1e-3


def test_perplexities_by_hand(harness_folder):
    model = Scripted()
    found = evaluate(LmEvalAdapter(model.eval_model), harness_folder, "text")["results"]["text"]
    texts = [row["text"] for row in TEXTS]
    nats = sum(Scripted.cost(text) for text in texts)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nats / sum(len(text.split()) for text in texts)))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(nats / num_bytes))
    assert found["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2))


def test_rolling_windows():
    model = Scripted(max_length=5)
    lm = LmEvalAdapter(model.eval_model)
    text = "a b c d e f g h i"
    both = lm.loglikelihood_rolling(by_hand("loglikelihood_rolling", (text,), ("a b",)))
    pairs, = model.pairs
    windows = [(decode(pair.context), decode(pair.continuation)) for pair in pairs]
    assert windows == [("", "a b c d"), (" d", " e f g h"), (" e f g h", " i"), ("", "a b")]
    assert [pair.add_bos for pair in pairs] == [True, False, False, True]
    assert both == pytest.approx([-sum(Scripted.cost(text) for _, text in windows[:3]), -Scripted.cost("a b")])
    assert lm.loglikelihood_rolling(by_hand("loglikelihood_rolling", ("",))) == [0.0]
    LmEvalAdapter(Scripted(max_length=2).eval_model).loglikelihood_rolling(by_hand("loglikelihood_rolling", ("a b",)))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 150])
def test_rolling_likelihood_is_that_of_lm_evals_windows(lm, length):
    """From the logits of a parent, each window in a row of its own as lm-eval's own models take it."""
    tokens = np.random.default_rng(length).integers(1, 4000, length).tolist()
    eval_model = dataclasses.replace(make_eval_model(lm.pretrained, "parent", autoregressive=True),
                                     encode=lambda text: tokens)
    found, = LmEvalAdapter(eval_model).loglikelihood_rolling(by_hand("loglikelihood_rolling", ("x",)))
    expected = 0.0
    for context, scored in map(make_disjoint_window, get_rolling_token_windows(
            tokens, lm.tokenizer.bos_token_id, lm.config.max_length, 1)):
        row = [*context, *scored]
        logits = np.asarray(lm.logits(np.array([row[:-1]]), AttentionMask.causal()), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected += log_p[np.arange(len(row) - 1), row[1:]][len(context) - 1 :].sum()
    assert found == pytest.approx(expected, rel=1e-5)


def test_rolling_likelihood_against_scores(harness_folder, lm):
    eval_model = make_eval_model(lm.pretrained, "parent", autoregressive=True)
    texts = [row["text"] for row in TEXTS]
    nats = eval_model.score([Pair((), tuple(lm.tokenizer.encode(text))) for text in texts])
    found = evaluate(LmEvalAdapter(eval_model), harness_folder, "text")["results"]["text"]
    assert found["bits_per_byte,none"] == pytest.approx(
        sum(nats) / sum(len(text.encode()) for text in texts) / math.log(2), rel=1e-5)
    bound = LmEvalAdapter(make_eval_model(lm.pretrained, "ours", num_samples=4))
    assert bound.loglikelihood_rolling(by_hand("loglikelihood_rolling", (texts[0],)))[0] < 0


def test_long_context_is_cut_from_the_left():
    model = Scripted(max_length=5)
    lm = LmEvalAdapter(model.eval_model, is_greedy=False)
    lm.loglikelihood(by_hand("loglikelihood", ("a b c d", " e f"), ("", "a b")))
    assert [(decode(pair.context), decode(pair.continuation)) for pair in model.pairs[0]] == [
        (" c d", " e f"), ("", "a b")]
    tasks = [Instance("loglikelihood", {}, ("a", text), place, ("made", 7, 1))
             for place, text in enumerate([" b", " b c d e f"])]
    with pytest.raises(DataError, match="made, item 7, option 1"):
        lm.loglikelihood(tasks)
    with pytest.raises(DataError, match="option"):
        lm.loglikelihood(by_hand("loglikelihood", ("a", "")))


def test_is_greedy_where_metrics_need_it(harness_folder):
    model = Scripted()
    found = evaluate(LmEvalAdapter(model.eval_model), harness_folder, "last_word", "choice")["results"]
    assert found["last_word"]["acc,none"] == 0.5
    assert found["last_word"]["perplexity,none"] == pytest.approx(
        math.exp((Scripted.cost(" boy.") + Scripted.cost(" be.")) / 2))
    assert [decode(pair.continuation) for pair in model.looked[0]] == [" boy.", " be."]  # and no option
    asked = evaluate(LmEvalAdapter(model.eval_model, is_greedy=True), harness_folder, "last_word", "choice")
    assert sum(map(len, model.looked[1:])) == 8 and asked["results"]["last_word"]["acc,none"] == 0.5
    never = evaluate(LmEvalAdapter(model.eval_model, is_greedy=False), harness_folder, "last_word")["results"]
    assert sum(map(len, model.looked[1:])) == 8 and never["last_word"]["acc,none"] == 0.0


def test_missing_capability(harness_folder):
    with pytest.raises(ConfigError, match="mute.*sums"):
        evaluate(LmEvalAdapter(EvalModel("mute", encode, lambda pairs: [0.0] * len(pairs))), harness_folder, "sums")
    with pytest.raises(ConfigError, match="blind.*text"):
        evaluate(LmEvalAdapter(EvalModel("blind", encode)), harness_folder, "text")
    plain = EvalModel("plain", encode, lambda pairs: [1.0] * len(pairs))
    with pytest.raises(ConfigError, match="plain.*last_word"):
        evaluate(LmEvalAdapter(plain), harness_folder, "last_word")
    found = evaluate(LmEvalAdapter(plain, is_greedy=False), harness_folder, "last_word")["results"]["last_word"]
    assert found["perplexity,none"] == pytest.approx(math.e)
    with pytest.raises(ConfigError, match="max_gen_toks"):
        LmEvalAdapter(plain, max_gen_toks=0)


def test_lm_eval_is_optional():
    code = ("import sys, dlm_jax.evaluation, dlm_jax.evaluation.make_eval_model, "
            "dlm_jax.evaluation.report, dlm_jax.evaluation.generation_eval, dlm_jax.cli.evaluate\n"
            "assert not {'lm_eval', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_until(harness_folder):
    model = Scripted({"one and one": "It is #### 2\nAnd #### 3", "two and two": "#### 5 END#### 4"}, max_length=64)
    lm = LmEvalAdapter(model.eval_model, num_steps=9)
    results = evaluate(lm, harness_folder, "sums")
    assert results["results"]["sums"]["exact_match,number"] == 0.5
    assert [sample["resps"] for sample in results["samples"]["sums"]] == [[["It is #### 2"]], [["#### 5 "]]]
    requests, = model.requests
    assert [(request.before, request.after, request.lengths) for request in requests] == [
        ("one and one", "", range(7, 8)), ("two and two", "", range(7, 8))]
    assert model.calls == [{"temperature": 0.0, "num_steps": 9}] and lm.shortened == {}


def test_repetitions_and_shortened_texts(harness_folder):
    model = Scripted({row["q"]: "x" for row in SUMS}, max_length=64)
    lm = LmEvalAdapter(model.eval_model)
    evaluate(lm, harness_folder, "repeated")
    requests, = model.requests
    assert len({request.item for request in requests}) == len(requests) == 6
    assert {request.lengths for request in requests} == {range(32, 33)} and lm.shortened == {"repeated": (256, 32)}
    assert model.calls == [{"temperature": 0.7, "num_steps": None}]
    evaluate(LmEvalAdapter(model.eval_model, max_gen_toks=5), harness_folder, "repeated")
    assert {request.lengths for request in model.requests[1]} == {range(5, 6)}


def test_generation_kwargs():
    def ask(**settings):
        model = Scripted({"": "some words here"})
        text, = LmEvalAdapter(model.eval_model).generate_until(by_hand("generate_until", ("", settings)))
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
def test_generation_of_a_real_model(harness_folder, lm, autoregressive):
    eval_model = make_eval_model(lm.pretrained, "ours", autoregressive=autoregressive)
    harness = LmEvalAdapter(eval_model, num_steps=4)
    long = "Once upon a time there was a girl. " * 12  # more than a row; its end counts
    arguments = [(text, {"until": ["."], "max_gen_toks": 8}) for text in ("Tom and Sue", long, long[35:])]
    found = harness.generate_until(by_hand("generate_until", *arguments))
    assert found[1] == found[2] and all("." not in text for text in found) and found[0] != found[1]
    together = [Instance("generate_until", {}, one, 0, ("a", n, 1)) for n, one in enumerate(arguments)]
    assert harness.generate_until(together[::-1])[::-1] == found  # the most likely tokens: no noise


def test_request_cache(harness_folder, tmp_path):
    model = Scripted({row["q"]: "#### 2" for row in SUMS})
    cache = str(tmp_path / "answers")
    tasks = ("choice", "text", "last_word", "sums")
    first = evaluate(LmEvalAdapter(model.eval_model), harness_folder, *tasks, use_cache=cache)
    asked = len(model.pairs), len(model.requests)
    again = evaluate(LmEvalAdapter(model.eval_model), harness_folder, *tasks, use_cache=cache)
    assert (len(model.pairs), len(model.requests)) == asked and again["results"] == first["results"]


def test_chat_templates(harness_folder, lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<bot>{% endif %}")
    model = Scripted({f"<|endoftext|><user>{row['q']}<bot>": "#### 4" for row in SUMS})
    with_template = LmEvalAdapter(model.eval_model, tokenizer=tokenizer)
    found = evaluate(with_template, harness_folder, "sums", apply_chat_template=True)
    assert found["results"]["sums"]["exact_match,number"] == 0.5
    assert with_template.chat_template(True) == tokenizer.chat_template and with_template.chat_template() == ""
    assert "/" not in with_template.tokenizer_name
    for tokenizer in (None, lm.tokenizer):
        with pytest.raises(ConfigError, match="scripted"):
            evaluate(LmEvalAdapter(model.eval_model, tokenizer=tokenizer), harness_folder, "sums",
                     apply_chat_template=True)


def test_known_answers_are_not_asked_again(harness_folder):
    """A run that was stopped after its first answers; with other work, as many items as before."""
    tasks = ("choice", "text", "last_word", "sums")
    answers = {row["q"]: "#### 2" for row in SUMS}
    stored = {}
    first = evaluate(LmEvalAdapter(Scripted(answers).eval_model, store=stored.update), harness_folder, *tasks)
    half = dict(list(json.loads(json.dumps(stored)).items())[::2])
    model = Scripted(answers)
    again = evaluate(LmEvalAdapter(model.eval_model, known=half), harness_folder, *tasks)
    assert again["results"] == first["results"] and again["samples"] == first["samples"]
    whole = Scripted(answers)
    evaluate(LmEvalAdapter(whole.eval_model, known=json.loads(json.dumps(stored))), harness_folder, *tasks)
    assert not whole.pairs and not whole.requests and not whole.looked


def test_halves_and_costs(harness_folder):
    """A bound's halves are kept beside its mean; seconds and tokens are counted by task."""
    model = Scripted(stats=SamplingStats())

    def score(pairs):
        return np.array([[1.0 * len(pair.continuation), 3.0 * len(pair.continuation)] for pair in pairs])

    def generate(requests, **settings):
        model.eval_model.stats.tokens += 6 * len(requests)
        model.eval_model.stats.passes += 2 * len(requests)
        return [""] * len(requests)

    lm = LmEvalAdapter(dataclasses.replace(model.eval_model, score=score, generate=generate))
    samples = evaluate(lm, harness_folder, "choice", "text", "sums")["samples"]
    assert samples["choice"][0]["filtered_resps"][0][0] == -2.0 and lm.halves["choice", 0, 0] == (-1.0, -3.0)
    words = len(encode(TEXTS[0]["text"]))
    assert lm.halves["text", 0, 0] == (-words, -3.0 * words) and samples["text"][0]["resps"] == [[-2.0 * words]]
    assert (lm.costs["sums"].tokens, lm.costs["sums"].passes) == (12, 4)
    assert lm.costs["choice"].tokens == 0 and all(cost.seconds > 0 for cost in lm.costs.values())
