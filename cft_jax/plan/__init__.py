"""What a configuration would take on an accelerator, by that accelerator's own compiler, on any machine."""

# What a run compiles, as far as time and memory go.
KINDS = ("train", "prefill", "decode", "score", "likelihood")
