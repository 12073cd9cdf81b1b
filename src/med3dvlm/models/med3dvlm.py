"""Med3DVLM: encoder, projector and a causal language model (arXiv 2503.20047, section 3.3).

    volume (B, 1, D, H, W) -> encoder -> low, high streams -> projector -> N visual tokens
    prompt: N placeholders, then the words; the visual tokens take the placeholders' places.

The language model is any causal LM of transformers, chosen by `text_config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from med3dvlm.models.checkpoint import HasProcessor, as_config
from med3dvlm.models.dcformer import init_encoder_weights
from med3dvlm.models.projector import make_projector

if TYPE_CHECKING:
    from med3dvlm.scan import Scan

PROMPT_LAYOUTS = ("placeholder", "published")
REPORT_PROMPT = "Please write the report of this scan."


class Med3DVLMConfig(PretrainedConfig):
    """Settings of a :class:`Med3DVLM`.

    Args:
        vision_config: of a :class:`DCFormer` or :class:`ViT3D`, as an object or a dict.
        text_config: of any causal language model of transformers.
        projector: "mixer", or a baseline: "linear", "mlp", "low_high_mlp".
        low_tokens, high_tokens: token counts after each mixer layer.
        projector_residual: residuals in the mixer where the sizes allow (not published).
        image_token_id: id of the placeholder `<im_patch>`.
        prompt_layout: "placeholder" puts the N visual tokens where the N placeholders stand.
            "published" puts them one position later, as the released weights were trained: the
            first placeholder keeps its own embedding and the question's first token is lost.
        prompt_template: how an instruction becomes a prompt; `{instruction}` is replaced.
        report_prompt: the instruction that asks for a report.
    """

    model_type = "med3dvlm"
    sub_configs = {  # pyright: ignore[reportAssignmentType]
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: PretrainedConfig | dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        projector: str = "mixer",
        low_tokens: list[int] | tuple[int, ...] = (192, 128),
        high_tokens: list[int] | tuple[int, ...] = (64, 128),
        projector_residual: bool = False,
        image_token_id: int | None = None,
        prompt_layout: str = "placeholder",
        prompt_template: str = "{instruction}",
        report_prompt: str = REPORT_PROMPT,
        **kwargs,
    ):
        if prompt_layout not in PROMPT_LAYOUTS:
            raise ValueError(
                f"prompt_layout {prompt_layout!r} is unknown: use 'placeholder' or, for published "
                "weights, 'published'."
            )
        self.vision_config = as_config(vision_config, default="med3dvlm_dcformer")
        self.text_config = as_config(text_config, default="qwen2")
        self.projector = projector
        self.low_tokens = list(low_tokens)
        self.high_tokens = list(high_tokens)
        self.projector_residual = projector_residual
        self.image_token_id = image_token_id
        self.prompt_layout = prompt_layout
        self.prompt_template = prompt_template
        self.report_prompt = report_prompt
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def weighted_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, *, count: Tensor | int | None = None
) -> Tensor:
    """The weighted mean cross-entropy of the next tokens.

    Args:
        logits: (B, N, vocabulary).
        labels: (B, N), -100 where none counts.
        weights: (B, N), 0 where none counts.
        count: labels in all the parts of an accumulated batch, whose losses are then summed.
    """
    labels, weights = labels[:, 1:], weights[:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    here = (labels >= 0).sum()
    return (each * weights).sum() / weights.sum() * here / (here if count is None else count)


class Answer(str):
    """The text of an answer, with what the model thinks of it.

    Attributes:
        confidence: with choices, the chosen one's share of the likelihood; else the geometric
            mean of the probabilities of the answer's tokens. Not calibrated.
        choices: (choice, share of the likelihood) in the order given; empty for open questions.
    """

    confidence: float
    choices: list[tuple[str, float]]

    def __new__(
        cls, text: str, *, confidence: float, choices: Sequence[tuple[str, float]] = ()
    ) -> Answer:
        answer = super().__new__(cls, text)
        answer.confidence = confidence
        answer.choices = list(choices)
        return answer


class Med3DVLM(PreTrainedModel, GenerationMixin, HasProcessor):
    """Reads a scan and writes: reports and answers."""

    config_class = Med3DVLMConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "Qwen2DecoderLayer", "LlamaDecoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_cache_class = True

    def __init__(self, config: Med3DVLMConfig):
        super().__init__(config)
        vision = config.vision_config
        self.vision_encoder = AutoModel.from_config(vision)
        self.projector = make_projector(
            config.projector,
            stream_tokens=tuple(vision.stream_tokens),
            stream_channels=tuple(vision.stream_channels),
            width_out=config.text_config.hidden_size,
            low_tokens=config.low_tokens,
            high_tokens=config.high_tokens,
            residual=config.projector_residual,
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_encoder_weights(module, std=0.02)

    @property
    def num_visual_tokens(self) -> int:
        return int(self.projector.num_tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    # --- from a volume to visual tokens -------------------------------------------------------

    def encode(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, D, H, W) -> low (B, N_low, C_low) and high (B, N_high, C_high) streams."""
        return self.vision_encoder.streams(self.vision_encoder(volumes))

    def get_visual_tokens(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) prepared volumes -> (B, N, width of the language model)."""
        return self.projector(*self.encode(volumes))

    # --- transformers' contract: forward and generate -----------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        volumes: Tensor | None = None,
        low: Tensor | None = None,
        high: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, N, vocabulary), and the loss where labels are given.

        Give one of: `volumes`; `low` and `high`, the encoder's streams where they were computed
        before; `visual_tokens`, the projector's output; or none, for text alone. `loss_weights`
        (B, N) say what each label counts in the loss, a weighted mean; without, they count alike.
        """
        if visual_tokens is None and low is not None and high is not None:
            visual_tokens = self.projector(low, high)
        if visual_tokens is None and volumes is not None:
            visual_tokens = self.get_visual_tokens(volumes)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds.")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if visual_tokens is not None:
                inputs_embeds = self._place(visual_tokens, input_ids, inputs_embeds)
        weighted = labels is not None and loss_weights is not None
        out = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=None if weighted else labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if weighted:
            out["loss"] = weighted_loss(
                out.logits, labels, loss_weights, count=kwargs.get("num_items_in_batch")
            )
        return out

    def _place(self, visual_tokens: Tensor, input_ids: Tensor, embeds: Tensor) -> Tensor:
        """Put N visual tokens (B, N, width) into the embedded prompt (B, L, width)."""
        is_placeholder = input_ids == self.config.image_token_id
        n = visual_tokens.shape[1]
        if not bool((is_placeholder.sum(dim=1) == n).all()):
            found = sorted(set(is_placeholder.sum(dim=1).tolist()))
            raise ValueError(
                f"a prompt holds {found} image placeholders where the projector makes {n} visual "
                "tokens: build prompts with the model's processor."
            )
        first = is_placeholder.int().argmax(dim=1, keepdim=True)  # (B, 1)
        if self.config.prompt_layout == "published":
            first = first + 1
        positions = first + torch.arange(n, device=first.device)  # (B, N)
        index = positions.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
        return embeds.scatter(1, index, visual_tokens.to(embeds.dtype))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        volumes: Tensor | None = None,
        low: Tensor | None = None,
        high: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs.update(volumes=volumes, low=low, high=high, visual_tokens=visual_tokens)
        return inputs

    # --- what people call ---------------------------------------------------------------------

    @torch.inference_mode()
    def see(self, scans: Scan | str | Sequence[Scan | str]) -> Tensor:
        """Visual tokens (n, N, width) of scans, to pass to `report` and `ask` more than once."""
        return self.get_visual_tokens(self._to_device(self.processor.volumes(scans)))

    def report(
        self,
        scan: Scan | str | Tensor | Sequence[Scan | str],
        *,
        prompt: str | None = None,
        max_new_tokens: int = 256,
        streamer: Any = None,
        **generation: Any,
    ) -> Any:
        """Draft a report; a list of scans gives a list of reports, in one batch.

        Args:
            scan: a scan, a path, a list of either, or visual tokens from :meth:`see`.
            prompt: another instruction than the config's `report_prompt`.
            streamer: a transformers streamer that is fed the tokens as they come (one scan).
            generation: options of transformers' `generate`; greedy where none is given.
        """
        instruction = prompt or self.config.report_prompt
        visual, single = self._visual(scan)
        answers = self._write(
            visual,
            [instruction] * len(visual),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **generation,
        )
        return answers[0] if single else answers

    def ask(
        self,
        scan: Scan | str | Tensor | Sequence[Scan | str],
        question: str | Sequence[str],
        choices: Sequence[str] | None = None,
        *,
        max_new_tokens: int = 128,
        streamer: Any = None,
        **generation: Any,
    ) -> Any:
        """Answer a question about a scan; lists of scans or questions give a list of answers.

        One scan with several questions is encoded once. With `choices`, each choice is scored by
        its likelihood and the likeliest is the answer.

        Raises:
            ValueError: for an empty question, fewer than two choices, lists of different
                lengths, or a question longer than the language model's context.
        """
        visual, one_scan = self._visual(scan)
        questions = [question] if isinstance(question, str) else list(question)
        if len(visual) == 1 and len(questions) > 1:
            visual = visual.expand(len(questions), -1, -1)
        if len(questions) == 1 and len(visual) > 1:
            questions = questions * len(visual)
        if len(questions) != len(visual):
            raise ValueError(
                f"{len(visual)} scans with {len(questions)} questions: give one question, or one "
                "for each scan."
            )
        for text in questions:
            if not text.strip():
                raise ValueError("the question is empty: write one.")
        if choices is not None:
            answers = [
                self._choose(visual[i : i + 1], text, list(choices))
                for i, text in enumerate(questions)
            ]
        else:
            answers = self._write(
                visual, questions, max_new_tokens=max_new_tokens, streamer=streamer, **generation
            )
        return answers[0] if one_scan and isinstance(question, str) else answers

    def _visual(self, scan: Any) -> tuple[Tensor, bool]:
        """Visual tokens, and whether a single scan was given."""
        if isinstance(scan, Tensor):
            return scan, len(scan) == 1
        single = not isinstance(scan, list | tuple)
        return self.see(scan), single

    @torch.inference_mode()
    def _write(
        self,
        visual: Tensor,
        instructions: list[str],
        *,
        max_new_tokens: int,
        streamer: Any = None,
        **generation: Any,
    ) -> list[Answer]:
        prompts = self.processor.prompts(instructions).to(self.device)
        self._check_length(prompts["input_ids"].shape[1])
        settings = self._greedy()
        settings.update(
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **generation,
        )
        out = self.generate(
            **prompts, visual_tokens=visual, generation_config=settings, streamer=streamer
        )
        new = out.sequences[:, prompts["input_ids"].shape[1] :]
        log_probs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        taken = log_probs.gather(-1, new.unsqueeze(-1)).squeeze(-1)  # (B, new tokens)
        counted = self._until_end(new)
        confidence = ((taken * counted).sum(1) / counted.sum(1).clamp(min=1)).exp()
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Answer(text.strip(), confidence=c)
            for text, c in zip(texts, confidence.tolist(), strict=True)
        ]

    def _greedy(self) -> GenerationConfig:
        """Greedy by default, whatever a published generation config says about sampling."""
        text = self.config.text_config
        tokenizer = self.processor.tokenizer
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else text.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        return GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=pad)

    def _until_end(self, tokens: Tensor) -> Tensor:
        """1 for every new token up to and with the first end token, 0 after: (B, N)."""
        ended = (tokens == self._greedy().eos_token_id).int().cumsum(1)
        before = F.pad(ended, (1, 0))[:, :-1]
        return (before == 0).float()

    @torch.inference_mode()
    def _choose(self, visual: Tensor, question: str, choices: list[str]) -> Answer:
        lettered = self.processor.lettered(choices)
        prompt = self.processor.closed_question(question, choices)
        shares = self.likelihoods(visual, prompt, lettered)
        best = max(range(len(choices)), key=shares.__getitem__)
        return Answer(
            lettered[best],
            confidence=shares[best],
            choices=list(zip(choices, shares, strict=True)),
        )

    @torch.inference_mode()
    def likelihoods(self, visual: Tensor, instruction: str, targets: list[str]) -> list[float]:
        """How likely each text follows the instruction, as shares that add up to 1.

        Args:
            visual: (1, N, width), from :meth:`see`.
        """
        batch = self.processor.training_batch([[(instruction, target)] for target in targets])
        batch = batch.to(self.device)
        self._check_length(batch["input_ids"].shape[1])
        logits = self(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            visual_tokens=visual.expand(len(targets), -1, -1),
        ).logits
        labels = batch["labels"][:, 1:]
        log_probs = logits[:, :-1].float().log_softmax(-1)
        taken = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (taken * (labels >= 0)).sum(1).softmax(0).tolist()

    def _check_length(self, length: int) -> None:
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(
                f"the question with its {self.num_visual_tokens} visual tokens is {length} tokens "
                f"long, the language model reads {limit}: shorten the question."
            )
