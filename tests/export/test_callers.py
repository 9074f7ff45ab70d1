"""Calls of transformers, accelerate, peft and lm-eval: the exported model takes what a Llama of transformers takes.

Every test makes the same call on a tiny Llama first: should that fail, the call is at fault.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from small_run import TEXT
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from nsa.data import tokenizer as trained_tokenizer
from nsa.exporting.tokenizer import write_tokenizer
from nsa.models.hf.configuration_nsa import NSAConfig
from nsa.models.hf.modeling_nsa import CACHE, NSAForCausalLM, NSAForSequenceClassification, NSAModel, rows_of_documents

VOCABULARY = 97
KINDS = ("llama", "nsa", "dsa", "shared", "csa", "experts")
EXPERTS = {"num_experts": 5, "num_experts_per_token": 2, "num_shared_experts": 1, "expert_size": 7, "first_dense": 1}


def model(kind: str, classes: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers whose weights are large enough that every token counts; no end of text. ``classes``: a classifier."""
    torch.manual_seed(0)
    changes |= {"num_labels": classes} if classes else {}
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8}
    shape |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 3, "tie_word_embeddings": True, **changes}
    if kind == "llama":
        return (LlamaForSequenceClassification if classes else LlamaForCausalLM)(LlamaConfig(**shape)).eval()
    sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 3, "window": 6}
    sizes |= {"index_topk": 10, "index_heads": 5, "index_head_dim": 8, "index_rotary_dims": 4}
    sizes |= {"csa_topk": 3, "csa_window": 6, "csa_index_heads": 5, "csa_index_head_dim": 8, "csa_index_rotary_dims": 4}
    sizes |= {"csa_heavy_ratio": 5}
    experts = EXPERTS if kind == "experts" else {}
    sizes |= {"index_share_layers": 2} if kind == "shared" else {}
    kinds = {"dsa": ["dense", "dsa"], "shared": ["dsa", "dsa"], "csa": ["csa", "csa"]}.get(kind, ["dense", "nsa"])
    config = NSAConfig(attention_kinds=kinds, **sizes, **experts, **shape)
    return (NSAForSequenceClassification if classes else NSAForCausalLM)(config).eval()


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer.train(TEXT, 400, folder / "trained.model")
    write_tokenizer(trained_tokenizer.Tokenizer(folder / "trained.model"), folder, 512)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def trainable(m: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that a loss reaches: no gradient passes through the choice of an indexer."""
    return {name: parameter for name, parameter in m.named_parameters() if ".indexer." not in name}


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- Decoding ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["cpu", "disk", "memory"])
def test_hooks_of_accelerate_lose_no_cache(kind: str, place: str, tmp_path: Path) -> None:
    """Hooks rebuild every dictionary, list and tuple that a layer is called with."""
    m, ids = model(kind), tokens(2, 21)
    expected = m.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False)
    if place == "memory":  # a hook at each module that owns weights, which are elsewhere between calls
        from accelerate import cpu_offload

        m = cpu_offload(m, "cpu")
    else:
        parts = [name for name, _ in m.named_children()]
        parts = parts if kind != "llama" else ["model", "lm_head"]
        devices = {name: "cpu" for name in parts if name not in ("layers", "model")}
        inner = "model." if kind == "llama" else ""
        devices |= {f"{inner}layers.0": "cpu", f"{inner}layers.1": place}
        if kind == "llama":
            devices |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        m = dispatch_model(m, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert m.generate(ids, max_new_tokens=20, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", ["model", "the prompt"])
def test_assisted_generation_gives_the_same_tokens(kind: str, drafts: str) -> None:
    m, ids = model(kind), tokens(1, 30)
    ids[:, 20:] = ids[:, 5:15]  # a prompt to look drafts up in
    other = model(kind)
    with torch.no_grad():  # like the model, but not always right
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    options = {"assistant_model": other} if drafts == "model" else {"prompt_lookup_num_tokens": 3}
    usual = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": VOCABULARY}  # older releases need one
    expected = m.generate(ids, **usual)
    got = m.generate(ids, **usual, **options)[:, : expected.shape[1]]  # older releases may go on for a token
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_taken_back_leave_no_trace(kind: str) -> None:
    m, ids = model(kind), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    whole = m(ids, attention_mask=mask, use_cache=False).logits
    cache = m(ids[:, :30], attention_mask=mask[:, :30], use_cache=True)[1]
    if kind != "llama":
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-1)
    if hasattr(cache, "activate_past_recording"):  # older caches of transformers always record
        cache.activate_past_recording()
    m(tokens(2, 25).flip(1), attention_mask=mask[:, :55], **{CACHE: cache})
    cache.crop(-24)
    assert cache.get_seq_length() == 31
    cache.crop(-1)
    out = m(ids[:, 30:50], attention_mask=mask[:, :50], **{CACHE: cache})
    close(out.logits, whole[:, 30:50])
    close(m(ids[:, 50:], attention_mask=mask, **{CACHE: cache}).logits, whole[:, 50:])


@pytest.mark.parametrize("kind", KINDS)
def test_generation_from_embeddings_and_with_the_options_of_a_pipeline(kind: str) -> None:
    m, ids = model(kind), tokens(2, 12)
    expected = m.generate(ids, max_new_tokens=10, do_sample=False)
    embedded = m.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    got = m.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert got.tolist() == expected[:, 12:].tolist()
    out = m.generate(
        ids,
        max_new_tokens=10,
        do_sample=False,
        num_beams=2,
        num_return_sequences=2,
        output_hidden_states=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (4, 22) and len(out.hidden_states[0]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_generation_stops_at_strings(kind: str, text_tokenizer: PreTrainedTokenizerFast) -> None:
    m = model(kind, vocab_size=len(text_tokenizer))
    ids = text_tokenizer("def write(", return_tensors="pt").input_ids
    usual = {"max_new_tokens": 30, "do_sample": False}
    tokens = m.generate(ids, **usual)[0, ids.shape[1] :]
    words = [text_tokenizer.decode(token) for token in tokens]
    # A byte that is no text beside the one before it turns both into a replacement character.
    said = [text_tokenizer.decode(tokens[: i + 1]).endswith(word) for i, word in enumerate(words)]
    last = next(i for i in range(5, 30) if words[i].isascii() and said[i] and words[i] not in "".join(words[:i]))
    out = m.generate(ids, **usual, stop_strings=[words[last]], tokenizer=text_tokenizer)[0, ids.shape[1] :]
    assert len(out) == last + 1 < 30 and text_tokenizer.decode(out).endswith(words[last])


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_scores_in_mixed_precision(kind: str, text_tokenizer: PreTrainedTokenizerFast) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def ask(what: str, *arguments: Any) -> list[Instance]:
        return [Instance(what, {}, ("def write(", argument), 0) for argument in arguments]

    scores, m = {}, model(kind, vocab_size=len(text_tokenizer))
    for dtype in (None, "bfloat16"):
        harness = HFLM(m, tokenizer=text_tokenizer, mixed_precision_dtype=dtype, device="cpu", batch_size=2)
        asked = ask("loglikelihood", " self", " data):", "x")
        scores[dtype] = torch.tensor([score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)])
        until = ask("generate_until", {"until": ["\n\n"], "max_gen_toks": 9})
        assert harness.generate_until(until, disable_tqdm=True)[0]
    close(scores["bfloat16"], scores[None], 0.03)
    assert not torch.equal(scores["bfloat16"], scores[None])


# ---- Arguments of forward ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_arguments_and_outputs_are_llamas(kind: str) -> None:
    m, ids = model(kind), tokens(2, 30)
    plain = m(ids)
    assert len(m(ids, return_dict=False)) == 2 and m(ids, use_cache=False, return_dict=False)[0].shape == (2, 30, 97)
    close(m(inputs_embeds=m.get_input_embeddings()(ids)).logits, plain.logits)
    close(m(ids, position_ids=torch.arange(30)[None]).logits, plain.logits)
    close(m(ids, position_ids=torch.arange(30)[None] + 7).logits, plain.logits, 1e-3)
    close(m(ids, logits_to_keep=3).logits, plain.logits[:, -3:])
    close(m(ids, logits_to_keep=torch.tensor([2, 9])).logits, plain.logits[:, [2, 9]])
    states = m(ids, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 30, 24)] * 3
    close(m.get_output_embeddings()(states[-1]), plain.logits)
    close(states[0], m.get_input_embeddings()(ids))
    with pytest.raises(ValueError):
        m(ids, inputs_embeds=states[0])
    with pytest.raises(ValueError):
        m()
    assert m(ids, some_option_of_a_later_release=None).logits.shape == plain.logits.shape


@torch.no_grad()
def test_attention_weights_and_positions_with_holes_are_refused() -> None:
    m, ids = model("nsa"), tokens(1, 12)
    with pytest.raises(ValueError, match="output_attentions"):
        m(ids, output_attentions=True)
    with pytest.raises(ValueError, match="go up by one"):
        m(ids, position_ids=2 * torch.arange(12)[None])
    cache = m(ids, use_cache=True)[1]
    with pytest.raises(ValueError, match="continue where"):
        m(ids[:, :1], cache=cache, position_ids=torch.tensor([[3]]))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    """As trl packs them: several documents in a row, distinguished by their positions."""
    m, lengths = model(kind), [[17, 1, 22], [40]]
    ids = tokens(2, 40)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = m(ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    for row, parts in enumerate(lengths):
        for number, part in enumerate(ids[row].split(parts)):
            alone = m(part[None], use_cache=False).logits[0]
            start = sum(parts[:number])
            close(packed.logits[row, start : start + len(part)], alone, 1e-3)
    assert packed.hidden_states[1].shape == (2, 40, 24)


def test_rows_of_documents() -> None:
    positions = torch.tensor([[9, 0, 1, 0, 1, 2], [0, 1, 0, 7, 8, 9]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    row, slot = rows_of_documents(positions, real.cumsum(1) - 1, real)
    assert (row.tolist(), slot.tolist()) == ([0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 0, 1, 2, 0, 1, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_can_be_resized_and_the_base_model_loads(kind: str, tmp_path: Path) -> None:
    for tied in (True, False):
        m, ids = model(kind, tie_word_embeddings=tied), tokens(1, 20)
        m.resize_token_embeddings(VOCABULARY + 2)
        assert m.config.vocab_size == m.get_output_embeddings().weight.shape[0] == VOCABULARY + 2
        assert (m.get_output_embeddings().weight is m.get_input_embeddings().weight) == tied
        assert m(ids, labels=ids).loss.isfinite() and m(ids).logits.shape[-1] == VOCABULARY + 2
        m.save_pretrained(tmp_path / str(tied))
        base, loading = {"llama": LlamaModel}.get(kind, NSAModel).from_pretrained(
            tmp_path / str(tied), output_loading_info=True
        )
        assert not loading["missing_keys"] and (kind == "llama" or not loading["unexpected_keys"])
        close(m.get_output_embeddings()(base(ids).last_hidden_state), m(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_looks_at_the_last_token_that_is_not_padded(kind: str, tmp_path: Path) -> None:
    m, ids, labels = model(kind, classes=5), tokens(3, 20), torch.tensor([1, 0, 4])
    ids[0, 15:], ids[1, :6] = 3, 3  # padded at the end and at the beginning
    out = m(ids, attention_mask=ids.ne(3).long(), labels=labels)
    alone = torch.cat([m(row[row.ne(3)][None]).logits for row in ids])
    assert out.logits.shape == (3, 5)
    close(out.logits, alone, 1e-3)
    close(out.loss, torch.nn.functional.cross_entropy(alone, labels), 1e-3)
    embedded = m(inputs_embeds=m.get_input_embeddings()(ids[2:]), return_dict=False)[0]
    close(embedded, alone[2:], 1e-3)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(m).values())
    number = model(kind, classes=1)
    close(number(ids, labels=labels.float()).loss, (number(ids).logits[:, 0] - labels).square().mean())
    m.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"pad_token_id|padding token"):
        m(ids)
    m(ids[:1])

    causal = model(kind)
    causal.save_pretrained(tmp_path)
    tuned, loading = type(m).from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert set(loading["missing_keys"]) == {"score.weight"} and not loading["unexpected_keys"]
    states = tuned.base_model(ids[2:]).last_hidden_state
    close(causal.get_output_embeddings()(states), causal(ids[2:]).logits)
    assert not any("score" in name for name, _ in tuned.base_model.named_parameters())


# ---- Training ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind: str, reentrant: bool) -> None:
    m, ids = model(kind).train(), tokens(2, 40)
    m(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainable(m).items()}
    m.zero_grad()
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    m.enable_input_require_grads()
    calls = []
    last = next(module for name, module in m.named_modules() if name.endswith("layers.1"))
    (last.input_layernorm if kind == "llama" else last.attention_norm).register_forward_hook(lambda *_: calls.append(1))
    m(ids, labels=ids, use_cache=True).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    for name, parameter in trainable(m).items():
        close(parameter.grad, expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_and_generates(kind: str) -> None:
    m, ids = model(kind).train(), tokens(2, 40)
    exact = m(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):  # what Trainer(bf16=True) and lm-eval's mixed_precision_dtype do
        loss = m(ids, labels=ids).loss
        assert m(ids).logits.dtype == torch.bfloat16
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact
    assert all(parameter.grad.isfinite().all() for parameter in trainable(m).values())
    m.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert m.generate(ids, max_new_tokens=12, min_new_tokens=12).shape == (2, 52)


def test_the_router_chooses_in_fp32_under_autocast() -> None:
    router, x = model("experts").layers[1].mlp.router, torch.randn(500, 24)
    chosen, gates = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        again, weights = router(x)
    assert torch.equal(chosen, again) and torch.equal(gates, weights)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_keep_the_dtype_of_their_input(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    experts, exact = (model("experts").to(d).layers[1].mlp.experts for d in (dtype, torch.float32))
    exact.load_state_dict(experts.state_dict())
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    chosen = torch.arange(100).view(50, 2) % 4  # of five
    gates = torch.rand(50, 2, generator=torch.Generator().manual_seed(3))  # the router's are fp32 in any dtype
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = experts(x, chosen, gates)
    assert out.dtype == dtype
    close(out.float(), exact(x.float(), chosen, gates), 0.03 if autocast or dtype == torch.bfloat16 else 1e-6)
    out.sum().backward()
    assert x.grad.isfinite().all()


def trained(m: PreTrainedModel, folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """The weights after one step on 4 rows of unequal lengths."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens(4, 24)]
    for i, row in enumerate(rows):
        row["labels"][: 6 * i] = -100
    options = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0, "report_to": []}
    options |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    Trainer(m, TrainingArguments(str(folder), **options, **arguments), train_dataset=rows).train()
    return {name: tensor.float().clone() for name, tensor in m.state_dict().items()}


