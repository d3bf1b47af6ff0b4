"""The protocol `reference`: what the scripts of the DiffuLLaMA implementation ask, for comparison with its paper.

Its tasks are called diffullama_hellaswag, diffullama_gsm8k, ... (arXiv 2410.17891). What they do otherwise:

  prompts       HellaSwag's endings have no space before them, PIQA's two; WinoGrande scores the option and the rest of
                the sentence without a space between them; SQuAD's prompt says "Quesion"; the prompts of questions end
                with a space
  tokens        prompt and option are tokenized separately; a tokenizer with BOS adds one before each option of
                HellaSwag and PIQA, which is then scored; without BOS position 0 holds the prompt's first token
  scores        the unweighted mean cross-entropy of T = 32 maskings, with noise of its own for each option
                (`scoring.reference_masks`)
  generation    as many tokens as the solution has; 256 with the prompt for GSM8K; temperature 1 (SQuAD, TriviaQA,
                LAMBADA), 0.95 or for LLaMA 0.9 (ROCStories, HumanEval), 0 (GSM8K)
  parents       the sum of log-probabilities for PIQA and SIQA, their mean for HellaSwag and WinoGrande, where a space
                follows the option; as many tokens in a gap as the solution has characters; for HumanEval's gaps the
                prompt asks for "the middle code"
  items         the first 2000 of SQuAD, the first 1000 of ROCStories; for HumanEval none with more than 1000 tokens
                (skipped for the parent as well, so that both answer the same items)

Differences from the scripts: generation uses our confidence policy, which ranks masked positions only and so reveals as
many as scheduled. `eval-diffugpt.py` in one run keeps LAMBADA's settings for the tasks after it (T = 1 for multiple
choice and gaps); `--num_masks=1` reproduces this for multiple choice only. Two things could not be verified: how its
LAMBADA prompt ends, and how the parent generates under it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.metrics import mean
from lm_eval.utils import apply_template

from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair, fit_context
from dlm_jax.evaluation.lm_eval import LmEvalAdapter, halves_of
from dlm_jax.evaluation.metrics import contains, first_sentence, token_f1
from dlm_jax.evaluation.own_tasks import Doc, GapTask, OwnTask

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_ROW = 256  # tokens of a row in the scripts' GSM8K; no solution of another task is longer


class ReferenceTask(OwnTask):
    """A task of the scripts. Options: `limit`, how many items are used; `max_tokens`, which no item may exceed.

    Attributes:
      eval_models: those whose tokens count for `max_tokens`.
    """

    eval_models: Sequence[EvalModel] = ()

    def test_docs(self) -> Any:
        docs = super().test_docs()
        most = self.options.get("max_tokens")
        if most is not None:
            docs = docs.filter(lambda doc: all(
                sum(len(one.encode(text)) for text in (doc["prompt"], doc["canonical_solution"], doc["suffix"])) <= most
                for one in self.eval_models))
            if not len(docs):
                raise DataError(f"all items of {self.task_name} have more than {most} tokens, which the reference "
                                "scripts skip; use more items")
        limit = self.options.get("limit")
        return docs if limit is None else docs.select(range(min(limit, len(docs))))


class ReferenceChoice(ReferenceTask):
    """A choice by the lowest score. Options: `bos`, `normalized` and `parent_choices` as the module says."""

    generates = False

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> "list[Instance]":
        choices = self.doc_to_choice(doc)
        of_parent = choices
        if "parent_choices" in self.options:
            of_parent = apply_template(self.options["parent_choices"], doc).split("\x1f")
        return [self._request("reference_score", doc, (ctx, one, other, self.options), metadata, number)
                for number, (one, other) in enumerate(zip(choices, of_parent, strict=True))]

    def process_results(self, doc: Doc, results: Sequence[float]) -> dict[str, float]:
        return {"acc": float(min(range(len(results)), key=results.__getitem__) == self.doc_to_target(doc))}

    def aggregation(self) -> dict[str, Callable]:
        return {"acc": mean}


class ReferenceGeneration(ReferenceTask):
    """A text of as many tokens as the longest answer has, or, if it `fills_row`, as many as `_ROW` with the prompt.

    Options: `answers`, a template of texts with line breaks between them; `metrics`; `num_steps`; `temperature`.
    """

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> "Instance":
        return self._request("reference_generate", doc, (ctx, self._answers(doc), self.options), metadata)

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, float]:
        return {name: _METRICS[name](results[0], self._answers(doc)) for name in self.options["metrics"]}

    def aggregation(self) -> dict[str, Callable]:
        return dict.fromkeys(self.options["metrics"], mean)

    def _answers(self, doc: Doc) -> list[str]:
        return apply_template(self.options["answers"], doc).split("\n")


class ReferenceInfilling(ReferenceTask, GapTask):
    """A gap of the solution's length. Options besides those of `GapTask`: `num_steps`, `parent_prompt`."""

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> "Instance":
        parent = apply_template(self.options["parent_prompt"], doc) if "parent_prompt" in self.options else ctx
        return self._request("reference_infill", doc, (ctx, self.suffix_of(doc), parent, str(self.doc_to_target(doc)),
                                                       self.options), metadata)

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, float]:
        return self.judge_gap(doc, results[0])


