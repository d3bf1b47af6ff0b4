"""Tasks of lm-eval over local files, and a scripted model that keeps its requests."""

import json

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dlm_jax.evaluation.eval_model import EvalModel

WORDS = ["<bos>"]
CHOICES = [{"q": "Q: The boy", "options": ["ran.", "was red."], "gold": 0},
           {"q": "Q: The girl", "options": ["sat.", "had fun."], "gold": 1},
           {"q": "Q: A cat", "options": ["is big.", "ate."], "gold": 1}]
TEXTS = [{"text": "Once upon a time there was a boy."}, {"text": "The girl ran to the tree, happy as can be."}]
SUMS = [{"q": "one and one", "a": "2"}, {"q": "two and two", "a": "4"}]


def write_tasks(folder):
    """Tasks of each kind."""
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}]}
    write_task(folder, "choice", CHOICES, **choice)
    write_task(folder, "other_choice", CHOICES, **choice)
    write_task(folder, "text", TEXTS, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
               metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")])
    write_task(folder, "last_word", TEXTS, output_type="loglikelihood",
               doc_to_text="{{text.split(' ')[:-1]|join(' ')}}", doc_to_target="{{' '+text.split(' ')[-1]}}",
               metric_list=[{"metric": "perplexity"}, {"metric": "acc"}])
    write_task(folder, "sums", SUMS, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
               generation_kwargs={"until": ["\n", "END"], "max_gen_toks": 7, "do_sample": False, "top_p": 0.5},
               metric_list=[{"metric": "exact_match"}],
               filter_list=[{"name": "number", "filter": [
                   {"function": "regex", "regex_pattern": "#### (\\d+)"}, {"function": "take_first"}]}])
    write_task(folder, "repeated", SUMS, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
               generation_kwargs={"until": "\n", "do_sample": True, "temperature": 0.7}, repeats=3,
               metric_list=[{"metric": "exact_match"}])


def write_task(folder, name, rows, **config):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")},
        "test_split": "train", **config}))


def evaluate(lm, folder, *tasks, **settings):
    manager = TaskManager(include_path=folder, include_defaults=False)
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings)


def encode(text):
    """Returns a token per word, each with the space before it."""
    words = text.replace(" ", "\0 ").split("\0")
    for word in words:
        if word and word not in WORDS:
            WORDS.append(word)
    return [WORDS.index(word) for word in words if word]


def decode(tokens):
    return "".join(WORDS[token] for token in tokens)


class Scripted:
    """A model whose scores grow with the length of a text and whose answers are given; it keeps its requests."""

    def __init__(self, answers=None, **settings):
        self.pairs, self.requests, self.calls, self.looked = [], [], [], []
        self.answers = answers or {}
        self.eval_model = EvalModel("scripted", encode, self.score, self.generate, is_greedy=self.is_greedy, **settings)

    def score(self, pairs):
        self.pairs.append(list(pairs))
        return [self.cost(decode(pair.continuation)) for pair in pairs]

    def generate(self, requests, **settings):
        self.requests.append(list(requests))
        self.calls.append(settings)
        return [self.answers[request.before] for request in requests]

    def is_greedy(self, pairs):
        self.looked.append(list(pairs))
        return [decode(pair.continuation) == " boy." for pair in pairs]

    @staticmethod
    def cost(text):
        return len(text) ** 0.5


def by_hand(kind, *arguments):
    """Returns requests without a task."""
    return [Instance(kind, {}, one, 0) for one in arguments]
