"""A torso without findings: what varies from patient to patient, and how it is drawn.

Positions are mm in the coordinates of :class:`Canvas`; the top of the right diaphragm is at
`Anatomy.dome`. HU per tissue and phase follow textbook ranges of CT.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from med3dvlm.data.phantoms.canvas import Canvas, Triple, soft

PLANES = ("axial", "coronal", "sagittal")
PHASES = ("non-contrast", "arterial", "portal venous", "delayed")

# HU in the phases above.
ENHANCEMENT: dict[str, tuple[float, float, float, float]] = {
    "aorta": (42, 310, 165, 120),
    "heart": (42, 230, 150, 115),
    "vein": (40, 60, 175, 125),
    "liver": (56, 68, 112, 96),
    "spleen": (46, 125, 118, 100),
    "cortex": (32, 180, 175, 150),
    "medulla": (32, 70, 150, 150),
    "pelvis": (8, 8, 12, 420),
    "pancreas": (42, 105, 95, 80),
    "muscle": (55, 58, 64, 62),
    "bowel": (30, 55, 65, 55),
}
FAT, FLUID, BONE, AIR, LUNG = -100.0, 8.0, 380.0, -1000.0, -850.0
SIDES = {"right": -1.0, "left": 1.0}


@dataclass(frozen=True)
class Anatomy:
    """One patient, without findings; mm and HU."""

    phase: int
    half_width: float
    half_depth: float
    fat: float
    dome: float
    lung_height: float
    heart: Triple
    heart_radii: Triple
    liver_radii: Triple
    spleen_radii: Triple
    kidney_radii: Triple
    aorta_radius: float
    lung: float
    bowel: tuple[tuple[float, ...], ...]
    wobble: dict[str, float] = field(default_factory=dict)

    def hu(self, tissue: str) -> float:
        return ENHANCEMENT[tissue][self.phase] + self.wobble.get(tissue, 0.0)

    # Where things are, (z, y, x): findings are placed by these.
    def lung_centre(self, side: str) -> Triple:
        return (self.dome + 0.45 * self.lung_height, 0.0, SIDES[side] * 0.5 * self.half_width)

    def kidney(self, side: str) -> Triple:
        low = 12.0 if side == "right" else 0.0
        return (self.dome - 108 - low, 0.42 * self.half_depth, SIDES[side] * 64)

    @property
    def liver(self) -> Triple:
        return (self.dome - 48, -6.0, -0.42 * self.half_width)

    @property
    def spleen(self) -> Triple:
        return (self.dome - 38, 0.38 * self.half_depth, 0.6 * self.half_width)

    @property
    def gallbladder(self) -> Triple:
        return (self.dome - 98, -0.42 * self.half_depth, -48.0)

    @property
    def aorta(self) -> tuple[float, float]:
        return (0.34 * self.half_depth, 14.0)

    @property
    def inner(self) -> tuple[float, float]:
        """Half depth and half width of the cavity inside the chest and belly wall."""
        wall = self.fat + 16
        return self.half_depth - wall, self.half_width - wall


def make_anatomy(random: np.random.Generator, phase: int) -> Anatomy:
    """Draw a patient: size, organs, fat, enhancement."""

    def vary(value: float, share: float = 0.1) -> float:
        return float(value * random.uniform(1 - share, 1 + share))

    half_width = float(random.uniform(150, 182))
    dome = float(random.uniform(0, 28))
    heart_scale = float(random.uniform(0.92, 1.06))
    bowel = []
    for _ in range(9):
        z = dome - random.uniform(110, 200)
        y, x = random.uniform(-60, 5), random.uniform(-95, 95)
        bowel.append((z, y, x, *random.uniform(14, 26, 3), random.uniform(0, 1)))
    return Anatomy(
        phase=phase,
        half_width=half_width,
        half_depth=float(half_width * random.uniform(0.62, 0.72)),
        fat=float(random.uniform(8, 28)),
        dome=dome,
        lung_height=vary(190, 0.08),
        heart=(dome + vary(40), vary(-26, 0.2), vary(26, 0.3)),
        heart_radii=(44 * heart_scale, 38 * heart_scale, 46 * heart_scale),
        liver_radii=(vary(68, 0.08), vary(74, 0.08), vary(76, 0.08)),
        spleen_radii=(vary(40), vary(34), vary(22)),
        kidney_radii=(vary(50), vary(25), vary(27)),
        aorta_radius=vary(12.5, 0.12),
        lung=float(random.uniform(-880, -830)),
        bowel=tuple(tuple(map(float, loop)) for loop in bowel),
        wobble={tissue: float(random.normal(0, 4)) for tissue in ENHANCEMENT},
    )


def enlarge_heart(anatomy: Anatomy, factor: float) -> Anatomy:
    z, y, x = anatomy.heart_radii
    return replace(anatomy, heart_radii=(z * factor**0.5, y * factor, x * factor))


def enlarge_spleen(anatomy: Anatomy, factor: float) -> Anatomy:
    z, y, x = anatomy.spleen_radii
    return replace(anatomy, spleen_radii=(z * factor, y * factor, x * factor))


def draw_anatomy(canvas: Canvas, a: Anatomy) -> None:
    """Draw the torso from the outside in."""
    _body(canvas, a)
    _lungs(canvas, a)
    _bones(canvas, a)
    _mediastinum(canvas, a)
    _abdomen(canvas, a)


def _ring(canvas: Canvas, half_depth: float, half_width: float) -> np.ndarray:
    """Distance inside an oval of the (y, x) plane in mm, (1, H, W), negative outside."""
    r = (np.abs(canvas.y / half_depth) ** 2.4 + np.abs(canvas.x / half_width) ** 2.4) ** (1 / 2.4)
    return (1 - r) * half_depth


def _body(canvas: Canvas, a: Anatomy) -> None:
    """Skin, fat, wall and the fat of the cavity: the same at every height, so drawn once."""
    width = canvas.spacing_mm[2]
    depth = _ring(canvas, a.half_depth, a.half_width)
    layers = (
        (depth, 10.0),  # skin
        (depth - 3, FAT),
        (depth - a.fat, a.hu("muscle")),
        (_ring(canvas, *a.inner), FAT),
    )
    section = np.full_like(depth, AIR)
    for inside, value in layers:
        section += soft(inside, width) * (np.float32(value) - section)
    canvas.hu[:] = section


def lung_cover(
    canvas: Canvas, a: Anatomy, side: str
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The box of one lung, and how much of each of its voxels is lung, 0 to 1."""
    depth, width = a.inner
    cz, cy, cx = a.lung_centre(side)
    top = 0.62 * a.lung_height
    box = canvas.box((cz, cy, cx), (1.1 * top, 1.02 * depth, 0.48 * width))
    zz, yy, xx = canvas.at(box)
    z, y, x = (zz - cz) / top, yy / (0.94 * depth), (xx - cx) / (0.44 * width)
    r = (np.abs(z) ** 3 + np.abs(y) ** 2.6 + np.abs(x) ** 2.2) ** np.float32(1 / 2.4)
    cover = soft((1 - r) * 45, canvas.spacing_mm[2])
    dome = dome_height(yy, xx, a, side)
    return box, cover * soft(zz - dome, canvas.spacing_mm[0])


