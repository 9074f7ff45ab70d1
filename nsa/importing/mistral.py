"""Mistral (arXiv 2310.06825), whose first version has a sliding window."""

from nsa.importing.family import LLAMA_TENSORS, Family, baseline, no_problems, nothing

MISTRAL = Family(
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    only={},
    window=lambda fields: fields["sliding_window"],
    problems=no_problems,
    model=nothing,
    attention=baseline,
    tensors=LLAMA_TENSORS,
    factors=nothing,
)
