"""The training loop."""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nsa.config import Config
from nsa.data.loader import SampleStream, batch
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData
from nsa.models import count_parameters, training_flops_per_token
from nsa.ops.geometry import KnownLengths, tell_lengths
from nsa.parallel.grid import build_grid
from nsa.parallel.partition import gradient_norm, mark_gradients
from nsa.parallel.pipeline import Pipeline
from nsa.training import checkpoint
from nsa.training.attention_probe import probe
from nsa.training.balance import Balance
from nsa.training.cuda_graphs import forget_recordings
from nsa.training.deepspeed_config import deepspeed_config, micro_batches_per_step
from nsa.training.distributed import COLLECTIVE_TIMEOUT, Ranks, ReportedError, initialize, make_deterministic
from nsa.training.engine import build_engine, dense_attention_of, sum_gradients_held_alike
from nsa.training.exit_codes import DONE, INTERRUPTED, REQUEUE
from nsa.training.loading import ON_DEVICE, Batch, StepLoader, pinned, sample_indices
from nsa.training.monitor import Monitor
from nsa.training.performance import memory_gib, peak_flops
from nsa.training.quarantine import TrainingError, roll_back
from nsa.training.run_folder import RunFolder
from nsa.training.saver import Saver
from nsa.training.saving import Identity, load_newest, restore, snapshot, state_bytes
from nsa.training.schedule import learning_rate
from nsa.training.signals import StopRequest
from nsa.training.spikes import SpikeDetector, batch_number
from nsa.training.watchdog import Watchdog

IGNORED = -100  # targets that are not counted
STOPS = (INTERRUPTED, REQUEUE)  # exit codes of a stop; who interrupts decides


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, alike on all ranks.

    Attributes:
        loss: nats per counted target of the global batch.
        grad_norm: global, before clipping. learning_rate: of the step.
        skipped: loss or gradient was not finite, or a spike; weights and moments are as before. spike: the latter.
        data_seconds: waited for the batch. stop: exit code that a rank was asked to stop with, or 0.
        sent: bytes that this rank sent to others of its replica, by what they are.
        experts: figures of the load of experts.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    data_seconds: float
    stop: int
    sent: dict[str, int]
    experts: dict[str, float]
    spike: bool = False


