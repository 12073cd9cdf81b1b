"""Maps of what an answer rests on, over the prepared volume and over the scan itself.

All are (D, H, W), at least 0, and 1 where most; docs/decisions/0017 says how they compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.ndimage import affine_transform, gaussian_filter
from torch import Tensor

from med3dvlm.data.sources import Progress
from med3dvlm.evidence.targets import Target, report_targets
from med3dvlm.files import atomic_folder, write_json
from med3dvlm.models import DCFormer, ViT3D
from med3dvlm.scan import Scan, peak_of, save_nifti, to_scan_grid
from med3dvlm.sentences import split_report

if TYPE_CHECKING:
    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder

FLOOR = 0.05  # of a layer's map in the product, so that one blind layer does not blind the others
STEPS = 16  # of the path of integrated gradients
WINDOWS = 4  # occluding boxes have a quarter of each side, and move by half of that
FILES = ("[0-9][0-9].nii.gz", "[0-9][0-9][0-9].nii.gz", "evidence.json")  # of a folder of maps
BATCH = 8  # volumes at a time where a method needs many


def explain(
    model: Med3DVLM | VolumeTextDualEncoder, scan: Scan, target: Target, *, method: str = "layercam"
) -> np.ndarray:
    """What of a scan a target rests on: (D, H, W) float32 on the scan's own voxels, 0 to 1.

    Args:
        target: from :mod:`med3dvlm.evidence.targets`, made with the same model.
        method: one of :data:`METHODS`.
    """
    volume = model._to_device(model.processor.volumes(scan))
    values = evidence_map(model.vision_encoder, volume, target, method=method)
    on_scan = to_scan_grid(values, scan, model.preparation)
    most = float(on_scan.max())  # its peak may have fallen between two voxels of the scan
    return on_scan / most if most > 0 else on_scan


def save_report_maps(
    model: Med3DVLM,
    scan: Scan,
    report: str,
    folder: Path | str,
    *,
    prompt: str | None = None,
    method: str = "layercam",
    progress: Progress | None = None,
) -> None:
    """Write a map for each sentence of a report: 01.nii.gz, 02.nii.gz, …, and evidence.json.

    evidence.json says where each is highest, null for one that is all zero. 3-D files, since
    viewers lay such over a scan and take a fourth axis for time. The folder appears when all is
    written, in place of an older one.
    """
    sentences, listing = split_report(report), []
    targets = report_targets(model, report, prompt=prompt)
    with atomic_folder(folder, ours=FILES) as temporary:
        for number, (sentence, target) in enumerate(zip(sentences, targets, strict=True), 1):
            values = explain(model, scan, target, method=method)
            name = f"{number:02d}.nii.gz"
            save_nifti(as_scan(scan, values), temporary / name)
            listing.append(
                {
                    "file": name,
                    "sentence": sentence.text,
                    "section": sentence.section,
                    "peak_lps_mm": place_mm(scan, peak_of(values)),
                }
            )
            if progress:
                progress(number, len(sentences))
        about = {"scan": scan.source, "method": method, "unit": "percent of the map's most"}
        about |= {"model": model.label, "weights": model.fingerprint()}
        write_json(temporary / "evidence.json", {**about, "sentences": listing})


def place_mm(scan: Scan, voxel: tuple[int, int, int] | None) -> list[float] | None:
    """(x, y, z) LPS mm of a voxel (z, y, x)."""
    if voxel is None:
        return None
    return [round(float(mm), 2) for mm in (scan.affine @ [*voxel[::-1], 1])[:3]]


def as_scan(scan: Scan, values: np.ndarray) -> Scan:
    """A map as a scan on the grid of the one it explains, in whole percent, ready to be saved."""
    percent = np.rint(100 * values).astype(np.float32)
    return replace(scan, array=percent, modality=None, units=None, warnings=())


def evidence_map(
    encoder: Any, volume: Tensor, target: Target, *, method: str = "layercam"
) -> np.ndarray:
    """What of a prepared volume (1, 1, D, H, W) a target rests on: (D, H, W) float32, 0 to 1.

    All zero where the target does not depend on the volume.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}.")
    values = np.maximum(METHODS[method](encoder, volume, target), 0)
    most = float(values.max())
    return (values / most if most > 0 else values).astype(np.float32)


def blurred(volume: Tensor) -> Tensor:
    """A prepared volume (1, 1, D, H, W) without detail: what is put where something is taken out.

    A constant would make edges of its own; a blur over an eighth of each side keeps the body and
    takes the lesions.
    """
    sigma = [n / 8 for n in volume.shape[2:]]
    smooth = gaussian_filter(volume[0, 0].float().cpu().numpy(), sigma, mode="nearest")
    return torch.from_numpy(smooth)[None, None].to(volume)


# --- layers -----------------------------------------------------------------------------------


def layercam(encoder: Any, volume: Tensor, target: Target) -> np.ndarray:
    """LayerCAM (Jiang et al., IEEE TIP 2021) on several layers, multiplied.

    At every place of a layer, the activations weighted by their positive gradients. Fine layers
    say where exactly, coarse ones what belongs together; evidence is what all of them show.
    """
    product, nothing = np.ones(volume.shape[2:]), 1.0
    seen = _seen(encoder, volume, target)
    for layer, (active, gradient) in zip(_layers(encoder), seen, strict=True):
        found = (gradient.clamp(min=0) * active).sum(0).clamp(min=0)
        product *= _spread(found, layer, volume.shape[2:]).astype(float) + FLOOR
        nothing *= FLOOR  # rounded as the product is, or what is left would be taken for a map
    return product - nothing