def dome_height(y: np.ndarray, x: np.ndarray, a: Anatomy, side: str) -> np.ndarray:
    """Height of the diaphragm over the (y, x) plane, mm; lower at the back: (1, H, W)."""
    cx = a.lung_centre(side)[2]
    top = a.dome - (10 if side == "left" else 0)
    fall = ((x - cx) / 75) ** 2 + ((y + 10) / 85) ** 2
    return top - 38 * np.clip(fall, 0, 1.6)


def _lungs(canvas: Canvas, a: Anatomy) -> None:
    for side in SIDES:
        canvas.paint(*lung_cover(canvas, a, side), a.lung)
        hz, _, hx = a.lung_centre(side)
        for step in range(7):  # vessels from the hilum outwards
            angle = 0.9 * step
            for t in (0.25, 0.45, 0.65):
                centre = (
                    hz + 10 + t * 75 * np.sin(angle),
                    6 + t * 50 * np.cos(angle),
                    hx * (0.55 + 0.35 * t) + SIDES[side] * 6,
                )
                canvas.ellipsoid(centre, (7, 4.5 - 3 * t, 4.5 - 3 * t), -250, only=_is_lung)


def _is_lung(hu: np.ndarray) -> np.ndarray:
    return (hu < -500).astype(np.float32)