def changes(kind: str, folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    """Of the weights by one step; those that stay are left out."""
    before = {name: tensor.clone() for name, tensor in model(kind).state_dict().items()}
    after = trained(model(kind), folder, **arguments)
    return {name: tensor - before[name] for name, tensor in after.items() if tensor.ne(before[name]).any()}


@pytest.fixture(scope="module")
def accumulation(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What the control's step of four accumulated rows is of that of all rows: 1; 1/4 in older transformers."""
    folder, name = tmp_path_factory.mktemp("control"), "model.norm.weight"
    once = changes("llama", folder, per_device_train_batch_size=4)[name]
    four = changes("llama", folder, per_device_train_batch_size=1, gradient_accumulation_steps=4)[name]
    factor = float(four.norm() / once.norm())
    assert factor == pytest.approx(1, rel=1e-3) or factor == pytest.approx(0.25, rel=1e-3)
    return factor


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_equal_one_of_all_rows(kind: str, tmp_path: Path, accumulation: float) -> None:
    once = changes(kind, tmp_path, per_device_train_batch_size=4)
    four = changes(kind, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert once.keys() == four.keys() and len(once) > 10
    for name, change in once.items():
        close(four[name], accumulation * change, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_in_bf16_and_evaluates(kind: str, tmp_path: Path) -> None:
    m = model(kind)
    exact = trained(model(kind), tmp_path, per_device_train_batch_size=4)
    mixed = trained(m, tmp_path, per_device_train_batch_size=4, bf16=True, gradient_checkpointing=True)
    name = next(name for name in exact if "down" in name)
    close(mixed[name], exact[name], 0.05)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 24)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    out = Trainer(m, arguments, eval_dataset=rows).predict(rows)
    assert out.predictions.shape == (4, 24, VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_a_causal_model_gives_the_states_before_the_head(kind: str) -> None:
    """trl computes the loss from them, with a patched ``forward`` on the causal model."""
    m, ids = model(kind), tokens(2, 30)
    expected = m(ids, output_hidden_states=True).hidden_states[-1]
    m.forward = None
    states = m.base_model(ids).last_hidden_state
    close(states, expected)
    states.sum().backward()
    assert m.get_input_embeddings().weight.grad is not None, "the parts are shared"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_adapts_the_usual_parts_and_can_be_merged(kind: str) -> None:
    import peft

    m, ids = model(kind), tokens(2, 30)
    plain = m(ids).logits
    tuned = peft.get_peft_model(m, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2))
    adapted = {name.split(".lora_A")[0] for name, _ in tuned.named_parameters() if "lora_A" in name}
    number = {"nsa": 2 + 1 + 3, "experts": 2 + 1 + 3, "csa": 2}.get(kind, 4)
    assert len(adapted) == number  # queries and values, those of every branch; of CSA queries alone
    changed = tuned(ids, labels=ids)
    changed.loss.backward()
    assert (changed.logits - plain).abs().max() > 0.01
    assert all((p.grad is not None) == p.requires_grad for p in tuned.parameters())
    assert tuned.generate(input_ids=ids, max_new_tokens=5).shape == (2, 35)
    close(tuned.merge_and_unload()(ids).logits, changed.logits, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_decoder_has_the_weights_its_config_says(kind: str) -> None:
    for name, parameter in model(kind).named_parameters():
        values = parameter.detach()
        if "norm" in name and "weight" in name:
            assert (values == 1).all(), name
        elif name.rpartition(".")[2] in ("position", "sink", "bias"):
            assert (values == 0).all(), name
        else:
            assert values.std().item() == pytest.approx(0.3, abs=0.9 / values.numel() ** 0.5), name
            assert abs(values.mean().item()) < 1.2 / values.numel() ** 0.5, name
