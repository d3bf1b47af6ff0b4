"""An answer while it is computed: jobs of the engine, their updates, and the body or the chunks of the response."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dlm_jax.evaluation.likelihood import TokenLogProbs, token_log_probs
from dlm_jax.parallel import use_mesh
from dlm_jax.sampling.text import TokenTexts
from dlm_jax.serving.engine import Engine
from dlm_jax.serving.jobs import Choice, Plan, ServedModel
from dlm_jax.serving.protocol import Answer, ChatRequest, CompletionRequest, RequestError, TokenLogProb, Usage
from dlm_jax.serving.queue import Job, Ticket, Update
from dlm_jax.serving.steps import RowSteps
from dlm_jax.serving.text import RowText, finite

_ROWS_PER_PASS = 8  # of prompts that are scored: other requests wait for no more
_NUM_TOP = 5  # as many as a request may ask for, so that one program serves all


class Run:
    """The rows of one request, from the engine's acceptance to the complete answer. For one event loop.

    Args:
      echo: the log-probabilities of each choice's prompt, or None.
    """

    def __init__(self, model: ServedModel, request: CompletionRequest | ChatRequest, plan: Plan,
                 echo: Sequence[list[TokenLogProb] | None]):
        self._model, self.request, self._plan, self._echo = model, request, plan, echo
        self._answer = Answer(f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()),
                              model.name, plan.seed, request.is_chat)
        self._lists_gaps = not request.is_chat and bool(request.infill)
        # Of `top_logprobs` a sampled row has the token that was chosen; the others' are not known.
        self._texts = [RowText(choice.tokens, choice.text_format, model.texts, top=request.num_top > 0)
                       for choice in plan.choices]
        self._log_probs: list[list[TokenLogProb]] = [list(given or ()) for given in echo]
        self._steps = [RowSteps(choice.index, choice.tokens, model.texts, ends=choice.text_format.ends,
                                first=choice.text_format.gaps[0].start if request.is_chat else 0)
                       for choice in plan.choices] if request.stream_steps else None
        self._tickets: list[Ticket] = []
        self._is_cancelled = False
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for text in self._texts:
            if not text.has_gaps:
                text.update([], 0, is_last=True)

    def submit(self, engine: Engine) -> None:
        """Gives the rows to the engine, all of them or none; may be called in another thread.

        Errors are those of `Engine.submit`.
        """
        plan = self._plan
        if not self.is_complete:  # all rows have gaps, or none has
            jobs = [Job(model=self._model.name, row=choice.tokens, spec=plan.spec, seed=plan.seed,
                        example_index=choice.index, on_update=self._receiver(choice.index),
                        every_step=self._steps is not None) for choice in plan.choices]
            self._tickets = engine.submit(jobs)
            if self._is_cancelled:  # the client has left in the meantime
                self.cancel()

    def cancel(self) -> None:
        """Cancels what still runs, or has yet to be accepted."""
        self._is_cancelled = True
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def is_complete(self) -> bool:
        return all(text.finish_reason for text in self._texts)

    def next_update(self) -> Awaitable[tuple[int, Update]]:
        """Returns the number of a row and its next update."""
        return self._updates.get()

    def update(self, index: int, update: Update) -> list[dict[str, Any]]:
        """Applies an update of the engine; returns the chunks that it adds to a stream."""
        text = self._texts[index]
        if text.finish_reason:  # its end was found before the engine knew
            return []
        delta = text.update(update.changes, update.step, is_last=update.is_last)
        self._log_probs[index] += delta.log_probs
        if text.finish_reason:
            self._tickets[index].cancel()
        fields = {} if self._steps is None else {"step": self._steps[index].update(update.changes, update.step)}
        if not (delta.text or delta.log_probs or text.finish_reason or fields):
            return []
        log_probs = delta.log_probs if self.request.shows_log_probs else None
        choice = self._answer.delta(index, delta.text, text.finish_reason, log_probs)
        if text.finish_reason and self._lists_gaps:
            choice["gaps"] = text.gap_texts
        return [self._chunk([choice], **fields)]

    def first_chunks(self) -> list[dict[str, Any]]:
        """Returns the chunks before the first update: the role, an echo, the text before a gap, and step 0."""
        chunks = []
        is_chat = self.request.is_chat
        for choice, text, echo in zip(self._plan.choices, self._texts, self._echo, strict=True):
            fields = {} if self._steps is None else {"step": self._steps[choice.index].start()}
            first = choice.echo + text.text
            if is_chat or first or echo or text.finish_reason or fields:
                log_probs = (echo or []) if self.request.shows_log_probs and not is_chat else None
                delta = self._answer.delta(choice.index, first, text.finish_reason, log_probs, is_first=True)
                chunks.append(self._chunk([delta], **fields))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        return self._answer.body([], stream=True, usage=self.usage.body())

    def body(self) -> dict[str, Any]:
        """Returns the complete answer."""
        choices = [self._answer.choice(
            choice.index, choice.echo + text.text, text.finish_reason,
            log_probs if self.request.shows_log_probs else None,
            **{"gaps": text.gap_texts} if self._lists_gaps else {})
            for choice, text, log_probs in zip(self._plan.choices, self._texts, self._log_probs, strict=True)]
        return self._answer.body(choices, stream=False, usage=self.usage.body())

    @property
    def usage(self) -> Usage:
        return Usage(self._plan.prompt_tokens, sum(text.num_tokens for text in self._texts),
                     sum(text.num_passes for text in self._texts))

    def _chunk(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        if self.request.include_usage:
            fields["usage"] = None
        return self._answer.body(choices, stream=True, **fields)

    def _receiver(self, index: int) -> Callable[[Update], None]:
        def receive(update: Update) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return receive


async def prompt_log_probs(engine: Engine, model: ServedModel, plan: Plan, num_top: int,
                           wait: Callable[[Awaitable[Any]], Awaitable[Any]]) -> list[list[TokenLogProb]]:
    """Returns the log-probabilities of each choice's prompt under causal attention.

    Args:
      wait: waits for a result as long as the request may.

    Raises:
      RequestError: the model is not sampled from left to right, so that it has none.
    """
    if plan.spec.config.policy != "autoregressive":
        raise RequestError("a prompt has logprobs where each token is predicted from those before it, and the policy "
                           f"{plan.spec.config.policy} does not do so; set policy to autoregressive, or omit echo",
                           param="echo")
    found: list[list[TokenLogProb]] = []
    for start in range(0, len(plan.prompts), _ROWS_PER_PASS):
        batch = plan.prompts[start : start + _ROWS_PER_PASS]
        scores = await wait(asyncio.wrap_future(engine.call(lambda batch=batch: _score(model, batch))))
        found += [_entries(model.texts, choice, score, num_top) for choice, score in zip(batch, scores, strict=True)]
    return [found[number // plan.per_prompt] for number in range(len(plan.choices))]


def _score(model: ServedModel, batch: Sequence[Choice]) -> list[TokenLogProbs]:
    with use_mesh(model.lm.mesh):
        return token_log_probs(model.lm.model, [choice.given for choice in batch], _NUM_TOP)


def _entries(texts: TokenTexts, choice: Choice, scores: TokenLogProbs, num_top: int) -> list[TokenLogProb]:
    """Returns the entries of a prompt's own tokens, the first of them without a value."""
    entries, offset, first = [], 0, len(choice.given) - len(choice.prompt)
    for number, token in enumerate(choice.prompt):
        text, at = texts.text(token), first + number
        top = tuple((texts.text(int(other)), finite(value)) for other, value in zip(
            scores.top_tokens[at, :num_top], scores.top_log_probs[at, :num_top], strict=True))
        log_prob = finite(scores.log_probs[at])
        if num_top and log_prob not in [value for _, value in top]:
            top = (*top, (text, log_prob))  # the token itself is always among them
        entries.append(TokenLogProb(text, None if number == 0 else log_prob, top if number and num_top else None,
                                    offset))
        offset += len(text)
    return entries
