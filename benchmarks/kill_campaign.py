"""Kill a training run again and again with SIGKILL, at random moments; it must end as the run that nobody touched.

    python benchmarks/kill_campaign.py --kills 50

Trains a tiny model on a little of Python's own text, one CPU process, a checkpoint every other step. Half of the kills
aim at a save (they wait for the temporary folder, then up to 40 ms more), half at any moment after the first step.
After each kill the newest checkpoint must verify. A run that reaches its end must equal the untouched one: every
weight, moment, generator and counter, and every logged loss. Then the next run starts, until there were enough kills.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nsa.training import checkpoint  # noqa: E402 - after the path

STEPS = 40
CONFIG = """
name: run
model: {vocab_size: 400, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16,
        intermediate_size: 48, max_position: 128}
attention: {kind: [nsa, dense], compress_length: 8, compress_stride: 4, block_size: 8, num_blocks: 4, window: 16}
data: {sequence_length: 64, tokenizer: {vocab_size: 400}, validation_fraction: 0.2}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
training: {global_batch_size: 4, micro_batch_size: 2, validation_every: 10, validation_samples: 4, probe_every: 20}
checkpoint: {every: 2}
engine: {precision: fp32}
"""


class Campaign:
    def __init__(self, folder: Path, overrides: list[str], seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        (folder / "tiny.yaml").write_text(CONFIG)
        source = {"name": "text", "kind": "files", "path": f"{sysconfig.get_path('stdlib')}/json/*.py"}
        self.command = [sys.executable, "-m", "nsa.train", str(folder / "tiny.yaml"), f"training.steps={STEPS}"]
        self.command += [f"data.sources=[{json.dumps(source)}]", f"data.cache_dir={folder / 'cache'}", *overrides]

    def start(self, output: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, f"output_dir={output}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def life(self, output: Path) -> str:
        """Start the command and kill it at a random moment: "steps", "save", or "done" if it got to its end first."""
        process = self.start(output)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step"):
                break
        if self.random.random() < 0.5:
            for _ in range(self.random.randrange(1, 4)):  # not always the first save
                self._wait_for_save(output / "run", process)
            time.sleep(self.random.uniform(0, 0.04))
        else:
            time.sleep(self.random.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.stdout.close()
        if process.wait() == 0:
            return "done"
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run failed by itself ({process.returncode}):\n{''.join(lines)}{rest}")
        return "save" if list((output / "run").glob("step_*.tmp")) else "steps"

    @staticmethod
    def _wait_for_save(run: Path, process: subprocess.Popen[str]) -> None:
        for wanted in (False, True):  # its beginning
            while process.poll() is None and bool(list(run.glob("step_*.tmp"))) != wanted:
                time.sleep(0.0005)


def state(run: Path) -> dict[str, object]:
    """All that the end of a run is: file hashes of its last checkpoint, and the losses of all its steps."""
    last = run / checkpoint.folder_name(STEPS)
    checkpoint.verify(last)
    manifest = json.loads((last / checkpoint.MANIFEST).read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in manifest.items() if name != "config.yaml"}  # names output_dir
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "train/loss", "train/grad_norm", "validation/loss")
    return {"files": hashes, "metrics": [{key: m.get(key) for key in keys} for m in metrics]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.zero_stage=3")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()

    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill_campaign_"))
    try:
        campaign = Campaign(folder, options.overrides, options.seed)
        reference = campaign.start(folder / "reference")
        output = reference.communicate()[0]
        if reference.returncode:
            raise SystemExit(f"the untouched run failed:\n{output}")
        expected = state(folder / "reference" / "run")

        kills: Counter[str] = Counter()
        runs = equal = 0
        while kills.total() < options.kills:
            runs += 1
            target = folder / f"run_{runs}"
            while (moment := campaign.life(target)) != "done":
                kills[moment] += 1
                newest = checkpoint.latest_complete(target / "run")
                at = newest.name if newest else "the start"
                print(f"kill {kills.total()}: during {moment}; run {runs} resumes from {at}", flush=True)
            same = state(target / "run") == expected
            equal += same
            print(f"run {runs} is done: {'bitwise equal' if same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "kills": kills.total(),
        "kills_during_steps": kills["steps"],
        "kills_during_saves": kills["save"],
        "runs": runs,
        "runs_bitwise_equal": equal,
        "overrides": options.overrides,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