class Trainer:
    """One run: everything from the configuration to the last checkpoint.

    Args:
        ranks: the processes that train together; None: those that the environment describes.

    Raises:
        ValueError: what the user can mend, with what to do.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.began = time.monotonic()
        self.config = config
        self.ranks = ranks or initialize()
        training, world_size = config.training, self.ranks.world_size
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
        self.pipeline = None
        if self.grid.pipeline.size > 1:
            self.pipeline = Pipeline(self.engine, self.grid.pipeline, lambda b: self._stage(b), self._stage_shape)
        self.identity = Identity(prepared.fingerprint, prepared.tokenizer.path)
        self.progress = restore(self.engine, config, self.ranks, self.folder, self.identity)
        self.spikes = SpikeDetector(config.recovery, self.progress.spikes)
        self.ranks.on_main(lambda: checkpoint.check_space(self.folder, state_bytes(config)))
        self.saver = Saver(self.ranks, self.folder, config.checkpoint.keep_last)
        recovery, rank = config.recovery, self.ranks.rank
        self.watchdog = Watchdog(rank, world_size, self.folder, recovery.hang_seconds, recovery.lost_seconds)

        self.tokens_per_step = training.global_batch_size * config.data.sequence_length
        self.flops = training_flops_per_token(config.model, config.attention, config.data.sequence_length)
        self.peak, self.peak_source = peak_flops(self.ranks.device, config.engine.precision)
        self.monitor = Monitor(self.folder, self.progress.step) if self.ranks.is_main else None

    def _open_folder(self, deepspeed_json: dict[str, Any]) -> Path:
        self._run_folder = RunFolder(self.config)  # kept: it holds the lock
        return self._run_folder.path

    def _prepare(self) -> Path:
        prepared = prepare(self.config.data, self.config.seed)
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
        self._greet()
        if self.ranks.is_main:
            self._run_folder.label(config, deepspeed_config(config, self.ranks.world_size))
        stop = StopRequest(self.folder / "STOP" if self.ranks.is_main else None, training.max_hours, self.began)
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
                if self.saver.finished and not self.saver.failed:
                    self._saved(self.saver.wait())
                if self.spikes.exhausted:
                    self._roll_back()
                    since, seconds, data_seconds = self.progress.step, 0.0, 0.0
                    continue

                metrics: dict[str, float] = {}
                logged = step % training.log_every == 0 or last
                if logged:
                    metrics |= self._step_metrics(result, seconds / (step - since), data_seconds / (step - since))
                if step % training.probe_every == 0 or step == 1 or step == training.steps:
                    metrics |= self.probe_attention()
                if step % training.validation_every == 0 or step == training.steps:
                    metrics |= self.validate()
                if self.monitor and metrics:
                    self.monitor.write(step, metrics)
                if self.ranks.is_main and (logged or "validation/loss" in metrics):
                    print(self._line(result, metrics), flush=True)
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
            stop.restore()
            self.loader.close()
            if self.monitor:
                self.monitor.close()
        assert saved == self.progress.step
        stop.forget_file()
        self.watchdog.close()
        self._farewell(reason)
        return code

    def close(self) -> None:
        """Leave the process group and unlock the run folder."""
        forget_recordings()
        torch.distributed.destroy_process_group()
        if self.ranks.is_main:
            self._run_folder.close()

    def train_step(self, stop: StopRequest) -> StepResult:
        """One step: forward and backward of every micro batch, then the update, unless something is not finite.

        The loss is the sum of the negative log-likelihoods of all targets that are counted in the global batch, over
        their number: neither ranks nor micro batches nor the packing of documents change it.
        """
        config, engine, ranks, grid = self.config, self.engine, self.ranks, self.grid
        started = time.perf_counter()
        grid.traffic.take()  # of validation
        step = self.progress.step
        beat = self.watchdog.beat
        beat(f"step {step + 1}: data")
        batches = self.loader(step, last=step + 1 == config.training.steps)
        data_seconds = time.perf_counter() - started

        rate = learning_rate(config.optimizer, step, config.training.steps)
        client = getattr(engine.optimizer, "optimizer", engine.optimizer)  # inside of what shards it
        for group in client.param_groups:
            group["lr"] = rate
        counted = sum(int(torch.count_nonzero(b["targets"] != IGNORED)) for b in batches) * grid.counts_samples
        asked = stop.asked()[0]
        votes = [counted, self.saver.failed, *(asked == code for code in STOPS)]
        targets, failed, *stops = ranks.sum(torch.tensor(votes, dtype=torch.float64, device=ranks.device)).tolist()
        if failed:
            self.saver.wait()  # raises, on all ranks

        nll = torch.zeros((), dtype=torch.float64, device=ranks.device)
        norm = None
        scale = grid.replicas.size / max(targets, 1.0)  # DeepSpeed averages gradients over the replicas
        passes = [batches] if self.pipeline else [[micro_batch] for micro_batch in batches]
        for i, together in enumerate(passes):
            beat(f"step {step + 1}: micro batch {i}")
            nll += self._backward(together, scale) * grid.counts_losses
            if i + 1 == len(passes):
                loss = ranks.sum(nll).item() / max(targets, 1.0)
                if not self._sharded:
                    norm = gradient_norm(engine.module.parameters(), grid)
                elif self.config.engine.zero_stage == 0:
                    mark_gradients(engine.module.parameters())
                client.skip = not math.isfinite(loss) or (norm is not None and not math.isfinite(norm))
                spike = self.spikes.loss_spikes(loss)
                # Where DeepSpeed's optimizer knows the norm, it does before it calls ours.
                client.refuse = lambda norm=norm, spike=spike: spike or self._norm_spikes(norm)
                beat(f"step {step + 1}: update")
                sum_gradients_held_alike(engine)
            engine.step()
        # DeepSpeed's own optimizers know the norm, and refuse an update whose norm is not finite on all ranks alike.
        norm = float(engine.get_global_grad_norm()) if norm is None else norm
        broken = client.skip or not engine.was_step_applied()
        spike = bool(client.refused) and not broken
        client.skip, client.refuse, client.refused = False, None, None

        experts = self.balance.end_step(update=not (broken or spike))
        self.progress.step += 1
        self.progress.updates += not (broken or spike)
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if broken else 0
        if not broken:
            self.spikes.record(step, loss, norm, spike)
        stopped = next((code for code, votes_for in zip(STOPS, stops, strict=True) if votes_for), 0)
        sent = grid.traffic.take()
        return StepResult(loss, norm, rate, broken or spike, data_seconds, stopped, sent, experts, spike)

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
        metrics: dict[str, float] = {}
        self.watchdog.beat(f"probe after step {self.progress.step}")
        self.engine.eval()
        with probe(self.engine.module.layers, metrics):
            self._losses(batch(self.validation_stream, range(1)))
        self.engine.train()
        if not self.grid.spread:
            return metrics
        seen = self.ranks.gather(metrics)  # each of its heads and tokens
        names = dict.fromkeys(name for figures in seen for name in figures)
        return {n: fmean(figures[n] for figures in seen if n in figures) for n in names}

    def save(self, wait: bool = False) -> None:
        """Copy the state and let it be written in the background; ``wait`` until it is."""
        self.watchdog.beat(f"checkpoint of step {self.progress.step}")
        self._saved(self.saver.wait())
        started = time.perf_counter()
        copy = snapshot(self.engine, self.config, self.ranks, self.progress, self.identity)
        self._copy_seconds = time.perf_counter() - started
        spikes = self.progress.spikes.spikes
        self.saver.start(copy, protect=spikes[0] + 1 if spikes else None)
        if wait:
            self._saved(self.saver.wait())

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            self._say(f"  saved {path} in {self.saver.seconds:.1f} s ({self._copy_seconds:.2f} s to copy it)")

    def _roll_back(self) -> None:
        """Too many spikes: go on from a checkpoint of before the first of them, without their batches."""
        self._saved(self.saver.wait())
        after, spikes = self.progress.step, self.progress.spikes
        going_back = partial(load_newest, self.engine, self.config, self.ranks, self.folder, self.identity)
        self.progress, told = roll_back(
            spikes, self.config, self.ranks, self.folder, self.train_stream, lambda step: going_back(before=step)
        )
        self.spikes.state = self.progress.spikes
        self.loader.forget()
        if self.monitor:
            self.monitor.close()
            self.monitor = Monitor(self.folder, self.progress.step)
        self._say(f"{told}: rolled back from step {after} to the checkpoint of step {self.progress.step}")

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
        if self.pipeline:
            return self.pipeline.backward(batches, scale)
        (micro_batch,) = batches
        losses = self._losses(micro_batch)
        self.watchdog.beat(f"step {self.progress.step + 1}: backward")
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
            tell_lengths(borders, KnownLengths.of(micro_batch["cu_seqlens"]))
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
            spikes = len(self.progress.spikes.spikes)
            self._say(
                f"step {self.progress.step}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.4g}: a spike, "
                f"the update is skipped on all ranks ({samples}; {spikes} spikes, at most "
                f"{self.config.recovery.max_spikes} per {self.config.recovery.window} steps)"
            )
            return
        self._say(
            f"step {self.progress.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, the update "
            f"is skipped on all ranks ({samples}; {skipped} in a row, at most {training.max_skipped_steps})"
        )
        if skipped > training.max_skipped_steps:
            if not self.ranks.is_main:
                raise ReportedError("too many skipped steps")
            raise TrainingError(
                f"{skipped} steps in a row had a loss or gradient that is not finite (training.max_skipped_steps is "
                f"{training.max_skipped_steps}), the last on {samples}. Lower optimizer.learning_rate or look at the "
                f"data; checkpoints in {self.folder} hold finite weights"
            )

    def _step_metrics(self, result: StepResult, seconds: float, data_seconds: float) -> dict[str, float]:
        tokens_per_second = self.tokens_per_step / seconds
        metrics = {
            "train/learning_rate": result.learning_rate,
            "train/tokens": self.progress.step * self.tokens_per_step,
            "train/skipped_steps": self.progress.step - self.progress.updates,
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds,
            "perf/data_seconds": data_seconds,
            "perf/memory_gib": memory_gib(self.ranks.device),
        }
        for what, num_bytes in result.sent.items():
            metrics[f"comm/{what.replace('/', '_')}_mib"] = num_bytes / 2**20
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):  # JSON knows no NaN
            metrics |= {"train/loss": result.loss, "train/grad_norm": result.grad_norm} | result.experts
        for kind, flops in self.flops.items():
            metrics[f"perf/mfu_{kind}"] = flops * tokens_per_second / (self.peak * self.ranks.world_size)
        return metrics

    def _line(self, result: StepResult, metrics: dict[str, float]) -> str:
        steps, step = self.config.training.steps, self.progress.step
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        parts.append(f"loss {result.loss:.4f}")
        parts.append(f"lr {result.learning_rate:.2e}  grad {result.grad_norm:.3f}")
        if "perf/tokens_per_second" in metrics:
            left = (steps - step) * metrics["perf/step_seconds"]
            parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tok/s  eta {_duration(left)}")
        if "validation/loss" in metrics:
            loss, bits = metrics["validation/loss"], metrics["validation/bits_per_byte"]
            parts.append(f"validation loss {loss:.4f}  bpb {bits:.4f}")
        return "  |  ".join(parts)

    def _greet(self) -> None:
        config, ranks = self.config, self.ranks
        parameters = count_parameters(config.model, config.attention)
        active = f" ({parameters['active'] / 1e6:.2f} M active)" if config.model.moe else ""
        self._say(
            f"{config.name}: {parameters['total'] / 1e6:.2f} M parameters{active}, "
            f"{ranks.world_size} x {ranks.device.type} ({self.grid.describe()}), "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
            f"{micro_batches_per_step(config, ranks.world_size)} micro batches of {config.training.micro_batch_size} "
            f"x {config.data.sequence_length} tokens; peak {self.peak / 1e12:.3g} TFLOP/s ({self.peak_source})"
        )
        if self.dense_attention:
            self._say(f"dense attention: {self.dense_attention}")
        if self.progress.step:
            self._say(f"resumed {self.folder} after step {self.progress.step}")

    def _farewell(self, reason: str) -> None:
        steps = self.config.training.steps
        if self.progress.step < steps:
            why = f" ({reason})" if reason else ""  # a signal to another rank
            self._say(f"stopped after step {self.progress.step} of {steps}{why}; run the same command to go on")
        else:
            self._say(f"done: {steps} steps in {self.folder}")

    def _say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
