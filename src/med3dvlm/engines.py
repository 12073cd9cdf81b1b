"""Engines that serve language models, vLLM and SGLang, fed with prompts that hold a scan.

The language model runs in the engine, as the plain model that it is (`language_model/` of an
export). Beside it a small model (`reader/`: encoder, projector and the table of embeddings) turns
a scan and an instruction into prompt embeddings, and those are sent. See docs/serving-engines.md.
"""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from med3dvlm.files import atomic_folder
from med3dvlm.models import Med3DVLM

LANGUAGE_MODEL, READER = "language_model", "reader"


class EngineError(ValueError):
    """An engine that does not answer, or not with a text."""


def export_for_engines(model: Med3DVLM, folder: Path) -> None:
    """Write `language_model/`, a plain causal LM with its tokenizer, and `reader/`.

    Raises:
        ValueError: for a quantized model, whose layers no engine knows.
    """
    if model.config.language_bits is not None:
        raise ValueError(
            f"model {model.label!r} is quantized, in a form that engines do not read: export the "
            "whole one and let the engine quantize."
        )
    with atomic_folder(folder) as temporary:
        model.language_model.save_pretrained(temporary / LANGUAGE_MODEL)
        model.processor.tokenizer.save_pretrained(temporary / LANGUAGE_MODEL)
        reader = reader_of(model)
        reader.save_pretrained(temporary / READER)
        reader.processor.save_pretrained(temporary / READER)


def reader_of(model: Med3DVLM) -> Med3DVLM:
    """The same model over a language model without layers: it embeds prompts and writes nothing."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    text.tie_word_embeddings = config.tie_word_embeddings = True  # saves the last layer, unused
    reader = Med3DVLM(config).to(model.language_model.dtype).eval()
    reader.vision_encoder, reader.projector = model.vision_encoder, model.projector
    reader.set_input_embeddings(model.get_input_embeddings())
    reader.tie_weights()
    reader.processor = model.processor
    return reader


# --- requests ---------------------------------------------------------------------------------


def as_base64(embeddings: Tensor) -> str:
    """The form in which vLLM's server takes `prompt_embeds`: a saved tensor, in base64."""
    file = io.BytesIO()
    torch.save(embeddings.cpu().clone(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _vllm(embeddings: Tensor, model: str, max_new_tokens: int) -> tuple[str, dict[str, Any]]:
    body = {"model": model, "prompt_embeds": as_base64(embeddings)}
    return "/v1/completions", {**body, "max_tokens": max_new_tokens, "temperature": 0}


def _sglang(embeddings: Tensor, model: str, max_new_tokens: int) -> tuple[str, dict[str, Any]]:
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0}
    return "/generate", {"input_embeds": embeddings.float().tolist(), "sampling_params": sampling}


ENGINES: dict[str, tuple[Callable[..., tuple[str, dict[str, Any]]], Callable[[Any], str]]] = {
    "vllm": (_vllm, lambda answer: answer["choices"][0]["text"]),
    "sglang": (_sglang, lambda answer: answer["text"]),
}


def complete(
    embeddings: Tensor,
    url: str,
    *,
    engine: str = "vllm",
    model: str = LANGUAGE_MODEL,
    max_new_tokens: int = 256,
    timeout: float = 300,
) -> str:
    """What a running engine writes after a prompt, greedily.

    Args:
        embeddings: (tokens, width), from :meth:`Med3DVLM.prompt_embeddings`.
        url: of the server, such as http://localhost:8000.
        engine: "vllm" (served with --enable-prompt-embeds) or "sglang" (with
            --disable-radix-cache, for its cache goes by token ids).
        model: the name by which vLLM serves the language model.
        timeout: seconds.

    Raises:
        EngineError: where none answers, or not with a text.
        ValueError: for an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}.")
    make, read = ENGINES[engine]
    path, body = make(embeddings, model, max_new_tokens)
    request = Request(
        url.rstrip("/") + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urlopen(request, timeout=timeout) as response:  # a URL that the caller chose
            return read(json.load(response)).strip()
    except HTTPError as error:
        reason = " ".join(error.read(500).decode("utf-8", "replace").split())
        raise EngineError(f"{engine} at {url} refused ({error.code}): {reason}.") from error
    except (OSError, HTTPException) as error:
        raise EngineError(f"no {engine} answers at {url} ({error}): start it first.") from error
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{engine} at {url} answered without a text.") from error
