"""From a prompt to text: a sampler is a reveal policy times a token choice.

    text with gaps
      | text.split_gaps, text.encode     tokens, GAP where one is to be sampled   (gap_length: gaps of unknown length)
      | batching.sample_rows             rows of similar length, padded to one shape
      v
    sampler.sample                       one compiled program: `Stepper.start`, `prefill`, then `advance` until
      |                                  nothing is pending; sampler.stream runs it step by step, for `on_step`
      |   steppers.DenoisingStepper      entire rows, or blocks of them with caches that grow stale
      |   steppers.BlockStepper          one block after another, for models trained by block diffusion
      |   steppers.AutoregressiveStepper from left to right, as the AR parent
      |   speculative.SpeculativeStepper the same text in fewer steps, by checking what is looked up
      |   drafted.DraftedStepper         the same, of what a trained drafter guesses
      |   self_drafting.SelfDraftingStepper   the same, of what the model itself guesses
      |     every step:  network -> hidden states -> tokens.sample_tokens: LM head, penalties, temperature, top-k, top-p
      |                  spec.next_reveal: how many tokens -> policy: which positions -> revealed
      v
    text.decode                          the given text as it was, with the sampled text in the gaps

To add a reveal policy, write its score in `config` and name it in `config.POLICIES`.
"""

from dlm_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "batching": ("SamplingStats", "sample_rows"),
    "config": ("BUILT_IN_DRAFTERS", "POLICIES", "SamplerConfig", "resolve_settings"),
    "sampler": ("Sample", "sample", "stream"),
    "spec": ("SamplingSpec",),
    "text": ("GAP", "PaddedBatch", "bucket", "pad_rows"),
    "trace": ("Snapshot", "Trace"),
})