def _bones(canvas: Canvas, a: Anatomy) -> None:
    depth, width = a.inner
    back = 0.62 * a.half_depth
    low, high = canvas.axes[0][0] - 1, canvas.axes[0][-1] + 1
    canvas.tube((back, 0), 21, 90, low=low, high=high)
    period = 32.0
    for k in range(int((high - low) // period) + 1):
        z = low + 14 + k * period
        canvas.ellipsoid((z, back, 0), (13, 19, 21), BONE * 0.6)
        canvas.ellipsoid((z, back + 34, 0), (8, 16, 5), BONE)  # spinous process
        if z < a.dome - 70:
            continue
        box = canvas.box((z, 0, 0), (48, a.half_depth, a.half_width))
        zz, yy, xx = canvas.at(box)
        r = (np.abs(yy / (depth + 5)) ** 2.4 + np.abs(xx / (width + 5)) ** 2.4) ** (1 / 2.4)
        shell = soft(5 - np.abs(r - 1) * depth, canvas.spacing_mm[2])
        slope = z - 0.22 * (depth - yy) * 0.5
        canvas.paint(box, shell * soft(6 - np.abs(zz - slope), canvas.spacing_mm[0]), BONE)
    canvas.tube((back + 22, 0), 8, 25, low=low, high=high)  # spinal canal
    sternum = canvas.box((a.dome + 75, -depth - 3, 0), (75, 7, 17))
    canvas.paint(sternum, np.ones(canvas.hu[sternum].shape, np.float32), BONE * 0.7)
    for side in SIDES.values():  # psoas
        canvas.tube((back - 12, side * 38), 17, a.hu("muscle"), low=low, high=a.dome - 90)


def _mediastinum(canvas: Canvas, a: Anatomy) -> None:
    cz = a.dome + 0.5 * a.lung_height
    canvas.ellipsoid((cz, 6, 0), (0.62 * a.lung_height, 66, 36), FAT + 10, only=_is_lung)
    z, y, x = a.heart
    canvas.ellipsoid((z, y, x), tuple(r + 5 for r in a.heart_radii), FAT + 10, only=_is_lung)
    canvas.ellipsoid(a.heart, a.heart_radii, a.hu("heart") - 30)
    rz, ry, rx = a.heart_radii
    for dx, dy in ((-0.3, -0.2), (0.3, 0.1)):  # chambers
        canvas.ellipsoid(
            (z, y + dy * ry, x + dx * rx), (0.6 * rz, 0.55 * ry, 0.4 * rx), a.hu("heart")
        )
    top = canvas.axes[0][-1] + 1
    canvas.tube((-18, -8), a.aorta_radius + 3, a.hu("aorta"), low=z + 20, high=a.dome + 128)
    arch = a.dome + 128
    canvas.ellipsoid((arch, 0.1 * a.half_depth, 6), (12, 36, 14), a.hu("aorta"))
    canvas.tube(a.aorta, a.aorta_radius, a.hu("aorta"), low=canvas.axes[0][0] - 1, high=arch)
    canvas.tube((-24, -26), 9, a.hu("vein"), low=z + 20, high=top)
    canvas.tube((8, 0), 9, AIR, low=a.dome + 92, high=top)
    canvas.tube((24, 6), 7, 35, low=a.dome, high=top)  # oesophagus


def _abdomen(canvas: Canvas, a: Anatomy) -> None:
    def below_dome(hu: np.ndarray) -> np.ndarray:
        return (hu > -400).astype(np.float32) * (hu < 250)

    for z, y, x, rz, ry, rx, gas in a.bowel:
        canvas.ellipsoid((z, y, x), (rz, ry, rx), a.hu("bowel"))
        canvas.ellipsoid((z, y, x), (rz - 5, ry - 5, rx - 5), -850 if gas > 0.5 else 20)
    stomach = (a.dome - 62, -0.28 * a.half_depth, 58.0)
    canvas.ellipsoid(stomach, (42, 32, 38), 45, only=below_dome)
    canvas.ellipsoid(stomach, (37, 27, 33), 15, only=below_dome)
    gas = (stomach[0] + 6, stomach[1] - 12, stomach[2])
    canvas.ellipsoid(gas, (22, 12, 22), -900, only=below_dome)
    canvas.ellipsoid(a.liver, a.liver_radii, a.hu("liver"), only=below_dome)
    left = (a.dome - 42, -0.42 * a.half_depth, -6.0)
    canvas.ellipsoid(left, (32, 34, 58), a.hu("liver"), only=below_dome)
    z, y, x = a.liver
    canvas.ellipsoid((z - 10, y + 4, x + 30), (8, 7, 34), a.hu("vein"))  # portal vein
    canvas.ellipsoid(a.spleen, a.spleen_radii, a.hu("spleen"), only=below_dome)
    canvas.ellipsoid((a.dome - 92, 0.0, 16.0), (10, 12, 56), a.hu("pancreas"))
    canvas.tube(
        (0.26 * a.half_depth, -22), 11, a.hu("vein"), low=canvas.axes[0][0] - 1, high=a.dome
    )
    for side in SIDES:
        z, y, x = a.kidney(side)
        rz, ry, rx = a.kidney_radii
        canvas.ellipsoid((z, y, x), (rz, ry, rx), a.hu("cortex"))
        canvas.ellipsoid((z, y, x), (rz - 9, ry - 9, rx - 9), a.hu("medulla"))
        canvas.ellipsoid((z, y, x * 0.9), (15, 7, 8), a.hu("pelvis"))
    canvas.ellipsoid(a.gallbladder, (26, 16, 15), 12)