class ReferenceAdapter(LmEvalAdapter):
    """Answers the requests of the tasks above, with an `EvalModel` that was made for the protocol."""

    def reference_score(self, requests: "Sequence[Instance]") -> list[float]:
        """Returns the score of each (context, option, option for a parent, options of the task): smaller is better."""
        model = self.eval_model
        special = model.encode_special or model.encode

        def answer(questions: Sequence) -> list[float]:
            pairs, sizes = [], []
            for question in questions:
                for number, place in enumerate(question.places):
                    context, option, of_parent, options = requests[place].args
                    text = of_parent if model.autoregressive else option
                    tokens = (special if options.get("bos") else model.encode)(text)
                    where = f"{question.task}, item {question.document}, option {number}"
                    context = fit_context(special(context), tokens, model, where)
                    pairs.append(Pair(context, tuple(tokens), question.noise, number))
                    sizes.append(len(tokens) if model.autoregressive and options.get("normalized") else 1)
            scores = halves_of(model.score(pairs)).mean(axis=1).tolist()
            return [score / size for score, size in zip(scores, sizes, strict=True)]

        return self._run("reference_score", requests, answer)

    def reference_generate(self, requests: "Sequence[Instance]") -> list[str]:
        """Returns the text after each (prompt, answers, options of the task)."""
        model = self.eval_model

        def ask(prompt: str, answers: Sequence[str], options: dict[str, Any], noise: int) -> GenerationRequest:
            if options.get("fills_row"):
                count = _ROW - len((model.encode_special or model.encode)(prompt))
            else:
                count = max(len(model.encode(one)) for one in answers)
            return GenerationRequest(prompt, "", range(max(count, 1), max(count, 1) + 1), noise)

        return self._texts("reference_generate", requests, ask)

    def reference_infill(self, requests: "Sequence[Instance]") -> list[str]:
        """Returns the gap of each (before, after, prompt for a parent, solution, options of the task)."""
        left_to_right = self.eval_model.autoregressive

        def ask(before: str, after: str, parent: str, solution: str, options: dict, noise: int) -> GenerationRequest:
            count = max(len(solution) if left_to_right else len(self.eval_model.encode(solution)), 1)
            return GenerationRequest(parent if left_to_right else before, "" if left_to_right else after,
                                     range(count, count + 1), noise)

        return self._texts("reference_infill", requests, ask)

    def _texts(self, kind: str, requests: "Sequence[Instance]", ask: Callable[..., GenerationRequest]) -> list[str]:
        self._check("generate", requests)

        def answer(questions: Sequence) -> list[str]:
            asked = [(requests[place].args, question.noise) for question in questions for place in question.places]
            options = asked[0][0][-1]
            temperature = options["temperature"]
            if temperature == "family":
                temperature = self.eval_model.reference_temperature
            texts = self.eval_model.generate(
                [ask(*arguments, noise) for arguments, noise in asked], num_steps=options.get("num_steps", _ROW),
                temperature=0.0 if self.eval_model.autoregressive else float(temperature))
            if kind == "reference_infill" and self.eval_model.autoregressive and options["judge"] == "rouge":
                texts = [first_sentence(text) for text in texts]
            return list(texts)

        return self._run(kind, requests, answer)


def stripped_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether it is one of the answers, ignoring spaces at both ends."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def marked_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the text after `####` equals that of the solution without commas."""
    after = [text.partition("####")[2].replace(",", "").strip() for text in (prediction, *answers)]
    return float(after[0] in after[1:])


_METRICS = {"contains": contains, "f1": token_f1, "stripped_match": stripped_match, "marked_match": marked_match}
