"""README.md of an export: what the model is, how it was trained, how to load and to measure it."""

from typing import Any

import yaml

from nsa.config import Config
from nsa.exporting.proof import TOLERANCE, Proof
from nsa.models import MoEConfig, count_parameters


def model_card(config: Config, state: dict[str, Any], bits_per_byte: float | None, proof: Proof, folder: str) -> str:
    """Markdown with YAML front matter.

    Args:
        state: state.json of the checkpoint. bits_per_byte: on held-out text, if it was measured.
        folder: name of the export, for the examples.
    """
    model, attention, optimizer = config.model, config.attention, config.optimizer
    kinds, form = attention.kinds(model.num_layers), proof.form
    trust = ", trust_remote_code=True" if form.family is None else ""
    releases = "5.4 to 5.24" if form.family is None else form.family.transformers
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            *(kind.name for kind in dict.fromkeys(kinds)),
            "sparse-attention",
            *(["custom_code"] if trust else []),
        ],
    }
    hub = [source.path for source in config.data.sources if source.kind == "hub"]
    if hub:
        front["datasets"] = hub
    if bits_per_byte is not None:
        result = {
            "type": "bits_per_byte",
            "name": "bits per byte, held-out documents",
            "value": round(bits_per_byte, 4),
        }
        task = {"task": {"type": "text-generation"}, "dataset": {"name": "held-out split", "type": "text"}}
        front["model-index"] = [{"name": config.name, "results": [{**task, "metrics": [result]}]}]

    parameters = count_parameters(model, attention)
    rows = {
        "parameters": f"{parameters['total']:,}" + (f", {parameters['active']:,} active" if model.moe else ""),
        "layers": ", ".join(f"{kinds.count(kind)} {kind.name}" for kind in dict.fromkeys(kinds)),
        "width": f"{model.hidden_size}; {model.num_heads} query heads, {model.num_kv_heads} key/value heads of "
        f"{model.head_dim} (values {model.v_head_dim or model.head_dim})"
        + (f", made of a latent of {model.mla.kv_lora_rank}" if model.mla else ""),
        "experts": experts_in_words(model.moe) if model.moe else "",
        **{row: text for kind in dict.fromkeys(kinds) for row, text in kind.card(attention.of(kind)).items()},
        "rotary range": f"{model.max_position} tokens"
        + (f", extended {model.rope.yarn_factor:g} times with YaRN" if model.rope.yarn_factor > 1 else ""),
        "training": f"{state['step']:,} steps, {state['tokens']:,} tokens, samples of {config.data.sequence_length}",
        "optimizer": f"{optimizer.kind}, peak learning rate {optimizer.learning_rate:g}, {optimizer.schedule} decay",
        "format": str(form),
        "data": ", ".join(f"{s.name} ({s.kind}, weight {s.weight:g})" for s in config.data.sources),
    }
    if not model.moe:
        del rows["experts"]
    if bits_per_byte is not None:
        rows["held-out text"] = f"{bits_per_byte:.4f} bits per byte"
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {config.name}

A decoder language model with {" and ".join(kind.title for kind in dict.fromkeys(kinds))}.

| | |
|---|---|
{table}

`training_config.yaml` is the whole configuration, `training_state.json` where the training stood.

## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})
prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("def main(", add_special_tokens=False)]])
print(tokenizer.decode(model.generate(prompt, max_new_tokens=40)[0]))
```

It needs `torch` and `transformers` {releases}. In training every document began with the token `bos_token_id` and
ended with `eos_token_id`; called as above, the tokenizer adds neither. It takes their names in a text for the special
tokens; in text of others, where that must not be, call it with `split_special_tokens=True`, as training did.

    lm_eval run --model hf --model_args pretrained={folder}{trust.replace(" ", "")} --tasks ...

## Proof

Before this folder got its name it was loaded without the training code. Its tokenizer gave the training tokenizer's
tokens on {proof.texts:,} hostile texts. On {proof.tokens:,} tokens its logits, and those of generation with its cache,
were the trainer's to within {proof.difference:.1e} of the largest ({proof.dtype}; {TOLERANCE:g} was allowed).
"""


def experts_in_words(moe: MoEConfig) -> str:
    shared = f" and {moe.num_shared} shared" if moe.num_shared else ""
    return (
        f"{moe.num_experts} routed{shared} of width {moe.expert_size}, {moe.top_k} routed ones per token; "
        f"dense MLP in the first {moe.first_dense} layers"
    )
