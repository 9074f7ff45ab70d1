"""A run folder of a small model that nobody trained: what export and evaluation start from."""

from pathlib import Path

import torch

from nsa.config import Config, dump_config, load_config
from nsa.data import tokenizer
from nsa.exporting.folder import CONFIG, STATE, write_folder
from nsa.models import Decoder
from nsa.training import checkpoint

TEXT = [Path(module.__file__).read_text() for module in (tokenizer, checkpoint)]


def small_config(folder: Path, kind="nsa", **model) -> Config:
    """A configuration whose samples have more blocks and tokens than a query selects; its corpus lies in ``folder``."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(TEXT):
        for j in range(4):
            (corpus / f"{i}{j}.txt").write_text(text[j * len(text) // 4 : (j + 1) * len(text) // 4])
    shape = {
        "vocab_size": 420,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "v_head_dim": 6,
        "intermediate_size": 40,
        "max_position": 512,
        "init_std": 0.2,
    }
    sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 4, "window": 12}
    indexer = {"topk": 20, "index_heads": 3, "index_head_dim": 8, "index_rotary_dims": 4}
    return Config.model_validate(
        {
            "name": "run",
            "output_dir": str(folder),
            "model": {**shape, **model},
            "attention": {"kind": kind, "nsa": sizes, "dsa": indexer},
            "data": {
                "sequence_length": 64,
                "tokenizer": {"vocab_size": 400},
                "sources": [{"name": "text", "kind": "files", "path": str(corpus)}],
                "cache_dir": str(folder / "cache"),
                "validation_fraction": 0.4,
                "workers": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 3, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def small_run(folder: Path, kind="nsa", config: Config | None = None, **model) -> Path:
    """Write ``folder``/run with one checkpoint, step_00000003; returns it. ``config``: in place of `small_config`."""
    config = config or small_config(folder, kind, **model)
    torch.manual_seed(0)
    decoder = Decoder(config.model, config.attention)
    for buffer in decoder.buffers():
        buffer.normal_(0.0, 0.1)
    step = folder / "run" / "step_00000003"
    temporary = step.with_suffix(".tmp")
    temporary.mkdir(parents=True)
    tied = config.model.tie_embeddings
    weights = [("weight", n, p) for n, p in decoder.state_dict().items() if not (tied and n == "head.weight")]
    entries = checkpoint.write_tensors(temporary, 0, weights)
    state = {"step": 3, "samples": 3, "tokens": 192}
    entries["state.json"] = checkpoint.write_json(temporary / "state.json", state)
    entries["config.yaml"] = checkpoint.write_file(temporary / "config.yaml", dump_config(config).encode())
    tokenizer.train(TEXT, 400, folder / "tokenizer.model")
    model_file = (folder / "tokenizer.model").read_bytes()
    entries["tokenizer.model"] = checkpoint.write_file(temporary / "tokenizer.model", model_file)
    checkpoint.commit(temporary, step, entries)
    return step.parent


def small_export(folder: Path, kind="nsa", config: Config | None = None, **model) -> Path:
    """The export of `small_run`, unproven."""
    step = small_run(folder, kind, config, **model) / "step_00000003"
    path = step.parent / "export"
    path.mkdir()
    config = load_config(step / "config.yaml")
    write_folder(path, config, checkpoint.load_weights(step), tokenizer.Tokenizer(step / "tokenizer.model"))
    (path / CONFIG).write_bytes((step / "config.yaml").read_bytes())
    (path / STATE).write_bytes((step / "state.json").read_bytes())
    return path
