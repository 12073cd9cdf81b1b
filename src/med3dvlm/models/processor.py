"""The processor: scans to prepared volumes, texts to tokens, saved beside the weights."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, FeatureExtractionMixin, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from med3dvlm.scan import Preparation, Scan, prepare, read_scan

IMAGE_TOKEN = "<im_patch>"
IGNORED = -100
TOKENIZING = Lock()


class VolumeFeatureExtractor(FeatureExtractionMixin):
    """Scans to volumes (n, 1, D, H, W), by the preparation the model was trained with."""

    model_input_names = ["volumes"]

    def __init__(self, preparation: dict[str, Any] | Preparation | None = None, **kwargs):
        if not isinstance(preparation, dict):
            preparation = preparation.to_dict() if preparation is not None else {}
        self.preparation = preparation
        super().__init__(**kwargs)

    @property
    def settings(self) -> Preparation:
        return Preparation.from_dict(self.preparation)

    def __call__(self, scans: Any, **kwargs) -> BatchFeature:
        return BatchFeature({"volumes": self.volumes(scans)})

    def volumes(self, scans: Any) -> Tensor:
        """(n, 1, D, H, W) float32 of one scan, path, or list of either."""
        several = scans if isinstance(scans, list | tuple) else [scans]
        settings = self.settings
        prepared = [
            prepare(scan if isinstance(scan, Scan) else read_scan(scan), settings)
            for scan in several
        ]
        return torch.from_numpy(np.stack(prepared))


class Med3DVLMProcessor(ProcessorMixin):
    """Preparation and tokenizer of one model, and the words of its prompts.

    Args:
        num_visual_tokens: placeholders in front of each prompt; 0 for a dual encoder.
        prompt_template: `{instruction}` is replaced by the instruction or question.
        max_text_tokens: texts for a dual encoder are cut to this by whole sentences.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        num_visual_tokens: int = 0,
        prompt_template: str = "{instruction}",
        max_text_tokens: int = 512,
        **kwargs,
    ):
        self.num_visual_tokens = num_visual_tokens
        self.prompt_template = prompt_template
        self.max_text_tokens = max_text_tokens
        super().__init__(feature_extractor, tokenizer, **kwargs)

    @property
    def preparation(self) -> Preparation:
        return self.feature_extractor.settings

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """Find our own extractor; the library's search fails where torchvision is missing."""
        if module_name == VolumeFeatureExtractor.__name__:
            return VolumeFeatureExtractor
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    # A published checkpoint can come without its tokenizer, and then still embeds scans; the
    # library's own class insists on one, so three of its methods learn that it may be missing.

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "tokenizer" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs) -> Any:
        if self.tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        return self.to_json_file(Path(save_directory) / "processor_config.json")

    @classmethod
    def from_folder(cls, folder: Path) -> Med3DVLMProcessor:
        """The processor saved in a checkpoint folder, with or without a tokenizer."""
        if (folder / "tokenizer_config.json").is_file():
            return cls.from_pretrained(str(folder), local_files_only=True)
        settings = json.loads((folder / "processor_config.json").read_text("utf-8"))
        preparation = settings.pop("feature_extractor")["preparation"]
        settings.pop("processor_class", None)
        return cls(VolumeFeatureExtractor(preparation), **settings)

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint came without a tokenizer, so it reads no text: put the "
                "tokenizer's files beside the weights."
            )
        return self.tokenizer

    def __call__(self, scans: Any = None, text: Any = None, **kwargs) -> BatchFeature:
        """What the model takes: `volumes` of scans and, of instructions, tokens of prompts."""
        data: dict[str, Any] = {}
        if scans is not None:
            data["volumes"] = self.volumes(scans)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            data.update(self.prompts(texts) if self.num_visual_tokens else self.tokens(texts))
        return BatchFeature(data)

    def volumes(self, scans: Any) -> Tensor:
        """(n, 1, D, H, W) float32 of one scan, path, or list of either."""
        return self.feature_extractor.volumes(scans)

    # --- texts for the dual encoder -----------------------------------------------------------

    def _tokenize(self, texts: str | list[str], **how: Any) -> BatchEncoding:
        """By one thread at a time: padding and truncation are a state of the fast tokenizers."""
        with TOKENIZING:
            return self._needed_tokenizer()(texts, **how)

    def tokens(self, texts: Sequence[str]) -> BatchEncoding:
        """Tokens (n, N) of plain texts, padded on the right, cut by whole sentences."""
        cut = [self.cut_by_sentences(text) for text in texts]
        return self._tokenize(
            cut,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_text_tokens,
            return_tensors="pt",
        )

    def cut_by_sentences(self, text: str) -> str:
        """As many whole sentences from the start as fit in `max_text_tokens`."""

        def fits(part: str) -> bool:
            return len(self._tokenize(part)["input_ids"]) <= self.max_text_tokens

        if fits(text):
            return text
        kept = ""
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            longer = f"{kept} {sentence}".strip()
            if not fits(longer):
                break
            kept = longer
        return kept or text  # one sentence too long: the tokenizer cuts it by tokens

    # --- prompts for the language model -------------------------------------------------------

    def prompt(self, instruction: str) -> str:
        """Placeholders for the visual tokens, then the instruction in its template."""
        words = self.prompt_template.replace("{instruction}", instruction)
        return IMAGE_TOKEN * self.num_visual_tokens + words

    def prompts(self, instructions: Sequence[str]) -> BatchEncoding:
        """Tokens (n, N) of prompts to be continued, padded on the left."""
        return self._tokenize(
            [self.prompt(text) for text in instructions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def prompt_tokens(self, instructions: Sequence[str]) -> list[list[int]]:
        """The tokens of prompts to be continued, without padding."""
        return self._tokenize([self.prompt(text) for text in instructions])["input_ids"]

    def target_tokens(self, targets: Sequence[str]) -> list[list[int]]:
        """The tokens of answers, each with the end token."""
        tokenizer = self._needed_tokenizer()
        found = self._tokenize(list(targets), add_special_tokens=False)["input_ids"]
        return [[*tokens, tokenizer.eos_token_id] for tokens in found]

    def training_batch(self, turns: Sequence[Sequence[tuple[str, str]]]) -> BatchEncoding:
        """Sequences of visual tokens and (instruction, answer) turns about them, for training.

        The turns of a sequence share its visual tokens and nothing else: each sees these and
        itself, at the positions it would have alone. So a scan is looked at once for many
        questions, and each costs what it would alone, less its own copy of the visual tokens.

        Args:
            turns: for each sequence one turn or more.

        Returns:
            input_ids, labels (-100 where nothing counts; answers and end tokens do) and turns
            (which turn of its sequence a token belongs to, from 1; 0 the visual tokens and what
            stands before them; -1 padding), each (n, N), padded on the right; attention_mask,
            (n, N), or, where a sequence has several turns, (n, 1, N, N) with position_ids (n, N).
        """
        rows = [self._training_row(pairs) for pairs in turns]
        length = max(len(row[0]) for row in rows)
        pad = self._needed_tokenizer().pad_token_id
        fills = (pad if pad is not None else 0, IGNORED, -1, 0)
        padded = [
            torch.tensor([row[k] + [fill] * (length - len(row[k])) for row in rows])
            for k, fill in enumerate(fills)
        ]
        batch = dict(zip(("input_ids", "labels", "turns", "position_ids"), padded, strict=True))
        if all(len(pairs) == 1 for pairs in turns):
            del batch["position_ids"]
            batch["attention_mask"] = (batch["turns"] >= 0).long()
        else:
            batch["attention_mask"] = _turns_apart(batch["turns"])
        return BatchEncoding(batch)

    def _training_row(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], ...]:
        """Token ids, labels, turns and positions of one sequence."""
        tokenizer = self._needed_tokenizer()
        ids, labels, numbers, positions = [], [], [], []
        for number, (instruction, answer) in enumerate(pairs, start=1):
            prompt = self._tokenize(self.prompt(instruction))["input_ids"]
            image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            seen = max((i + 1 for i, token in enumerate(prompt) if token == image), default=0)
            said = self._tokenize(answer, add_special_tokens=False)["input_ids"]
            said = [*said, tokenizer.eos_token_id]
            start = 0 if number == 1 else seen
            ids += [*prompt[start:], *said]
            labels += [*[IGNORED] * (len(prompt) - start), *said]
            numbers += [0] * (seen - start) + [number] * (len(prompt) - seen + len(said))
            positions += range(start, len(prompt) + len(said))
        return ids, labels, numbers, positions

    @staticmethod
    def lettered(choices: Sequence[str]) -> list[str]:
        """["A. axial", "B. coronal", ...], the form of the closed answers of M3D-VQA.

        Raises:
            ValueError: for fewer than two or more than 26 choices, or an empty one.
        """
        if not 2 <= len(choices) <= len(string.ascii_uppercase):
            raise ValueError(f"{len(choices)} choices were given: give between 2 and 26.")
        if any(not choice.strip() for choice in choices):
            raise ValueError("a choice is empty: write each choice.")
        return [
            f"{letter}. {c}" for letter, c in zip(string.ascii_uppercase, choices, strict=False)
        ]

    @classmethod
    def closed_question(cls, question: str, choices: Sequence[str]) -> str:
        """The question followed by its choices, as M3D-VQA asks it."""
        return f"{question} Choices: {' '.join(cls.lettered(choices))}"


def _turns_apart(turns: Tensor) -> Tensor:
    """(n, 1, N, N), what each token may attend to: itself, and before it the visual tokens and
    its own turn."""
    causal = torch.ones(turns.shape[1], turns.shape[1], dtype=torch.bool).tril()
    shared = (turns == 0).unsqueeze(1)
    own = turns.unsqueeze(1) == turns.unsqueeze(2)
    return (causal & (shared | own)).unsqueeze(1)
