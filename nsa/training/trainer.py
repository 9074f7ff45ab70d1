"""The training loop."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.config import Config
from nsa.data.loader import SampleStream, batch
from nsa.data.prepare import prepare, refuse_in_import
from nsa.data.shards import PreparedData
from nsa.layers.figure import Figure, values
from nsa.ops.geometry import KnownLengths, tell_lengths
from nsa.parallel.grid import build_grid
from nsa.parallel.partition import gradient_norm, mark_gradients
from nsa.parallel.pipeline import Pipeline
from nsa.training import checkpoint
from nsa.training.attention_losses import AttentionLosses
from nsa.training.attention_probe import of_all_ranks, probe
from nsa.training.balance import Balance
from nsa.training.batches import ON_DEVICE, Batch, StepLoader, pinned, sample_indices
from nsa.training.checkpoint_writer import CheckpointWriter
from nsa.training.console import Console
from nsa.training.cuda_graphs import forget_recordings
from nsa.training.deepspeed_config import deepspeed_config
from nsa.training.distributed import COLLECTIVE_TIMEOUT, Ranks, ReportedError, initialize, make_deterministic
from nsa.training.engine import build_engine, client_optimizer, dense_attention_of, sum_gradients_held_alike
from nsa.training.exit_codes import DONE, INTERRUPTED, REQUEUE
from nsa.training.freezing import attached
from nsa.training.metrics import StepMetrics, StepResult
from nsa.training.monitor import Monitor
from nsa.training.quarantine import TrainingError, roll_back
from nsa.training.run_folder import RunFolder
from nsa.training.schedule import learning_rate
from nsa.training.signals import StopRequest
from nsa.training.spikes import SpikeDetector, batch_number
from nsa.training.state import Identity, check_beginning, load_newest, restore, snapshot, state_bytes, trained_on
from nsa.training.watchdog import Watchdog

IGNORED = -100  # targets that are not counted
STOPS = (INTERRUPTED, REQUEUE)  # exit codes of a stop; who interrupts decides


class Trainer:
    """One run: everything from the configuration to the last checkpoint.

    Args:
        ranks: the processes that train together; None: those that the environment describes.

    Raises:
        ValueError: what the user can fix, with what to do.
        RuntimeError: a script without a guard, which workers that prepare data would run again.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        refuse_in_import()
        self.began = time.monotonic()
        self._stop: StopRequest | None = None  # heard until `close`: a signal while it ends changes nothing
        self.config = config
        self.ranks = ranks or initialize()
        world_size = self.ranks.world_size
        deepspeed_json = self.ranks.on_main(lambda: deepspeed_config(config, world_size))
        heads = config.model.num_kv_heads
        self.grid = build_grid(
            config.parallel, self.ranks.rank, world_size, num_kv_heads=heads, timeout=COLLECTIVE_TIMEOUT
        )
        make_deterministic(self.ranks.device)
        self.dense_attention = self.ranks.on_main(lambda: dense_attention_of(config, self.ranks.device))
        self.folder = self.ranks.on_main(lambda: self._open_folder(deepspeed_json))

        prepared = PreparedData(self.ranks.on_main(self._prepare))
        self.train_stream = SampleStream(prepared, config.data, "train", config.seed)
        self.validation_stream = SampleStream(prepared, config.data, "validation", config.seed)
        self.loader = StepLoader(self._read_step)

        self.engine = build_engine(config, self.ranks, self.grid, deepspeed_json)
        self.balance = Balance(self.engine.module, config, self.ranks, self.grid)
        self.attention_losses = AttentionLosses(self.engine.module, config, self.ranks, self.grid)
        self.pipeline = None
        if self.grid.pipeline.size > 1:
            self.pipeline = Pipeline(self.engine, self.grid.pipeline, lambda b: self._stage(b), self._stage_shape)
        self.identity = Identity(prepared.fingerprint, prepared.tokenizer.path)
        self.progress = restore(self.engine, config, self.ranks, self.folder, self.identity)
        self.spikes = SpikeDetector(config.recovery, self.progress.spikes)
        self.ranks.on_main(lambda: checkpoint.check_space(self.folder, state_bytes(config)))
        self.writer = CheckpointWriter(self.ranks, self.folder, config.checkpoint.keep_last)
        recovery, rank = config.recovery, self.ranks.rank
        self.watchdog = Watchdog(rank, world_size, self.folder, recovery.hang_seconds, recovery.lost_seconds)

        self.step_metrics = StepMetrics(config, self.ranks)
        self.console = Console(config, self.ranks, self.folder)
        self.monitor = self._monitor() if self.ranks.is_main else None

    def _open_folder(self, deepspeed_json: dict[str, Any]) -> Path:
        self._run_folder = RunFolder(self.config)  # kept: it holds the lock
        check_beginning(self.config, quiet=True)  # before the data are prepared, which may take long
        return self._run_folder.path

    def _monitor(self) -> Monitor:
        monitor = Monitor(self.folder, self.progress.step, self.config.training.log_every)
        if monitor.lost:
            self.console.say(monitor.lost)
        return monitor

    def _prepare(self) -> Path:
        prepared = prepare(self.config.data, self.config.seed, fingerprint=trained_on(self.folder))
        if prepared.vocab_size > self.config.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {prepared.vocab_size} pieces, model.vocab_size is {self.config.model.vocab_size}: "
                "set it to at least as many"
            )
        return prepared.folder

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> int:
        """Train to the last step, or until somebody asks to stop; a checkpoint is saved in both cases.

        Returns:
            The exit code (`nsa.training.exit_codes`).
        """
        config, training = self.config, self.config.training
        step, prepared = self.progress.step, self.train_stream.prepared
        self.console.greet(self.grid.describe(), self.step_metrics, self.dense_attention, step, prepared)
        if self.ranks.is_main:
            self._run_folder.label(config, deepspeed_config(config, self.ranks.world_size))
        stop = self._stop = StopRequest(
            self.folder / "STOP" if self.ranks.is_main else None, training.max_hours, self.began
        )
        saved, code = self.progress.step, DONE
        since, seconds, data_seconds = self.progress.step, 0.0, 0.0
        self.watchdog.start()
        try:
            while self.progress.step < training.steps:
                started = time.perf_counter()
                result = self.train_step(stop)
                step = self.progress.step
                seconds += time.perf_counter() - started
                data_seconds += result.data_seconds
                last = step == training.steps or bool(result.stop)
                self._check_skips(result)
                if self.writer.finished and not self.writer.failed:
                    self._saved(self.writer.wait())
                if self.spikes.exhausted:
                    self._roll_back()
                    since, seconds, data_seconds = self.progress.step, 0.0, 0.0
                    continue

                metrics: dict[str, float] = {}
                logged = step % training.log_every == 0 or last
                if logged:
                    steps = step - since
                    progress = step, self.progress.updates
                    metrics |= self.step_metrics.of(result, *progress, seconds / steps, data_seconds / steps)
                if step % training.probe_every == 0 or step == 1 or step == training.steps:
                    metrics |= self.probe_attention()
                if step % training.validation_every == 0 or step == training.steps:
                    metrics |= self.validate()
                if self.monitor and metrics:
                    self.monitor.write(step, metrics)
                if logged or "validation/loss" in metrics:
                    self.console.step(step, result, metrics, self.monitor.lowest if self.monitor else None)
                if logged:
                    since, seconds, data_seconds = step, 0.0, 0.0
                if step % config.checkpoint.every == 0 or last:
                    self.save(wait=last)
                    saved = step
                if result.stop and step < training.steps:
                    code = result.stop
                    break
        finally:
            reason = stop.asked()[1]
            self.loader.close()
            if self.monitor:
                self.monitor.close()
        assert saved == self.progress.step
        stop.forget_file()
        if self.progress.step == training.steps:
            self.ranks.on_main(self._check_end)
        self.watchdog.close()
        self.console.farewell(self.progress.step, reason)
        return code

    def close(self) -> None:
        """Leave the process group and unlock the run folder."""
        forget_recordings()
        torch.distributed.destroy_process_group()
        if self.ranks.is_main:
            self._run_folder.close()
        if self._stop is not None:
            self._stop.restore()

    def end_threads(self) -> None:
        """End what runs beside the training, also after an error: a thread in C++ code while Python exits aborts it."""
        self.watchdog.close()
        self.writer.give_up()

    def train_step(self, stop: StopRequest) -> StepResult:
        """One step: forward and backward of every micro batch, then the update, unless something is not finite.

        The loss is the sum of the negative log-likelihoods of all targets that are counted in the global batch, over
        their number: neither ranks nor micro batches nor the packing of documents change it.
        """
        self.grid.traffic.take()  # of validation
        batches, data_seconds = self._next_batches()
        rate = self._set_learning_rate()
        targets, stopped = self._agree(batches, stop)
        loss, norm, broken, spike = self._update(batches, targets)
        figures = self.balance.end_step(update=not (broken or spike)) | self.attention_losses.end_step()

        self.progress.step += 1
        self.progress.updates += not (broken or spike)
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if broken else 0
        if not broken:
            self.spikes.record(self.progress.step - 1, loss, norm, spike)
        sent = self.grid.traffic.take()
        return StepResult(loss, norm, rate, broken or spike, data_seconds, stopped, sent, figures, spike)

    def _next_batches(self) -> tuple[list[Batch], float]:
        """This rank's micro batches, and the seconds that it waited for them."""
        started, step = time.perf_counter(), self.progress.step
        self.watchdog.beat(f"step {step + 1}: data")
        batches = self.loader(step, last=step + 1 == self.config.training.steps)
        return batches, time.perf_counter() - started

    def _set_learning_rate(self) -> float:
        """In every group of parameters."""
        rate = learning_rate(self.config.optimizer, self.progress.step, self.config.training.steps)
        for group in client_optimizer(self.engine).param_groups:
            group["lr"] = rate
        return rate

    def _agree(self, batches: list[Batch], stop: StopRequest) -> tuple[float, int]:
        """What all ranks must know before the step: the counted targets of the global batch, and the exit code that
        one of them was asked to stop with, or 0. Raises if a checkpoint could not be written."""
        counted = sum(int(torch.count_nonzero(b["targets"] != IGNORED)) for b in batches) * self.grid.counts_samples
        asked = stop.asked()[0]
        votes = [counted, self.writer.failed, *(asked == code for code in STOPS)]
        votes_of_all = self.ranks.sum(torch.tensor(votes, dtype=torch.float64, device=self.ranks.device))
        targets, failed, *stops = votes_of_all.tolist()
        if failed:
            self.writer.wait()  # raises, on all ranks
        return targets, next((code for code, votes_for in zip(STOPS, stops, strict=True) if votes_for), 0)

    def _update(self, batches: list[Batch], targets: float) -> tuple[float, float, bool, bool]:
        """Forward and backward passes, and the update.

        Returns:
            The loss of the global batch, the norm of its gradient, and why nothing was updated: whether one of them is
            not finite, whether they are a spike.
        """
        engine, ranks, step = self.engine, self.ranks, self.progress.step + 1
        gate = client_optimizer(engine).gate
        nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
        scale = self.grid.replicas.size / max(targets, 1.0)  # DeepSpeed averages gradients over the replicas
        passes = [batches] if self.pipeline else [[micro_batch] for micro_batch in batches]
        for i, together in enumerate(passes):
            self.watchdog.beat(f"step {step}: micro batch {i}")
            nll += self._backward(together, scale) * self.grid.counts_losses
            if i + 1 < len(passes):
                engine.step()  # which only counts
        loss = ranks.sum(nll).item() / max(targets, 1.0)
        if self.config.train != "all":
            loss = sum(self.attention_losses.means().values())
        norm = self._own_norm()
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            gate.close()
        loss_spikes = self.spikes.loss_spikes(loss)
        # Where DeepSpeed's optimizer knows the norm, it does before it calls ours.
        gate.ask_before_update(lambda: loss_spikes or self._norm_spikes(norm))
        self.watchdog.beat(f"step {step}: update")
        sum_gradients_held_alike(engine)
        engine.step()
        # DeepSpeed's own optimizers refuse an update whose norm is not finite, on all ranks alike.
        known = float(engine.get_global_grad_norm()) if norm is None else norm
        broken = gate.closed or not engine.was_step_applied()
        spike = gate.refused and not broken
        gate.reset()
        return loss, known, broken, spike

    def _own_norm(self) -> float | None:
        """The global norm of the gradient before clipping; None where DeepSpeed's optimizer takes it."""
        if not self._sharded:
            return gradient_norm(self.engine.module.parameters(), self.grid)
        if self.config.engine.zero_stage == 0:
            mark_gradients(self.engine.module.parameters())
        return None

    def _norm_spikes(self, norm: float | None) -> bool:
        """Whether the gradient norm is a spike, agreed by all ranks; called once a step, before the update."""
        if not self.config.recovery.grad_norm_sigma:
            return False
        norm = float(self.engine.optimizer._global_grad_norm) if norm is None else norm
        vote = torch.tensor(float(self.spikes.norm_spikes(norm)), device=self.ranks.device)
        return self.ranks.sum(vote).item() > 0

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and bits per byte on the first ``training.validation_samples`` held-out samples."""
        training, ranks, grid = self.config.training, self.ranks, self.grid
        samples, micro = min(training.validation_samples, len(self.validation_stream)), training.micro_batch_size
        batches = [range(i, min(i + micro, samples)) for i in range(0, samples, micro)]
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        self.engine.eval()
        # Every rank runs as many forward passes, since ZeRO 3 gathers weights in each; the surplus is not counted.
        for first in range(0, len(batches), grid.samples.size):
            self.watchdog.beat(f"validation after step {self.progress.step}")
            mine = first + grid.samples.rank
            micro_batch = batch(self.validation_stream, batches[min(mine, len(batches) - 1)])
            losses = self._losses(micro_batch)
            if mine < len(batches):
                sums[0] += losses.sum(dtype=torch.float64) * grid.counts_losses
                counted = (micro_batch["targets"] != IGNORED).sum().to(ranks.device)  # type: ignore[union-attr]
                sums[1] += counted * grid.counts_samples
                sums[2] += float(micro_batch["num_bytes"]) * grid.counts_samples
        self.engine.train()
        nll, targets, num_bytes = ranks.sum(sums).tolist()
        return {
            "validation/loss": nll / max(targets, 1.0),
            "validation/bits_per_byte": nll / math.log(2) / max(num_bytes, 1.0),
        }

    @torch.no_grad()
    def probe_attention(self) -> dict[str, float]:
        """Figures of the sparse attention on the first held-out sample: the same text at every step."""
        found: dict[str, Figure] = {}
        self.watchdog.beat(f"probe after step {self.progress.step}")
        self.engine.eval()
        with probe(self.engine.module.layers, found):
            self._losses(batch(self.validation_stream, range(1)))
        self.engine.train()
        if not self.grid.spread:
            return values(found)
        parts = {name: figure.to_json() for name, figure in found.items()}  # each of its heads and tokens
        ranks = self.ranks.gather((self.grid.tensor.rank, parts))
        return of_all_ranks(
            [(place, {name: Figure.from_json(part) for name, part in seen.items()}) for place, seen in ranks]
        )

    def save(self, wait: bool = False) -> None:
        """Copy the state and let it be written in the background; ``wait`` until it is."""
        self.watchdog.beat(f"checkpoint of step {self.progress.step}")
        self._saved(self.writer.wait())
        started = time.perf_counter()
        copy = snapshot(self.engine, self.config, self.ranks, self.progress, self.identity)
        self._copy_seconds = time.perf_counter() - started
        spikes = self.progress.spikes.spikes
        self.writer.start(copy, protect=spikes[0] + 1 if spikes else None)
        if wait:
            self._saved(self.writer.wait())

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            self.console.say(f"  saved {path} in {self.writer.seconds:.1f} s ({self._copy_seconds:.2f} s to copy it)")

    def _roll_back(self) -> None:
        """Too many spikes: go on from a checkpoint of before the first of them, without their batches."""
        self._saved(self.writer.wait())
        after, spikes = self.progress.step, self.progress.spikes
        going_back = partial(load_newest, self.engine, self.config, self.ranks, self.folder, self.identity)
        self.progress, cause = roll_back(
            spikes, self.config, self.ranks, self.folder, self.train_stream, lambda step: going_back(before=step)
        )
        self.spikes.state = self.progress.spikes
        self.loader.forget()
        if self.monitor:
            self.monitor.close()
            self.monitor = self._monitor()
        self.console.say(f"{cause}: rolled back from step {after} to the checkpoint of step {self.progress.step}")

    # -------------------------------------------------------------------------------------------------- parts

    @property
    def _sharded(self) -> bool:
        """Whether one of DeepSpeed's optimizers holds the gradients, and with them their norm."""
        return self.config.engine.zero_stage > 0 or self.config.engine.precision == "bf16"

    def _read_step(self, step: int) -> list[Batch]:
        training, mine = self.config.training, self.grid.samples
        sizes = training.global_batch_size, training.micro_batch_size
        number = batch_number(step, self.progress.spikes.quarantine)
        batches = [batch(self.train_stream, i) for i in sample_indices(number, mine.rank, mine.size, *sizes)]
        return [pinned(b) for b in batches] if self.ranks.device.type == "cuda" else batches

    def _backward(self, batches: list[Batch], scale: float) -> Tensor:
        """Forward and backward pass of one micro batch (of all of a step, by the pipeline): the sum of its losses."""
        if self.pipeline and self.config.train != "all":
            self.pipeline.backward_within(batches, self.attention_losses.take)
            return torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if self.pipeline:
            return self.pipeline.backward(batches, scale)
        (micro_batch,) = batches
        losses = self._losses(micro_batch)
        self.watchdog.beat(f"step {self.progress.step + 1}: backward")
        if self.config.train != "all" and not attached(self.config):
            self.engine.backward(self.attention_losses.take(), scale_wrt_gas=False)
            return losses.sum(dtype=torch.float64)
        self.engine.backward(losses.sum() * scale, scale_wrt_gas=False)  # nor divided by the micro batches
        return losses.detach().sum(dtype=torch.float64)

    def _losses(self, micro_batch: Batch) -> Tensor:
        """Negative log-likelihood of each target of this rank's tokens, 0 where not counted."""
        return self.pipeline.forward(micro_batch) if self.pipeline else self._stage(micro_batch)

    def _stage(self, micro_batch: Batch) -> Tensor:
        """What this rank's part of the model makes of a micro batch: losses, or a stage's activations."""
        device = self.ranks.device
        inputs, targets, borders = (micro_batch[k].to(device, non_blocking=True) for k in ON_DEVICE)
        if borders.is_cuda:
            known = KnownLengths.of(micro_batch["cu_seqlens"])  # else the bound, which is the same in each batch
            tell_lengths(borders, known if known.equal else KnownLengths(self.config.data.sequence_length, False))
        model = self.engine.module if self.pipeline else self.engine
        return model(inputs, targets=targets, cu_seqlens=borders)

    def _stage_shape(self, micro_batch: Batch) -> tuple[int, ...]:
        """Of the activations between two stages."""
        rows, tokens = micro_batch["input_ids"].shape
        return rows, tokens // self.grid.context.size // self.grid.tensor.size, self.config.model.hidden_size

    def _check_skips(self, result: StepResult) -> None:
        if not result.skipped:
            return
        training, skipped = self.config.training, self.progress.skipped_in_a_row
        first = batch_number(self.progress.step - 1, self.progress.spikes.quarantine) * training.global_batch_size
        samples = f"samples {first} to {first + training.global_batch_size - 1}"
        if result.spike:
            self.console.spike(self.progress.step, result, samples, len(self.progress.spikes.spikes))
            return
        self.console.not_finite(self.progress.step, result, samples, skipped)
        if skipped > training.max_skipped_steps:
            if not self.ranks.is_main:
                raise ReportedError("too many skipped steps")
            raise TrainingError(
                f"{skipped} steps in a row had a loss or gradient that is not finite (training.max_skipped_steps is "
                f"{training.max_skipped_steps}), the last on {samples}. Lower optimizer.learning_rate or look at the "
                f"data{self._where_to_go_back()}"
            )

    def _check_end(self) -> None:
        """A run whose weights give no finite loss is saved, but it is not done, also if it is started again."""
        assert self.monitor is not None
        loss, step = self.monitor.latest or (0.0, 0)
        if step == self.progress.step and not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss after the last step, {step}, is {loss}: its checkpoint gives no text. Start a "
                "new run under another name (name=...) with a lower optimizer.learning_rate, or look at the data"
                f"{self._where_to_go_back()}"
            )

    def _where_to_go_back(self) -> str:
        older = [
            path.name for path in checkpoint.checkpoints(self.folder) if checkpoint.step_of(path) < self.progress.step
        ]
        return f"; older checkpoints in {self.folder}: {', '.join(older)}" if older else ""
