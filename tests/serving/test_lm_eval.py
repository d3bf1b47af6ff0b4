"""lm-eval's client of OpenAI's protocol, asking the server, gives what our own evaluation gives."""

import dataclasses
from collections.abc import Iterator

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from dlm_jax import DiffusionLM
from dlm_jax.diffusion import BlockSpec
from dlm_jax.evaluation.lm_eval import LmEvalAdapter
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.sampling import SamplerConfig
from dlm_jax.serving.engine import Engine
from tests.evaluation.conftest import SHIPPED, harness_folder, lm  # noqa: F401
from tests.evaluation.lm_eval_tasks import by_hand, evaluate
from tests.serving.conftest import serving

pytest.importorskip("tenacity")  # of lm-eval's extra `api`


@pytest.fixture(scope="module")
def lms(lm: DiffusionLM) -> dict[str, DiffusionLM]:  # noqa: F811
    """The same weights as a parent, as a model of entire rows and as one with blocks."""
    def with_diffusion(**changes) -> DiffusionLM:
        diffusion = dataclasses.replace(lm.pretrained.diffusion, **changes)
        return DiffusionLM(dataclasses.replace(lm.pretrained, diffusion=diffusion))

    return {"parent": with_diffusion(mask_token_id=None), "full": lm, "blocks": with_diffusion(blocks=BlockSpec(4))}


@pytest.fixture(scope="module")
def served(lms) -> Iterator[str]:
    engine = Engine(lms, max_batch=1)
    engine.start()
    with serving(engine) as where:
        yield where
    engine.stop(drain=False)


def ask(where: str, model: str, **settings) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(model=model, base_url=f"{where}/v1/completions", tokenizer=str(SHIPPED),
                               tokenizer_backend="huggingface", tokenized_requests=False, max_length=64, **settings)


def test_scores_are_those_of_our_evaluation(served, lms, harness_folder, monkeypatch):  # noqa: F811
    """Choices, log-likelihoods, what is greedy and perplexities of a parent, with prompts one by one and together."""
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    tasks = "choice", "last_word", "text"
    own = LmEvalAdapter(make_eval_model(lms["parent"].pretrained, "parent", autoregressive=True), is_greedy=True)
    expected = evaluate(own, harness_folder, *tasks)
    for settings in ({"batch_size": 4}, {"num_concurrent": 4}):
        found = evaluate(ask(served, "parent", **settings), harness_folder, *tasks)
        for task in tasks:
            for one, other in zip(found["samples"][task], expected["samples"][task], strict=True):
                assert one["doc_id"] == other["doc_id"]
                assert_close(one["filtered_resps"], other["filtered_resps"])
            numbers = {name: value for name, value in expected["results"][task].items() if isinstance(value, float)}
            assert numbers
            assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        (score, *greedy), (known, *known_greedy) = ((value if isinstance(value, (list, tuple)) else (value,))
                                                    for value in (one, other))
        assert score == pytest.approx(known, rel=1e-5) and greedy == known_greedy


@pytest.mark.parametrize(("model", "policy"), [("full", "confidence"), ("blocks", "threshold"),
                                               ("parent", "autoregressive")])
def test_texts_are_those_of_our_evaluation(served, lms, model, policy):
    requests = by_hand("generate_until", ("Once upon a time", {"until": ["."], "max_gen_toks": 12}),
                       ("Tom and Lily", {"until": ["\n", " the"], "max_gen_toks": 12}))
    own = make_eval_model(lms[model].pretrained, model, autoregressive=model == "parent",
                          sampler=SamplerConfig(policy))
    expected = LmEvalAdapter(own).generate_until(requests)
    assert ask(served, model, num_concurrent=2).generate_until(requests) == expected and all(expected)
