"""Samples the model beside this file as a diffusion language model, with PyTorch and transformers 5 alone.

    python sample_torch.py --prompt "Once upon a time" --length 64 --num_steps 32

`AutoModelForCausalLM` attends causally, so the model is called with an explicit mask that lets every position
see every other. The input is the prompt, masked positions, and a suffix if given; each step
fills some of the masked positions, until all are filled. `--temperature 0` takes the most probable tokens.
"""

import argparse
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(directory: str | Path) -> torch.nn.Module:
    """Loads the exported model with an attention implementation that accepts any mask."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SystemExit("this needs transformers 5: earlier versions attend causally whatever mask they are given")
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval()


def bidirectional_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns logits [batch, length, vocab] of tokens [batch, length]; every position sees every other."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    distance = (positions[:, None] - positions[None, :]).abs()
    visible = distance < (getattr(model.config, "sliding_window", None) or tokens.shape[1])
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=tokens.device)
    mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)
    return model(tokens, attention_mask=mask.expand(len(tokens), 1, -1, -1), use_cache=False).logits.float()


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
           num_steps: int = 64, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Fills the positions of `tokens` [batch, length] that are not `fixed` (bool, same shape); position 0 is context.

    The policy "random" reveals each masked token at a uniformly random step; "confidence" reveals equally many at each
    step, those whose sampled token is the most probable.
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
        logits[..., settings["mask_token_id"]] = -torch.inf
        sampled = choose(logits, temperature, top_p, generator)
        if policy == "random":
            chance = torch.rand(masked.shape, generator=generator, device=tokens.device)
            reveal = masked & (chance * (num_steps - step) < 1)
        else:
            score = torch.log_softmax(logits, -1).gather(-1, sampled[..., None]).squeeze(-1)
            score = score.masked_fill(~masked, -torch.inf)
            rank = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
            quota = (step + 1) * total // steps - step * total // steps
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
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prefix = [start, *tokenizer.encode(args.prompt, add_special_tokens=False)]
    suffix = tokenizer.encode(args.suffix, add_special_tokens=False)
    row = prefix + [0] * args.length + suffix
    fixed = [True] * len(prefix) + [False] * args.length + [True] * len(suffix)
    tokens = torch.tensor([row] * args.num_samples, device=model.device)
    tokens = sample(model, tokens, torch.tensor([fixed] * args.num_samples, device=model.device), policy=args.policy,
                    num_steps=args.num_steps, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    for row in tokens.tolist():
        print(tokenizer.decode(row, skip_special_tokens=True))


if __name__ == "__main__":
    main()
