"""Models: encoders, the contrastive model, the language model that sees, and checkpoints.

Importing this registers the models with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor
from transformers import AutoModelForCausalLM as _AutoModelForCausalLM

from med3dvlm.models.dcformer import DCFormer, DCFormerConfig
from med3dvlm.models.vit3d import ViT3D, ViT3DConfig

for _config, _model in ((DCFormerConfig, DCFormer), (ViT3DConfig, ViT3D)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

from med3dvlm.models.dual_encoder import DualEncoderConfig, VolumeTextDualEncoder
from med3dvlm.models.med3dvlm import Answer, Med3DVLM, Med3DVLMConfig
from med3dvlm.models.processor import Med3DVLMProcessor, VolumeFeatureExtractor

for _config, _model in ((DualEncoderConfig, VolumeTextDualEncoder), (Med3DVLMConfig, Med3DVLM)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoProcessor.register(_config, Med3DVLMProcessor)
    AutoFeatureExtractor.register(_config, VolumeFeatureExtractor)
_AutoModelForCausalLM.register(Med3DVLMConfig, Med3DVLM)

__all__ = [
    "Answer",
    "DCFormer",
    "DCFormerConfig",
    "DualEncoderConfig",
    "Med3DVLM",
    "Med3DVLMConfig",
    "Med3DVLMProcessor",
    "ViT3D",
    "ViT3DConfig",
    "VolumeFeatureExtractor",
    "VolumeTextDualEncoder",
]
