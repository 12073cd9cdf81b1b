"""Losses: as mathematics, and the same in blocks and over ranks."""

from med3dvlm.losses.contrastive import (
    LOSSES,
    InfoNCELoss,
    SigLIPLoss,
    infonce_loss,
    siglip_loss,
)
from med3dvlm.losses.ring import gathered_infonce_loss, ring_siglip_loss

__all__ = [
    "LOSSES",
    "InfoNCELoss",
    "SigLIPLoss",
    "gathered_infonce_loss",
    "infonce_loss",
    "ring_siglip_loss",
    "siglip_loss",
]
