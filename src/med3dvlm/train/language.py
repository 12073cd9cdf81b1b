"""Stages 2 and 3: the projector learns to speak to the language model, then both to answer.

Alignment and instruction tuning differ in what learns and in the tasks drawn, so a recipe tells
them apart and this one workflow follows it. While the volume encoder is frozen its two token
streams are computed once per study and kept in memory, which makes these stages cheap.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from med3dvlm.data.prompts import CAPTION_PROMPTS, REPORT_PROMPTS
from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Quantisation, Store
from med3dvlm.files import atomic_folder
from med3dvlm.hub import CheckpointError, load, load_exact
from med3dvlm.models import (
    Med3DVLM,
    Med3DVLMConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.models.processor import IGNORED, IMAGE_TOKEN
from med3dvlm.train.contrastive import batches, open_studies, part_settings
from med3dvlm.train.engine import Job, Validation, fit, freeze_all_but, save_result
from med3dvlm.train.ranks import is_main
from med3dvlm.train.recipe import Recipe, RecipeError, TrainingRecipe, check_keys


def train_language(recipe: Recipe, *, progress: Progress | None = None) -> Med3DVLM:
    """Follow an alignment or instruction recipe; the model is also saved in `recipe.output`."""
    job = language_job(recipe, progress=progress)
    metrics = fit(job, recipe)
    if recipe.keep_adapter:
        save_adapter(job.learner, recipe)
    model = job.learner.merge_and_unload() if recipe.lora else job.model
    save_result(model, recipe, metrics, studies=len(job.dataset))
    return model.eval()


def language_job(recipe: Recipe, *, progress: Progress | None = None) -> Job:
    """The model and the studies of an alignment or instruction recipe."""
    if recipe.start is None:
        raise RecipeError("start is missing: name the checkpoint to start from.")
    torch.manual_seed(recipe.training.seed)
    start = load(recipe.start)
    model = start if isinstance(start, Med3DVLM) else _from_dual_encoder(start, recipe)
    if not recipe.train:
        raise RecipeError("train is empty: name the parts that learn, for example projector.")
    freeze_all_but(model, recipe.train)
    learner = _with_lora(model, recipe)
    studies = open_studies(recipe, model.preparation, progress=progress)
    frozen = "vision_encoder" not in recipe.train

    def dataset(store: Store) -> TaskDataset:
        features = encode_store(model, store, progress=progress) if frozen else None
        return TaskDataset(
            store,
            recipe.data.tasks,
            model.config.report_prompt,
            features,
            vary_prompts=recipe.data.vary_prompts,
            seed=recipe.training.seed,
        )

    began = time.monotonic()
    train = dataset(studies.train)
    encoding_s = time.monotonic() - began if frozen else 0.0
    collate = TaskCollator(model.processor, studies.train.quantisation)
    validation = None
    if studies.validation is not None:
        held_out = dataset(studies.validation)
        measure = TaskMeasure(model, held_out, collate, recipe.training)
        validation = Validation(held_out, measure)
    return Job(model, learner, train, collate, validation, encoding_s)


def _from_dual_encoder(dual: VolumeTextDualEncoder, recipe: Recipe) -> Med3DVLM:
    """A new model around a contrastively trained encoder; its tokenizer serves both.

    The language model comes from `model.language_model`, a checkpoint, or is made new from
    `model.text_config`.
    """
    settings = dict(recipe.model)
    tokenizer = dual.processor.tokenizer
    pretrained = settings.pop("language_model", None)
    if pretrained:
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        text = AutoConfig.from_pretrained(pretrained).to_dict()
    else:
        text = part_settings(settings.pop("text_config", {}), default="qwen2")
        text |= {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    check_keys(settings, Med3DVLMConfig().to_dict(), section="model")
    config = Med3DVLMConfig(
        vision_config=dual.config.vision_config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **settings,
    )
    model = Med3DVLM(config)
    model.vision_encoder.load_state_dict(dual.vision_encoder.state_dict())
    if pretrained:
        _load_language_model(model, pretrained, len(tokenizer))
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(dual.preparation),
        tokenizer,
        num_visual_tokens=model.num_visual_tokens,
        prompt_template=config.prompt_template,
    )
    return model


def _load_language_model(model: Med3DVLM, name: str, vocabulary: int) -> None:
    from transformers import AutoModelForCausalLM

    language_model = AutoModelForCausalLM.from_pretrained(name)
    if vocabulary > len(language_model.get_input_embeddings().weight):
        language_model.resize_token_embeddings(vocabulary)
    model.language_model = language_model
    model.config.text_config = language_model.config


def _with_lora(model: Med3DVLM, recipe: Recipe) -> Any:
    if not recipe.lora:
        return model
    from peft import LoraConfig, get_peft_model

    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **recipe.lora}
    linear = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = LoraConfig(
        target_modules=linear, modules_to_save=list(recipe.train) or None, **settings
    )
    return get_peft_model(model, config)


def save_adapter(learner: Any, recipe: Recipe) -> None:
    """PEFT's own format, with the parts that were trained in full, in `<output>/adapter`."""
    if not is_main():
        return
    learner.peft_config["default"].base_model_name_or_path = str(recipe.start)
    with atomic_folder(Path(recipe.output, "adapter")) as folder:
        learner.save_pretrained(folder)


def merge_adapter(adapter: Path, base: str | None = None) -> Med3DVLM:
    """The model that a run with `keep_adapter` ended in, from its adapter and what it began with.

    Args:
        base: the checkpoint the run began with, where it is not any more where the run found it.

    Raises:
        CheckpointError: for a folder that is no adapter, or a base that it does not belong to.
    """
    from peft import PeftConfig, PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is no adapter: it has no adapter_config.json.")
    name = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if name is None:
        raise CheckpointError(f"{adapter} does not say what it was trained on: give --base.")
    model = load_exact(name)
    if not isinstance(model, Med3DVLM):
        raise CheckpointError(f"{name} is no language model: give --base, what {adapter} began as.")
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} does not belong to {name}: give --base, what its run began with."
        ) from error


