"""Losses as mathematics; ranks and chunks wrap them elsewhere."""

from med3dvlm.losses.contrastive import (
    LOSSES,
    InfoNCELoss,
    SigLIPLoss,
    infonce_loss,
    siglip_loss,
)

__all__ = ["LOSSES", "InfoNCELoss", "SigLIPLoss", "infonce_loss", "siglip_loss"]