def grad_cam(encoder: Any, volume: Tensor, target: Target) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., ICCV 2017) on the coarsest of the layers."""
    active, gradient = _seen(encoder, volume, target)[-1]
    weights = gradient.mean(dim=(1, 2, 3), keepdim=True)
    found = (weights * active).sum(0).clamp(min=0)
    return _spread(found, _layers(encoder)[-1], volume.shape[2:])


class _Layer:
    """A module whose output is a map: its cell j is centred on voxel step · j + first.

    Attributes:
        tokens: (D, H, W) of an output (B, 1 + N, C) that begins with a class token; None for
            one of (B, C, D, H, W).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        step: tuple[int, ...],
        first: tuple[float, ...],
        tokens: tuple[int, ...] | None = None,
    ):
        self.module, self.step, self.first, self.tokens = module, step, first, tokens

    def map_of(self, output: Tensor) -> Tensor:
        """(C, D, H, W)."""
        if self.tokens is None:
            return output[0]
        return output[0, 1:].T.reshape(-1, *self.tokens)


def _layers(encoder: Any) -> list[_Layer]:
    """Those that are looked at, from fine to coarse: DCFormer's stages 1 to 3.

    A stride of the stem is centred on the voxel it begins with, a patch on its middle; of the three
    antialiased convolutions two stand on the middle and one on the first voxel. Each pooling is
    centred on every other cell.
    """
    config = encoder.config
    if isinstance(encoder, DCFormer):
        stride = config.stem_stride
        first = 0.0
        if config.stem_patches:
            first = (stride - 1) / 2
        elif config.stem_antialias:
            first = (stride - 1) / 3
        return [
            _Layer(stage, (stride * 2**k,) * 3, (first,) * 3)
            for k, stage in enumerate(encoder.stages[:3], start=1)
        ]
    if isinstance(encoder, ViT3D):
        patch = tuple(config.patch_size)
        grid = tuple(n // p for n, p in zip(config.volume_size, patch, strict=True))
        middle = tuple((p - 1) / 2 for p in patch)
        # the last layer's patches are not read by its class token any more
        thirds = sorted({max(0, round(config.num_layers * part) - 2) for part in (1 / 3, 2 / 3, 1)})
        return [_Layer(encoder.layers[k], patch, middle, grid) for k in thirds]
    raise ValueError(f"{type(encoder).__name__} is not an encoder whose layers are known here.")


def _seen(encoder: Any, volume: Tensor, target: Target) -> list[tuple[Tensor, Tensor]]:
    """Activations and the target's gradients by them, (C, D, H, W) each, of every layer."""
    layers, outputs = _layers(encoder), []
    hooks = [
        layer.module.register_forward_hook(lambda module, given, output: outputs.append(output))
        for layer in layers
    ]
    try:
        with torch.enable_grad():
            score = target(encoder(volume.clone().requires_grad_()))
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
    return [
        (
            layer.map_of(output.detach()).float(),
            layer.map_of(torch.zeros_like(output) if grad is None else grad).float(),
        )
        for layer, output, grad in zip(layers, outputs, gradients, strict=True)
    ]


def _spread(found: Tensor, layer: _Layer, size: tuple[int, ...]) -> np.ndarray:
    """A layer's map (d, h, w) over the voxels of the volume, linearly, 1 where most."""
    most = float(found.max())
    scaled = (found / most if most > 0 else found).cpu().numpy()
    inverse = 1 / np.array(layer.step)
    offset = -np.array(layer.first) * inverse
    return affine_transform(scaled, inverse, offset, size, order=1, mode="nearest")


# --- the whole volume, by Captum --------------------------------------------------------------


def integrated_gradients(encoder: Any, volume: Tensor, target: Target) -> np.ndarray:
    """Integrated gradients (Sundararajan et al., ICML 2017) from the blurred volume, smoothed."""
    method = _captum().IntegratedGradients(lambda volumes: target(encoder(volumes)))
    found = method.attribute(
        volume, baselines=blurred(volume), n_steps=STEPS, internal_batch_size=BATCH
    )
    sigma = [n / 48 for n in volume.shape[2:]]
    return gaussian_filter(found[0, 0].detach().float().cpu().numpy(), sigma)


def occlusion(encoder: Any, volume: Tensor, target: Target) -> np.ndarray:
    """How much the target falls where a box is blurred, the mean over the boxes on a voxel.

    The reference: slow (343 passes), and no gradient in it.
    """
    box = [max(1, -(-n // WINDOWS)) for n in volume.shape[2:]]
    method = _captum().Occlusion(lambda volumes: target(encoder(volumes)))
    with torch.no_grad():
        found = method.attribute(
            volume,
            sliding_window_shapes=(1, *box),
            strides=(1, *(max(1, n // 2) for n in box)),
            baselines=blurred(volume),
            perturbations_per_eval=BATCH,
        )
    return found[0, 0].float().cpu().numpy()


def _captum() -> Any:
    try:
        import captum.attr as captum
    except ImportError as error:
        raise ValueError(
            "this method of evidence needs Captum: pip install 'med3dvlm[evidence]', or use "
            "layercam."
        ) from error
    return captum


METHODS: dict[str, Callable[[Any, Tensor, Target], np.ndarray]] = {
    "layercam": layercam,
    "grad-cam": grad_cam,
    "integrated-gradients": integrated_gradients,
    "occlusion": occlusion,
}
