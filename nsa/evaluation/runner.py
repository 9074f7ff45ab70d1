"""Evaluates an export."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa import strict_yaml
from nsa.config import Config, ConfigError, EvaluationConfig
from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData
from nsa.data.tasks import Task, task_named
from nsa.evaluation import bits_per_byte, recall, report
from nsa.exporting import load_decoder, load_imported
from nsa.exporting.folder import CONFIG, STATE, is_export
from nsa.models import Decoder
from nsa.schema import Section
from nsa.untrusted import read_json

_NAME_IT = f"Transformers does not save that file: name that of the export, with --config EXPORT/{CONFIG}"
PLOTS = ("bits_per_byte.png", "recall.png")


def evaluate(
    export: Path | str,
    out: Path | str | None = None,
    config: Config | EvaluationConfig | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure an export; write evaluation.json, bits_per_byte.png and recall.png (what there is to show of them).

    Args:
        export: folder written by `nsa.export`, or another that can be imported, such as one that transformers saved
            of it.
        out: folder for the results; None: ``evaluation`` beside the export.
        config: its ``data`` and ``evaluation`` sections are used; None: those of the training. Only an export as
            `nsa.export` writes it has that configuration. Without one bits per byte are left out, and lengths are
            multiples of the model's range; then the evaluation section may be given alone.
        say: called with the rows of the tables as they are computed.

    Returns:
        The content of evaluation.json.

    Raises:
        ValueError: the folder cannot be read. Where the text is not available bits per byte are left out, and it is
            said.
    """
    began = time.monotonic()
    export = Path(export)
    out = Path(out) if out is not None else export.resolve().parent / "evaluation"
    check(export)
    decoders = Decoders(export, config if isinstance(config, Config) else None)
    trained = decoders.config
    whole = config if isinstance(config, Config) else trained
    section = config if isinstance(config, EvaluationConfig) else whole.evaluation if whole else EvaluationConfig()
    factors = section.length_factors
    length = trained.data.sequence_length if trained else decoders.range
    prepared, left_out = None, None
    if whole is None:
        left_out = f"bits per byte are left out: no {CONFIG} says which text was held out. {_NAME_IT}"
    else:
        try:
            prepared = _prepare(whole, decoders.tokenizer, export)
        except ValueError as e:  # recall needs no text
            left_out = f"bits per byte are left out, since the held-out text cannot be prepared: {e}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{out} cannot be made ({e.strerror}): name another folder with --out") from e

    curves = []
    for factor in dict.fromkeys((1, max(factors))):
        if prepared is None or whole is None:
            break
        decoder, _ = decoders.reaching(factor * length)
        data = whole.data.model_copy(update={"sequence_length": factor * length})
        stream = SampleStream(prepared, data, "validation", whole.seed)
        samples = min(len(stream), max(1, section.bpb_samples // factor))
        curves.append(bits_per_byte.measure(decoder, stream, samples))
    say((left_out or report.curve_table(curves)) + "\n")

    known = f"trained on samples of {length} tokens" if trained else f"made for {length} tokens"
    say(f"recall ({known})\n" + report.recall_header())
    results, rows = [], []
    for task in _tasks(trained):
        for factor in factors:
            decoder, yarn = decoders.reaching(factor * length)
            if factor * length < task.least(decoders.tokenizer):
                continue
            predict = recall.predictor(decoder)
            result = recall.measure(predict, task, decoders.tokenizer, factor * length, section.recall_samples)
            results.append(result)
            rows.append({**asdict(result), "factor": factor, "yarn_factor": yarn})
            say(report.recall_row(result, factor, yarn))

    document = {
        "export": str(export),
        "training": read_json(export / STATE) if (export / STATE).exists() else None,
        "training_length": length if trained else None,
        "bits_per_byte": [asdict(curve) for curve in curves],
        "left_out": left_out,
        "recall": rows,
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "evaluation.json").write_text(json.dumps(_without_nan(document), indent=1) + "\n")
    for name in PLOTS:
        (out / name).unlink(missing_ok=True)  # of an evaluation before
    if curves:
        report.plot_curves(curves, length, out / PLOTS[0])
    if results:
        report.plot_recall(results, length, out / PLOTS[1])
    written = ["evaluation.json", *(name for name in PLOTS if (out / name).exists())]
    say(f"\nwritten to {out}: {', '.join(written)} ({document['seconds']} s)")
    return document


def check(export: Path) -> None:
    """Raise ValueError if there is no ``export``."""
    if not is_export(export) and not (export / "config.json").exists():
        raise ValueError(f"{export} is no export: it has no {CONFIG}; make one with python -m nsa.export RUN")


class _Measured(Section):
    """What can be set where nothing says what a model was trained on."""

    evaluation: EvaluationConfig = EvaluationConfig()


def measured(overrides: Sequence[str]) -> EvaluationConfig:
    """The evaluation section with ``evaluation.key=value`` overrides, for a folder without a configuration.

    Raises:
        ConfigError: another key is named, or a value is wrong.
    """
    try:
        return strict_yaml.read(_Measured, "{}", "without a configuration", overrides).evaluation
    except ConfigError as error:
        raise ConfigError(f"{error}. {_NAME_IT}") from None


class Decoders:
    """The decoder of a folder. For lengths beyond its rotary range YaRN extends it to that length.

    Attributes:
        config: of the training, or the one given for a folder that has none; None: none was given.
        range: of its positions, in tokens, without an extension.
    """

    def __init__(self, folder: Path, given: Config | None = None) -> None:
        self._folder, self._given = folder, given
        decoder, self.config, self.tokenizer = self._load(None)
        self.range, self._yarn = decoder.config.max_position, decoder.config.rope.yarn_factor
        self._decoders = {self._yarn: self._place(decoder)}

    def _load(self, yarn_factor: float | None) -> tuple[Decoder, Config | None, BaseTokenizer]:
        if is_export(self._folder):
            return load_decoder(self._folder, yarn_factor)
        decoder, tokenizer = load_imported(self._folder, yarn_factor)
        return decoder, self._given, tokenizer

    def reaching(self, length: int) -> tuple[Decoder, float]:
        """A decoder for sequences of ``length`` tokens, and its YaRN factor (1: none)."""
        factor = max(self._yarn, length / self.range)
        if factor not in self._decoders:
            self._decoders[factor] = self._place(self._load(factor)[0])
        return self._decoders[factor], factor

    def _place(self, decoder: Decoder) -> Decoder:
        if not torch.cuda.is_available():
            return decoder
        half = self.config is not None and self.config.engine.precision == "bf16"
        return decoder.to("cuda", torch.bfloat16 if half else torch.float32)


def _tasks(trained: Config | None) -> list[Task]:
    """The usual tasks over token ids, and those that the model was trained on, if that is known."""
    of_sources = [source.task for source in trained.data.sources if source.task] if trained else []
    tasks = [task_named(name) for name in dict.fromkeys((*recall.TASKS, *of_sources))]
    return [task for task in tasks if task.over == "ids"]


def _prepare(config: Config, tokenizer: BaseTokenizer, path: Path) -> PreparedData:
    """The held-out text in the model's tokens: the run's prepared data if they exist, else prepared again.

    The split depends on the text and the seed alone, so held-out documents stay held out.
    """
    if config.data.tokenizer.path is None:
        prepared = prepare(config.data, config.seed)
        if prepared.tokenizer.sha256 == tokenizer.sha256:
            return prepared
    section = config.data.tokenizer.model_copy(update={"path": str(path)})
    return prepare(config.data.model_copy(update={"tokenizer": section}), config.seed)


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
