"""Loads an export the way a stranger does, and writes down what it gives. Run in a process of its own by `proof`.

    python -I load_alone.py EXPORT QUESTION ANSWER

QUESTION is a JSON file: "dtype"; "inputs", token ids of each sequence; "prompts", token ids, of unequal lengths;
"new_tokens"; "texts"; "marked", texts with special tokens in them. ANSWER is a folder that receives

    answer.safetensors   logits.<i> (T, V) of each input; generated.<i> and steps.<i>: tokens and logits of each prompt
                         continued greedily in one left-padded batch with the cache; again.<i>: the logits of the whole
                         continued sequence, without cache, alone
    answer.json          ids of each text, where special tokens are text, and what they decode to; ids of each text
                         without a special token and of each marked one, where special tokens are special
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def answer(folder: str, question: dict, target: Path) -> None:
    code = any(Path(folder).glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)

    def encode(text: str, **mode: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False, **mode).input_ids

    texts = question["texts"]
    answers: dict[str, list] = {"ids": [encode(text, split_special_tokens=True) for text in texts]}
    answers["decoded"] = [tokenizer.decode(ids) for ids in answers["ids"]]
    answers["default"] = [
        None if any(t in text for t in tokenizer.all_special_tokens) else encode(text) for text in texts
    ]
    answers["marked"] = [encode(text) for text in question["marked"]]
    (target / "answer.json").write_text(json.dumps(answers))

    dtype = getattr(torch, question["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code, dtype=dtype).eval()
    tensors = {f"logits.{i}": model(torch.tensor([ids])).logits[0] for i, ids in enumerate(question["inputs"])}
    prompts, new_tokens = question["prompts"], question["new_tokens"]
    width = max(map(len, prompts))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for i, ids in enumerate(prompts):
        tensors[f"generated.{i}"] = out.sequences[i, width:].clone()
        tensors[f"steps.{i}"] = torch.stack([step[i] for step in out.logits])
        whole = torch.tensor([ids + out.sequences[i, width:].tolist()])
        tensors[f"again.{i}"] = model(whole, use_cache=False).logits[0, len(ids) - 1 : -1].clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "answer.safetensors")


if __name__ == "__main__":
    sys.modules["nsa"] = None  # type: ignore[assignment]  # the export must not need this project
    answer(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
