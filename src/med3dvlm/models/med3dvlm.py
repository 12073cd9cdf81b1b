"""Med3DVLM: encoder, projector and a causal language model (arXiv 2503.20047, section 3.3).

    volume (B, 1, D, H, W) -> encoder -> low, high streams -> projector -> N visual tokens
    prompt: N placeholders, then the words; the visual tokens take the placeholders' places.

The language model is any causal LM of transformers, chosen by `text_config`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

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
    StoppingCriteria,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from med3dvlm.models.checkpoint import HasProcessor, as_config
from med3dvlm.models.dcformer import init_encoder_weights
from med3dvlm.models.decoding import (
    Recent,
    Watch,
    content_of,
    left_padded,
    score,
    score_plainly,
    shares_prefixes,
    state_of,
    write,
)
from med3dvlm.models.projector import init_projector_weights, make_projector
from med3dvlm.models.quantized import BITS, quantize_linear_layers
from med3dvlm.scan import Scan, read_scan

PROMPT_LAYOUTS = ("placeholder", "published")
REPORT_PROMPT = "Please write the report of this scan."
SCANS_KEPT = 16  # of which visual tokens, keys and values are remembered


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
        language_bits: 8 where the linear layers of the language model's blocks hold 8-bit
            weights (`med3dvlm model quantize`); None where they are whole.
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
        language_bits: int | None = None,
        **kwargs,
    ):
        if language_bits not in (None, *BITS):
            raise ValueError(f"language_bits {language_bits!r} is unknown: use 8 or nothing.")
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
        self.language_bits = language_bits
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


@cache
def cache_argument(language_model: type[nn.Module]) -> str:
    """What it calls the cache of keys and values: transformers renamed it in 5.24."""
    names = inspect.signature(language_model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def weighted_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, *, total: Tensor | float | None = None
) -> Tensor:
    """The weighted mean cross-entropy of the next tokens.

    Args:
        logits: (B, N, vocabulary).
        labels: (B, N), -100 where none counts.
        weights: (B, N), 0 where none counts.
        total: the sum of the weights, the first column apart, in all the parts of an accumulated
            batch, whose losses are then summed.
    """
    labels, weights = labels[:, 1:], weights[:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return (each * weights).sum() / (weights.sum() if total is None else total)


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


class _Watched(StoppingCriteria):
    """Tells `watch` the last tokens of the texts that go on, and ends those that it names."""

    def __init__(self, watch: Watch, *, end: int):
        self.watch, self.end = watch, end
        self.ended: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        going = [row for row in range(len(tokens)) if row not in self.ended]
        self.ended.update(self.watch(going, [tokens[row] for row in going]))
        self.ended.update(row for row in going if tokens[row] == self.end)
        return torch.tensor([row in self.ended for row in range(len(tokens))]).to(input_ids.device)


class Med3DVLM(PreTrainedModel, GenerationMixin, HasProcessor):
    """Reads a scan and writes: reports and answers."""

    config_class = Med3DVLMConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "Qwen2DecoderLayer", "LlamaDecoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_cache_class = True

    def __init__(self, config: Med3DVLMConfig, *, without_language_model: bool = False):
        """
        Args:
            without_language_model: leaves it on the meta device, for one that is put in its place.
        """
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
        with torch.device("meta") if without_language_model else nullcontext():
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.language_bits is not None:
            quantize_linear_layers(self.language_model, empty=True)
        self.seen: Recent[Tensor] = Recent(SCANS_KEPT)
        self.prefixes: Recent[Any] = Recent(SCANS_KEPT)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_encoder_weights(module, std=0.02)
        if module is getattr(self, "projector", None):
            init_projector_weights(module)

    @property
    def num_visual_tokens(self) -> int:
        return int(self.projector.num_tokens)

    # What was remembered is known by the weights' addresses and versions; moving or replacing the
    # weights may bring both back with other values, so it is forgotten then.

    def forget(self) -> None:
        """Forget the scans that were seen."""
        self.seen.kept.clear()
        self.prefixes.kept.clear()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(fn, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super().load_state_dict(*args, **kwargs)

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
        encoder = self.vision_encoder
        return encoder.streams(encoder(volumes, last=encoder.config.language_reads))

    def get_visual_tokens(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) prepared volumes -> (B, N, width of the language model)."""
        return self.project(*self.encode(volumes))

    def project(self, low: Tensor, high: Tensor) -> Tensor:
        """The encoder's streams, of whatever precision, -> (B, N, width)."""
        dtype = next(self.projector.parameters()).dtype
        return self.projector(low.to(dtype), high.to(dtype))

    def quantize(self) -> None:
        """Hold the linear layers of the language model's blocks in 8 bits from now on.

        Raises:
            ValueError: if they are already.
        """
        if self.config.language_bits is not None:
            raise ValueError(f"model {self.label!r} is quantized already: give the whole one.")
        quantize_linear_layers(self.language_model)
        self.config.language_bits = 8

    def prompt_embeddings(self, scan: Scan | str | Tensor, instruction: str) -> Tensor:
        """What the language model reads of a prompt about one scan: (tokens, width).

        Fed to the language model alone, here or in another engine, they are continued with the
        same words. `scan` may be visual tokens (1, N, width) from :meth:`see`.
        """
        visual, _ = self._visual(scan)
        with torch.inference_mode():
            ids = self.processor.prompts([instruction])["input_ids"].to(self.device)
            return self._place(visual, ids, self.get_input_embeddings()(ids))[0]

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
        `num_items_in_batch` is what the Trainer divides the loss of an accumulated batch by: the
        sum of its weights, or, without those, its number of labels.
        """
        if visual_tokens is None and low is not None and high is not None:
            visual_tokens = self.project(low, high)
        if visual_tokens is None and volumes is not None:
            visual_tokens = self.get_visual_tokens(volumes)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds.")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if visual_tokens is not None:
                inputs_embeds = self._place(visual_tokens, input_ids, inputs_embeds)
        if past_key_values is not None:
            kwargs[cache_argument(type(self.language_model))] = past_key_values
        weighted = labels is not None and loss_weights is not None
        out = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=None if weighted else labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if weighted:
            out["loss"] = weighted_loss(
                out.logits, labels, loss_weights, total=kwargs.get("num_items_in_batch")
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
        """Visual tokens (n, N, width) of scans, to pass to `report` and `ask` more than once.

        Those of the scans seen last are remembered, by the scans' content and for as long as the
        weights stay as they are, so that asking about one again costs no encoder time.
        """
        given = scans if isinstance(scans, list | tuple) else [scans]
        read = [scan if isinstance(scan, Scan) else read_scan(scan) for scan in given]

        def look(places: Sequence[int]) -> Sequence[Tensor]:
            volumes = self.processor.volumes([read[place] for place in places])
            return [row.clone() for row in self.get_visual_tokens(self._to_device(volumes))]

        if self.training:
            return torch.stack(list(look(range(len(read)))))
        known = (state_of(self), self.preparation.fingerprint())
        return torch.stack(self.seen.get([(*known, content_of(scan)) for scan in read], look))

    def report(
        self,
        scan: Scan | str | Tensor | Sequence[Scan | str],
        *,
        prompt: str | None = None,
        max_new_tokens: int = 256,
        streamer: Any = None,
        watch: Watch | None = None,
        **generation: Any,
    ) -> Any:
        """Draft a report; a list of scans gives a list of reports, written side by side.

        Args:
            scan: a scan, a path, a list of either, or visual tokens from :meth:`see`.
            prompt: another instruction than the config's `report_prompt`.
            streamer: a transformers streamer that is fed the tokens as they come (one scan).
            watch: is told the tokens of each report as they come, and may end reports early.
            generation: options of transformers' `generate`; greedy where none is given.
        """
        instruction = prompt or self.config.report_prompt
        visual, single = self._visual(scan)
        answers = self._write(
            visual,
            [instruction] * len(visual),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            watch=watch,
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
        watch: Watch | None = None,
        **generation: Any,
    ) -> Any:
        """Answer a question about a scan; lists of scans or questions give a list of answers.

        One scan with several questions is encoded once. With `choices`, each choice is scored by
        its likelihood and the likeliest is the answer. `watch` is told the tokens of each answer
        as they come, and may end answers early.

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
            answers = self.choose(visual, questions, [choices] * len(questions))
        else:
            answers = self._write(
                visual,
                questions,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                watch=watch,
                **generation,
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
        **how: Any,
    ) -> list[Answer]:
        written = self._write_tokens(visual, instructions, max_new_tokens=max_new_tokens, **how)
        tokens, confidences = zip(*written, strict=True)
        texts = self.processor.tokenizer.batch_decode(list(tokens), skip_special_tokens=True)
        return [
            Answer(text.strip(), confidence=c) for text, c in zip(texts, confidences, strict=True)
        ]

    def _write_tokens(
        self,
        visual: Tensor,
        instructions: list[str],
        *,
        max_new_tokens: int,
        streamer: Any = None,
        watch: Watch | None = None,
        **generation: Any,
    ) -> list[tuple[list[int], float]]:
        """The tokens of each answer, and its confidence."""
        prompts = self.processor.prompt_tokens(instructions)
        self._check_length(max(map(len, prompts)))
        if generation or not shares_prefixes(self, prompts):
            return self._generate(
                visual,
                prompts,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                watch=watch,
                **generation,
            )
        settings = self._greedy()
        if streamer is not None:
            streamer.put(left_padded(prompts, settings.pad_token_id, "cpu"))
        written = write(
            self,
            visual,
            prompts,
            max_new_tokens=max_new_tokens,
            end=settings.eos_token_id,
            streamer=streamer,
            watch=watch,
        )
        if streamer is not None:
            streamer.end()
        return written

    def _generate(
        self,
        visual: Tensor,
        prompts: list[list[int]],
        *,
        streamer: Any = None,
        watch: Watch | None = None,
        **generation: Any,
    ) -> list[tuple[list[int], float]]:
        """What `write` gives, by the library: with its options, and for any language model."""
        settings = self._greedy()
        settings.update(return_dict_in_generate=True, output_logits=True, **generation)
        input_ids = left_padded(prompts, settings.pad_token_id, self.device)
        is_token = left_padded([[1] * len(prompt) for prompt in prompts], 0, self.device)
        out = self.generate(
            input_ids=input_ids,
            attention_mask=is_token,
            visual_tokens=visual,
            generation_config=settings,
            streamer=streamer,
            stopping_criteria=[_Watched(watch, end=settings.eos_token_id)] if watch else None,
        )
        new = out.sequences[:, input_ids.shape[1] :]
        log_probs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        taken = log_probs.gather(-1, new.unsqueeze(-1)).squeeze(-1)  # (B, new tokens)
        counted = self._until_end(new)
        confidence = ((taken * counted).sum(1) / counted.sum(1).clamp(min=1)).exp()
        return list(zip(new.tolist(), confidence.tolist(), strict=True))

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

    def choose(
        self, visual: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[Answer]:
        """The likeliest of its choices for each question, all scored together.

        Args:
            visual: (n, N, width), from :meth:`see`, one row a question.
        """
        lettered = [self.processor.lettered(of) for of in choices]
        closed = self.processor.closed_question
        asked = [closed(text, of) for text, of in zip(questions, choices, strict=True)]
        answers = []
        for texts, of, shares in zip(
            lettered, choices, self.score(visual, asked, lettered), strict=True
        ):
            best = max(range(len(of)), key=shares.__getitem__)
            scored = list(zip(of, shares, strict=True))
            answers.append(Answer(texts[best], confidence=shares[best], choices=scored))
        return answers

    @torch.inference_mode()
    def score(
        self, visual: Tensor, instructions: Sequence[str], targets: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """How likely each of its texts follows each instruction, as shares that add up to 1.

        Args:
            visual: (n, N, width), from :meth:`see`, one row an instruction.
        """
        prompts = self.processor.prompt_tokens(instructions)
        following = [self.processor.target_tokens(of) for of in targets]
        self._check_length(
            max(len(p) + max(map(len, of)) for p, of in zip(prompts, following, strict=True))
        )
        how = score if shares_prefixes(self, prompts) else score_plainly
        return [of.softmax(0).tolist() for of in how(self, visual, prompts, following)]

    def likelihoods(self, visual: Tensor, instruction: str, targets: list[str]) -> list[float]:
        """:meth:`score` of one instruction, with visual tokens (1, N, width)."""
        return self.score(visual, [instruction], [targets])[0]

    def _check_length(self, length: int) -> None:
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(
                f"the question with its {self.num_visual_tokens} visual tokens is {length} tokens "
                f"long, the language model reads {limit}: shorten the question."
            )
