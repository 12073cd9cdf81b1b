"""Stages 2 and 3: the projector learns to speak to the language model, then both to answer.

Alignment and instruction tuning differ in what learns and in the tasks drawn, so a recipe tells
them apart and this one workflow follows it. While the volume encoder is frozen its two token
streams are computed once per study and kept in memory, which makes these stages cheap.
"""

from __future__ import annotations

import time
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from med3dvlm.data.augment import VolumeDecoder
from med3dvlm.data.prompts import CAPTION_PROMPTS, REPORT_PROMPTS
from med3dvlm.data.sources import Progress
from med3dvlm.hub import load
from med3dvlm.models import (
    Med3DVLM,
    Med3DVLMConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.models.processor import IGNORED, IMAGE_TOKEN
from med3dvlm.train.contrastive import batches, part_settings
from med3dvlm.train.engine import (
    Job,
    Validation,
    fit,
    freeze_all_but,
    learn_in_fp32,
    save_result,
)
from med3dvlm.train.lora import merged, quantize, save_adapter, with_adapters
from med3dvlm.train.ranks import encoder_at_work
from med3dvlm.train.recipe import (
    LOSS_AVERAGES,
    Recipe,
    RecipeError,
    TrainingRecipe,
    check_keys,
)
from med3dvlm.train.studies import AnyStore, open_studies


def train_language(job: Job, recipe: Recipe) -> Med3DVLM | None:
    """Train what `language_job` made; the model is also saved in `recipe.output`."""
    model, metrics = fit(job, recipe)
    if model is None:
        return None
    if recipe.keep_adapter:
        save_adapter(model, recipe)
    if recipe.lora is not None:
        model = merged(model, recipe, lambda: start_model(recipe))
    save_result(model, recipe, metrics, studies=len(job.dataset))
    return model.eval()


def language_job(recipe: Recipe, *, progress: Progress | None = None) -> Job:
    """The model and the studies of an alignment or instruction recipe."""
    if not recipe.train:
        raise RecipeError("train is empty: name the parts that learn, for example projector.")
    model = start_model(recipe)
    if recipe.quantize:
        quantize(model)
    if recipe.data.turns > 1 and model.config.prompt_layout == "published":
        raise RecipeError(
            "data.turns: the prompt layout of published checkpoints takes the first token of one "
            "question, so there can be no second; leave it at 1."
        )
    learner = model if recipe.lora is None else with_adapters(model, recipe)
    studies = open_studies(recipe, model.preparation, progress=progress)
    frozen = "vision_encoder" not in recipe.train

    def dataset(store: AnyStore, turns: int = recipe.data.turns) -> TaskDataset:
        features = encode_store(model, store, progress=progress) if frozen else None
        return TaskDataset(
            store,
            recipe.data.tasks,
            model.config.report_prompt,
            features,
            vary_prompts=recipe.data.vary_prompts,
            shuffle_choices=recipe.data.shuffle_choices,
            turns=turns,
            seed=recipe.training.seed,
        )

    began = time.monotonic()
    train = dataset(studies.train)
    encoding_s = time.monotonic() - began if frozen else 0.0
    collate = TaskCollator(model.processor, average=recipe.training.loss_average)
    decode = VolumeDecoder(studies.train.quantisation)
    validation = None
    if studies.validation is not None:
        held_out = dataset(studies.validation, turns=1)
        by_token = TaskCollator(model.processor)
        measure = TaskMeasure(model, held_out, by_token, decode, recipe.training)
        validation = Validation(held_out, measure)
    return Job(model, learner, train, collate, decode, validation, encoding_s)


def start_model(recipe: Recipe) -> Med3DVLM:
    """What the run begins with: the same each time, for what is new is drawn from the seed.

    Raises:
        RecipeError: for a part to train that it does not have, and settings that it does not read.
    """
    if recipe.start is None:
        raise RecipeError("start is missing: name the checkpoint to start from.")
    torch.manual_seed(recipe.training.seed)
    start = load(recipe.start, device="cpu")
    if not isinstance(start, Med3DVLM):
        model = _from_dual_encoder(start, recipe)
    elif recipe.model:
        raise RecipeError(
            f"model: {recipe.start} is a language model with settings of its own: leave it out, or "
            "start from a dual encoder."
        )
    else:
        model = start
    freeze_all_but(model, recipe.train)
    learn_in_fp32(model)
    return model


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
    if pretrained and "text_config" in settings:
        raise RecipeError("model.text_config: model.language_model has one already; drop one.")
    if "vision_config" in settings:
        raise RecipeError("model.vision_config: start has its own: leave it out.")
    check_keys(settings, Med3DVLMConfig().to_dict(), section="model")
    config = Med3DVLMConfig(
        vision_config=dual.config.vision_config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **settings,
    )
    model = Med3DVLM(config, without_language_model=bool(pretrained))
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


@torch.inference_mode()
def encode_store(
    model: Med3DVLM, store: AnyStore, *, batch_size: int = 32, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's (low, high) streams of every study, float16: (n, N, C) each."""
    low_parts, high_parts = [], []
    with encoder_at_work(model):
        for volumes in store.batches(batch_size, progress=progress):
            low, high = model.encode(model._to_device(volumes))
            low_parts.append(low.half().cpu().numpy())
            high_parts.append(high.half().cpu().numpy())
    return np.concatenate(low_parts), np.concatenate(high_parts)


def task_examples(
    study: dict[str, Any],
    report_prompt: str,
    *,
    vary: bool = False,
    shuffle: np.random.Generator | None = None,
) -> dict[str, list[tuple[str, str]]]:
    """(instruction, answer) pairs of one study by task.

    Args:
        report_prompt: the one that the model will be asked with.
        vary: other wordings of it and of the captions' prompt too.
        shuffle: puts the choices of closed questions in an order of its own; as stored without.
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
            choices, right = question["choices"], ascii_uppercase.index(question["answer_choice"])
            if shuffle is not None:
                order = shuffle.permutation(len(choices))
                choices, right = [choices[k] for k in order], list(order).index(right)
            text = Med3DVLMProcessor.closed_question(text, choices)
            answer = f"{ascii_uppercase[right]}. {answer}"
        pairs.setdefault(question["kind"], []).append((text, answer))
    return pairs


class TaskDataset(Dataset):
    """Item `epoch · len + i`: study i's volume or streams, with some of its tasks.

    The tasks are drawn by the given weights; as for `PairDataset`, by the item's number alone.

    Args:
        shuffle_choices: of closed questions, anew each time that one is asked.
        turns: how many are drawn; none twice, so a study with few of them gives fewer.
    """

    def __init__(
        self,
        store: AnyStore,
        tasks: dict[str, float],
        report_prompt: str,
        features: tuple[np.ndarray, np.ndarray] | None,
        *,
        vary_prompts: bool = False,
        shuffle_choices: bool = False,
        turns: int = 1,
        seed: int = 0,
    ):
        self.vary_prompts = vary_prompts
        self.shuffle_choices = shuffle_choices
        self.turns = turns
        self.store = store
        self.tasks = tasks
        self.report_prompt = report_prompt
        self.features = features
        self.seed = seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = self.store.drawn(number)
        random = np.random.default_rng((self.seed, number))
        examples = task_examples(
            self.store.study(index),
            self.report_prompt,
            vary=self.vary_prompts,
            shuffle=random if self.shuffle_choices else None,
        )
        names = [name for name, weight in self.tasks.items() if weight and name in examples]
        if not names:
            raise RecipeError(
                f"{self.store.location}: study {self.store.ids[index]} has none of the tasks "
                f"{', '.join(self.tasks)}; name it in data.skip, or add a task."
            )
        weights = np.array([self.tasks[name] for name in names])
        tasks = [names[k] for k in random.choice(len(names), self.turns, p=weights / weights.sum())]
        drawn = [examples[task][random.integers(len(examples[task]))] for task in tasks]
        item: dict[str, Any] = {"id": self.store.ids[index], "turns": list(dict.fromkeys(drawn))}
        if self.features is None:
            item["stored"] = self.store.stored(index)
        else:
            item["low"], item["high"] = self.features[0][index], self.features[1][index]
        return item


class TaskCollator:
    """Items to a batch; labels count the answer and its end token only.

    Args:
        average: "token": all tokens of a batch count alike, so that a report counts as much as
            fifty yes or no; "answer": all answers do; "root": between the two, an answer of n
            tokens counts √n (the square averaging of InternVL 2.5, arXiv 2412.05271).
    """

    def __init__(self, processor: Med3DVLMProcessor, *, average: str = "token"):
        self.processor = processor
        self.power = LOSS_AVERAGES[average]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        out = dict(self.processor.training_batch([item["turns"] for item in items]))
        turns = out.pop("turns")
        if self.power:
            counted = (out["labels"] != IGNORED).float()
            counts = counted.new_zeros(len(items), int(turns.max()) + 1)
            counts.scatter_add_(1, turns.clamp(min=0), counted)  # of each answer, its tokens
            lengths = counts.gather(1, turns.clamp(min=0)).clamp(min=1)
            out["loss_weights"] = counted / lengths**self.power
        if "stored" in items[0]:
            out["stored"] = torch.from_numpy(np.stack([item["stored"] for item in items]))
        else:
            for stream in ("low", "high"):
                stacked = np.stack([item[stream] for item in items])
                out[stream] = torch.from_numpy(stacked).float()
        return out


class TaskMeasure:
    """The mean loss over the tokens of the answers, and what the model writes about a few."""

    def __init__(
        self,
        model: Med3DVLM,
        dataset: TaskDataset,
        collate: TaskCollator,
        decode: VolumeDecoder,
        settings: TrainingRecipe,
    ):
        self.model, self.dataset, self.settings = model, dataset, settings
        self.collate, self.decode = collate, decode

    def __call__(self, learner: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        """`learner` is the model, or the model within its adapters."""
        total = tokens = 0.0
        size, device = self.settings.batch_size, self.model.device
        for batch, _ in batches(self.dataset, self.collate, self.decode, size, device):
            counted = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += learner(**batch).loss.item() * counted
            tokens += counted
        return {"loss": total / max(tokens, 1)}, self._samples()

    def _samples(self) -> list[dict[str, str]]:
        count = min(self.settings.samples, len(self.dataset))
        if not count:
            return []
        items = [self.dataset[i] for i in range(count)]
        size, device = len(items), self.model.device
        ((batch, _),) = batches(items, self.collate, self.decode, size, device)
        if "volumes" in batch:
            visual = self.model.get_visual_tokens(batch["volumes"])
        else:
            visual = self.model.project(batch["low"], batch["high"])
        asked = [item["turns"][0] for item in items]
        written = self.model.ask(visual, [instruction for instruction, _ in asked])
        return [
            {"id": item["id"], "instruction": turn[0], "answer": turn[1], "written": str(text)}
            for item, turn, text in zip(items, asked, written, strict=True)
        ]
