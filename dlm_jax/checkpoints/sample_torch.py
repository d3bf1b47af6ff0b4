"""Samples the model beside this file as a diffusion language model, with PyTorch and transformers 5 alone.

    python sample_torch.py --prompt "Once upon a time" --length 64 --num_steps 32

`AutoModelForCausalLM` attends causally, so the model is called with an explicit mask that lets every position
see every other. The input is the prompt, masked positions, and a suffix if given; each step
fills some of the masked positions, until all are filled. `--temperature 0` takes the most probable tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def load_model(directory: str | Path) -> torch.nn.Module:
    """Loads the exported model with an attention implementation that accepts any mask."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SystemExit("this needs transformers 5: earlier versions attend causally whatever mask they are given")
    kind = AutoConfig.from_pretrained(directory).model_type
    attention = "eager" if kind == "gemma2" else "sdpa"  # its soft cap
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()


def bidirectional_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns logits [batch, length, vocab] of tokens [batch, length]; every position sees every other."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    distance = (positions[:, None] - positions[None, :]).abs()

    def within(window: int | None) -> torch.Tensor:
        mask = torch.zeros(distance.shape, dtype=model.dtype, device=tokens.device)
        mask = mask.masked_fill(distance >= (window or tokens.shape[1]), torch.finfo(model.dtype).min)
        return mask.expand(len(tokens), 1, -1, -1)

    mask = within(getattr(model.config, "sliding_window", None))
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1:  # only some layers have the window
        mask = {"full_attention": within(None), "sliding_attention": mask}
    return model(tokens, attention_mask=mask, use_cache=False).logits.float()


def missing_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of the vocabulary that no token has, such as rows that pad an embedding: they have no text."""
    return sorted(set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values()))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int, suffix: str,
           start: int) -> tuple[list[int], list[bool]]:
    """Returns a row of tokens with a gap, and which of them are fixed; `start` is the token of position 0.

    Special tokens are read only in what a chat template has written: a text that starts with one other than the mask.
    """
    special = tuple(token for token in tokenizer.all_special_tokens if token != tokenizer.mask_token)
    rendered = prompt.startswith(special)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not rendered)

    prefix, anchor, inner = ids(prompt.removesuffix(" ")), ids("\n"), ids("\n" + suffix)
    if not rendered or (prefix[:1] != [start] and start == tokenizer.bos_token_id):  # a template writes its own start
        prefix = [start, *prefix]
    # Without the space that SentencePiece puts at a start.
    inner = inner[len(anchor) :] if suffix and inner[: len(anchor)] == anchor else ids(suffix)
    return prefix + [0] * length + inner, [True] * len(prefix) + [False] * length + [True] * len(inner)


def choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """Samples tokens [...] from logits [..., vocab], by temperature, within the top_p most probable mass."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / temperature, -1).sort(dim=-1, descending=True)
    # Keep the token that crosses top_p: drop those before which the mass is already reached.
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    sampled = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return order.gather(-1, sampled.view(*order.shape[:-1], 1)).squeeze(-1)


@torch.no_grad()
def sample(model: torch.nn.Module, tokens: torch.Tensor, fixed: torch.Tensor, *, policy: str = "confidence",
           num_steps: int = 64, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
           missing: Sequence[int] = ()) -> torch.Tensor:
    """Fills the positions of `tokens` [batch, length] that are not `fixed` (bool, same shape); position 0 is context.

    The policy "random" reveals each masked token at a uniformly random step; "confidence" reveals equally many at each
    step, those whose sampled token is the most probable. The ids `missing` are never sampled.
    """
    settings = model.config.dlm_jax
    generator = torch.Generator(tokens.device).manual_seed(seed)
    masked = ~fixed
    masked[:, 0] = False
    total = masked.sum(1)
    steps = total.clamp(1, num_steps)
    tokens = tokens.masked_fill(masked, settings["mask_token_id"])
    for step in range(num_steps):
        if not masked.any():
            break
        logits = bidirectional_logits(model, tokens)
        if settings["shift"]:  # the output at n - 1 predicts the token at n
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        logits[..., [settings["mask_token_id"], *missing]] = -torch.inf
        sampled = choose(logits, temperature, top_p, generator)
        if policy == "random":
            chance = torch.rand(masked.shape, generator=generator, device=tokens.device)
            reveal = masked & (chance * (num_steps - step) < 1)
        else:
            score = torch.log_softmax(logits, -1).gather(-1, sampled[..., None]).squeeze(-1)
            score = score.masked_fill(~masked, -torch.inf)
            rank = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
            quota = total // steps + (step < total % steps)
            reveal = masked & (rank < quota[:, None])
        tokens = torch.where(reveal, sampled, tokens)
        masked &= ~reveal
    return tokens


def main() -> None:
    """Samples from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent), help="directory of the exported model")
    parser.add_argument("--prompt", default="", help="text that precedes the gap")
    parser.add_argument("--suffix", default="", help="text that follows the gap")
    parser.add_argument("--length", type=int, default=64, help="tokens to write between them")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=64)
    parser.add_argument("--policy", choices=["random", "confidence"], default="confidence")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model), AutoTokenizer.from_pretrained(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    row, fixed = encode(tokenizer, args.prompt, args.length, args.suffix, model.config.dlm_jax["start_token_id"])
    tokens = torch.tensor([row] * args.num_samples, device=model.device)
    tokens = sample(model, tokens, torch.tensor([fixed] * args.num_samples, device=model.device), policy=args.policy,
                    num_steps=args.num_steps, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                    missing=missing_ids(model, tokenizer))
    gap = fixed.index(False)
    for row in tokens.tolist():
        if not args.suffix and tokenizer.eos_token_id in row[gap:]:
            row = row[: row.index(tokenizer.eos_token_id, gap)]
        print(tokenizer.decode(row, skip_special_tokens=True))


if __name__ == "__main__":
    main()
