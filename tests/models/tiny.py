"""The smallest real models: a few thousand weights, a real tokenizer, a real preparation."""

from __future__ import annotations

import numpy as np
import torch

from med3dvlm.models import (
    DualEncoderConfig,
    Med3DVLM,
    Med3DVLMConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.models.processor import IMAGE_TOKEN
from med3dvlm.scan import Preparation, Scan
from med3dvlm.train.tokenizer import train_tokenizer

SIZE = (32, 32, 32)
PREPARATION = Preparation(size=SIZE, intensity="minmax", fit="stretch")
TEXTS = [
    "There is a small left pleural effusion. No consolidation. The heart is enlarged.",
    "Which side is the effusion on? left right both Choices: A. B. C. D.",
    "Please write the report of this scan.",
]
VISION = {
    "model_type": "med3dvlm_dcformer",
    "variant": "tiny-test",
    "depths": [1, 1, 1, 1, 1],
    "channels": [8, 8, 8, 16, 16],
    "volume_size": list(SIZE),
}


def tokenizer():
    return train_tokenizer(TEXTS, size=400)


def vlm(seed: int = 0, **settings) -> Med3DVLM:
    torch.manual_seed(seed)
    words = tokenizer()
    config = Med3DVLMConfig(
        vision_config=VISION,
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        low_tokens=[6, 4],
        high_tokens=[3, 4],
        image_token_id=words.convert_tokens_to_ids(IMAGE_TOKEN),
        prompt_template="{instruction}\n",
        **settings,
    )
    model = Med3DVLM(config).eval()
    # Far from its small initialisation, so that what is written depends on what is seen.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(PREPARATION),
        words,
        num_visual_tokens=model.num_visual_tokens,
        prompt_template=config.prompt_template,
    )
    return model


def dual(seed: int = 0, **settings) -> VolumeTextDualEncoder:
    torch.manual_seed(seed)
    words = tokenizer()
    config = DualEncoderConfig(
        vision_config=VISION,
        text_config={
            "model_type": "distilbert",
            "vocab_size": len(words),
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": words.pad_token_id,
        },
        projection_dim=16,
        **settings,
    )
    model = VolumeTextDualEncoder(config).eval()
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(PREPARATION), words, max_text_tokens=60
    )
    return model


def scan(seed: int = 0) -> Scan:
    array = np.random.default_rng(seed).normal(0, 300, (40, 36, 44)).astype(np.float32)
    return Scan(
        array=array,
        spacing_mm=(2.0, 1.0, 1.0),
        affine=np.diag([1.0, 1.0, 2.0, 1.0]),
        modality="CT",
        units="HU",
        source=f"random-{seed}",
    )
