"""Kill training ten times in each stage, at random moments, and compare with runs left alone.

    python benchmarks/kill_training.py [--kills 10] [--seed 0]

Every run is the command line in a process of its own, ended by SIGKILL. CPU, fp32; tiny models on
phantoms. Then the same on a disk that is full: a file system of one save and a half, where mounting
one is permitted. Exit status 1 if a weight differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

TRAINING = {
    "batch_size": 2,
    "max_steps": 60,
    "save_steps": 1,
    "log_steps": 10,
    "loggers": [],
    "learning_rate": 1.0e-3,
    "ema": 0.9,
}
PREPARATION = {
    "size": [16, 32, 32],
    "window": [[-1000, 0], [1000, 1]],
    "spacing_mm": [24.0, 12.6, 12.6],
    "fit": "pad",
    "antialias": True,
}
STAGES = {
    "contrastive": {
        "preparation": PREPARATION,
        "tokenizer_size": 500,
        "model": {
            "vision_config": {"variant": "t", "depths": [1] * 5, "channels": [8, 8, 8, 16, 16]},
            "text_config": {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
            "projection_dim": 16,
        },
    },
    "alignment": {
        "train": ["projector", "language_model"],
        "model": {
            "low_tokens": [6, 4],
            "high_tokens": [3, 4],
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            },
        },
    },
    "instruction": {"train": ["projector", "vision_encoder"], "lora": {"r": 2}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipes = write_recipes(Path(folder))
        differing = 0
        for stage, recipe in recipes.items():
            command(stage, recipe, Path(folder, stage)).wait()
            output = Path(folder, f"{stage}-killed")
            within = TRAINING["max_steps"] / (2 * options.kills) * step_seconds(Path(folder, stage))
            kill_often(stage, recipe, output, options.kills, random.Random(options.seed), within)
            differing += report(stage, Path(folder, stage), output)
        fill_disk(Path(folder), recipes["contrastive"], one_save(Path(folder, "contrastive")))
    raise SystemExit(int(differing > 0))


def write_recipes(folder: Path) -> dict[str, Path]:
    recipes, before = {}, None
    data = {"store": str(folder / "phantoms"), "phantoms": 8, "workers": 1}
    for stage, settings in STAGES.items():
        whole = {"stage": stage, "output": "?", "data": data, "training": TRAINING, **settings}
        if before:
            whole["start"] = str(folder / before)
        recipes[stage] = folder / f"{stage}.yaml"
        recipes[stage].write_text(yaml.safe_dump(whole))
        before = stage
    return recipes


def command(stage: str, recipe: Path, output: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "med3dvlm.cli", "train", stage, str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*arguments, f"output={output}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )


def step_seconds(output: Path) -> float:
    """Of a run left alone, a step with the save after it."""
    metrics = json.loads((output / "training.json").read_text("utf-8"))["metrics"]
    return metrics["train_runtime"] / TRAINING["max_steps"]


def kill_often(
    stage: str, recipe: Path, output: Path, kills: int, moments: random.Random, within: float
) -> None:
    """Each run is killed at most `within` seconds after its first new checkpoint.

    A few steps: after half a second, say, the kills of a fast run would use up its steps.
    """
    checkpoints = output / "checkpoints"
    half = 0
    for _ in range(kills):
        begun = sorted(checkpoints.glob("checkpoint-*"))
        run = command(stage, recipe, output)
        while run.poll() is None and sorted(checkpoints.glob("checkpoint-*")) == begun:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, within))
        if run.poll() is not None:
            raise SystemExit(f"{stage}: the run ended before it was killed {kills} times.")
        run.send_signal(signal.SIGKILL)
        run.communicate()
        half += (checkpoints / "unfinished").exists()
    if command(stage, recipe, output).wait():
        raise SystemExit(f"{stage}: the run could not go on after {kills} kills.")
    print(f"{stage}: {kills} kills, {half} of them in the middle of a save", flush=True)


def report(stage: str, whole: Path, killed: Path) -> int:
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    print(f"{stage}: {len(one)} tensors, {len(differing)} differ from the run left alone")
    return len(differing) + (one.keys() != other.keys())


def one_save(output: Path) -> int:
    """Bytes of a checkpoint of a finished run."""
    saved = next((output / "checkpoints").glob("checkpoint-*"))
    return sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())


def fill_disk(folder: Path, recipe: Path, save: int) -> None:
    """The same run where one save and a half have room: the next is written beside the last."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * save // 2}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        print("full disk: mounting a tmpfs is not permitted here, not tried")
        return
    try:
        run = command("contrastive", recipe, disk / "run")
        _, errors = run.communicate()
        sentence = next(x for x in errors.decode().splitlines() if x.startswith("Error:"))
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").glob("*"))
        print(f"full disk: exit status {run.returncode}; left: {', '.join(kept)}; {sentence}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main()
