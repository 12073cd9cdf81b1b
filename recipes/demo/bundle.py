"""Put the trained demo model into the package: half precision, figures, model card.

python recipes/demo/bundle.py            after the stages of `make demo-model`
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

from med3dvlm.cli.common import progress_bar
from med3dvlm.evaluate.phantoms import evaluate_on_phantoms
from med3dvlm.files import atomic_folder
from med3dvlm.hub import load

RUNS = Path("runs/demo")
TARGET = Path("src/med3dvlm/assets/demo")
PARTS = {"language_model": "letters-longer", "dual_encoder": "search"}
STAGES = (
    "contrastive",
    "longer",
    "search",
    "alignment",
    "instruction",
    "letters",
    "letters-longer",
)
LIMIT_MB = 16


def main() -> None:
    with atomic_folder(TARGET) as folder:
        for part, stage in PARTS.items():
            model = load(RUNS / stage).half()
            model.save_pretrained(folder / part)
            model.processor.save_pretrained(folder / part)
        (folder / "README.md").write_text(Path(__file__).with_name("card.md").read_text("utf-8"))
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file()) / 2**20
    if size > LIMIT_MB:
        raise SystemExit(f"{TARGET} is {size:.1f} MB, over the {LIMIT_MB} MB it may have.")
    with progress_bar("evaluating") as progress:
        figures = evaluate_on_phantoms(
            load("demo", part="search"), load("demo", part="language"), progress=progress
        )
    card = TARGET / "README.md"
    text = card.read_text("utf-8")
    text = text.replace("{{figures}}", figures.to_markdown()).replace("{{training}}", _training())
    card.write_text(text, "utf-8")
    (TARGET / "figures.json").write_text(json.dumps(figures.to_dict(), indent=2) + "\n")
    print(f"{TARGET}: {size:.1f} MB")
    print(figures.to_markdown())


def _training() -> str:
    rows = ["| stage | minutes | samples seen | last loss |", "| --- | --- | --- | --- |"]
    for stage in STAGES:
        summary = json.loads((RUNS / stage / "training.json").read_text())
        history = json.loads((RUNS / stage / "history.json").read_text())
        steps = max(entry.get("step", 0) for entry in history)
        seen = steps * summary["recipe"]["training"]["batch_size"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        minutes = summary["metrics"]["train_runtime"] / 60
        rows.append(f"| {stage} | {minutes:.0f} | {seen:,} | {float(losses[-1]):.3f} |")
    return "\n".join([*rows, "", f"Machine: {platform.machine()}, 2 CPU cores, bf16, no GPU."])


if __name__ == "__main__":
    main()
