"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what shares their architecture."""

from nsa.importing.family import LLAMA_TENSORS, NO_BIAS, Family, baseline, no_problems, nothing

LLAMA = Family(
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    only={"attention_bias": NO_BIAS, "mlp_bias": NO_BIAS},
    window=lambda fields: None,
    problems=no_problems,
    model=nothing,
    attention=baseline,
    tensors=LLAMA_TENSORS,
    factors=nothing,
)