@torch.inference_mode()
def encode_store(
    model: Med3DVLM, store: Store, *, batch_size: int = 32, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's (low, high) streams of every study, float16: (n, N, C) each."""
    model.eval()
    low_parts, high_parts = [], []
    for volumes in store.batches(batch_size, progress=progress):
        low, high = model.encode(model._to_device(volumes))
        low_parts.append(low.half().cpu().numpy())
        high_parts.append(high.half().cpu().numpy())
    return np.concatenate(low_parts), np.concatenate(high_parts)


def task_examples(
    study: dict[str, Any], report_prompt: str, *, vary: bool = False
) -> dict[str, list[tuple[str, str]]]:
    """(instruction, answer) pairs of one study by task.

    Args:
        report_prompt: the one that the model will be asked with.
        vary: other wordings of it and of the captions' prompt too.
    """
    reports = dict.fromkeys((report_prompt, *REPORT_PROMPTS)) if vary else (report_prompt,)
    captions = CAPTION_PROMPTS if vary else CAPTION_PROMPTS[:1]
    pairs: dict[str, list[tuple[str, str]]] = {}
    if study["report"]:
        pairs["report"] = [(prompt, study["report"]) for prompt in reports]
    if study["caption"]:
        pairs["caption"] = [(prompt, study["caption"]) for prompt in captions]
    for question in study["questions"]:
        text, answer = question["text"], question["answer"]
        if question["choices"]:
            text = Med3DVLMProcessor.closed_question(text, question["choices"])
            answer = f"{question['answer_choice']}. {answer}"
        pairs.setdefault(question["kind"], []).append((text, answer))
    return pairs


class TaskDataset(Dataset):
    """Item `epoch · len + i`: study i's volume or streams, with one of its tasks.

    The task is drawn by the given weights; as for `PairDataset`, by the item's number alone.
    """

    def __init__(
        self,
        store: Store,
        tasks: dict[str, float],
        report_prompt: str,
        features: tuple[np.ndarray, np.ndarray] | None,
        *,
        vary_prompts: bool = False,
        seed: int = 0,
    ):
        self.vary_prompts = vary_prompts
        self.store = store
        self.tasks = tasks
        self.report_prompt = report_prompt
        self.features = features
        self.seed = seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = number % len(self)
        random = np.random.default_rng((self.seed, number))
        examples = task_examples(
            self.store.study(index), self.report_prompt, vary=self.vary_prompts
        )
        names = [name for name, weight in self.tasks.items() if weight and name in examples]
        if not names:
            raise RecipeError(
                f"{self.store.location}: study {self.store.ids[index]} has none of the tasks "
                f"{', '.join(self.tasks)}; name it in data.skip, or add a task."
            )
        weights = np.array([self.tasks[name] for name in names])
        task = names[random.choice(len(names), p=weights / weights.sum())]
        instruction, answer = examples[task][random.integers(len(examples[task]))]
        item: dict[str, Any] = {
            "id": self.store.ids[index],
            "instruction": instruction,
            "answer": answer,
        }
        if self.features is None:
            item["volume"] = self.store.stored(index)
        else:
            item["low"], item["high"] = self.features[0][index], self.features[1][index]
        return item


class TaskCollator:
    """Items to a batch; labels count the answer and its end token only."""

    def __init__(self, processor: Med3DVLMProcessor, quantisation: Quantisation):
        self.processor = processor
        self.quantisation = quantisation

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.processor.training_batch(
            [item["instruction"] for item in items], [item["answer"] for item in items]
        )
        out = dict(batch)
        if "volume" in items[0]:
            volumes = torch.from_numpy(np.stack([item["volume"] for item in items]))
            out["volumes"] = self.quantisation.decode(volumes).unsqueeze(1)
        else:
            for stream in ("low", "high"):
                stacked = np.stack([item[stream] for item in items])
                out[stream] = torch.from_numpy(stacked).float()
        return out


class TaskMeasure:
    """The mean loss over the tokens of the answers, and what the model writes about a few."""

    def __init__(
        self, model: Med3DVLM, dataset: TaskDataset, collate: TaskCollator, settings: TrainingRecipe
    ):
        self.model, self.dataset, self.collate, self.settings = model, dataset, collate, settings

    def __call__(self, learner: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        """`learner` is the model, or the model within its adapters."""
        total = tokens = 0.0
        size, device = self.settings.batch_size, self.model.device
        for batch, _ in batches(self.dataset, self.collate, size, device):
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += learner(**batch).loss.item() * counted
            tokens += counted
        return {"loss": total / max(tokens, 1)}, self._samples()

    def _samples(self) -> list[dict[str, str]]:
        count = min(self.settings.samples, len(self.dataset))
        if not count:
            return []
        items = [self.dataset[i] for i in range(count)]
        batch = {k: v.to(self.model.device) for k, v in self.collate(items).items()}
        if "volumes" in batch:
            visual = self.model.get_visual_tokens(batch["volumes"])
        else:
            visual = self.model.projector(batch["low"], batch["high"])
        written = self.model.ask(visual, [item["instruction"] for item in items])
        written = [written] if isinstance(written, str) else written
        names = ("id", "instruction", "answer")
        return [
            {**{name: item[name] for name in names}, "written": str(text)}
            for item, text in zip(items, written, strict=True)
        ]
