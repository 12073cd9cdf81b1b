"""A torso without findings: what varies from patient to patient, and how it is drawn.

Positions are mm in the coordinates of :class:`Canvas`, (z, y, x). The chest and belly share one
cavity, an oval tube whose walls are muscle, fat and skin; `Anatomy.dome` is the top of the right
diaphragm. HU per tissue and phase follow textbook ranges of CT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from med3dvlm.data.phantoms.canvas import Box, Canvas, Triple, soft

PLANES = ("axial", "coronal", "sagittal")
PHASES = ("non-contrast", "arterial", "portal venous", "delayed")

# HU in the phases above.
ENHANCEMENT: dict[str, tuple[float, float, float, float]] = {
    "aorta": (44, 310, 165, 120),
    "heart": (42, 220, 155, 118),
    "myocardium": (44, 95, 110, 92),
    "vein": (42, 70, 170, 125),
    "liver": (57, 70, 112, 94),
    "spleen": (47, 128, 120, 100),
    "cortex": (33, 185, 170, 140),
    "medulla": (31, 75, 150, 150),
    "pelvis": (8, 8, 15, 430),
    "pancreas": (42, 105, 92, 78),
    "muscle": (54, 58, 64, 62),
    "bowel": (36, 62, 78, 66),
}
FAT, FLUID, AIR = -105.0, 6.0, -1000.0
CORTICAL, SPONGY = 520.0, 190.0
SIDES = {"right": -1.0, "left": 1.0}
OVAL = 2.3  # exponent of the cavity's oval: a little squarer than an ellipse
STEPS, FARTHEST = 4096, 16.0  # entries of the table from the oval's coordinate to HU, its end
SOFT_TISSUE = (-300.0, 250.0)  # what organs are painted over: not lung, not bone


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
    kidney_drop: Triple
    aorta_radius: float
    lung: float
    visceral_fat: float
    branches: np.ndarray
    loops: np.ndarray
    wobble: dict[str, float]

    def hu(self, tissue: str) -> float:
        return ENHANCEMENT[tissue][self.phase] + self.wobble[tissue]

    def lung_centre(self, side: str) -> Triple:
        return (self.dome + 0.4 * self.lung_height, 4.0, SIDES[side] * 0.56 * self.half_width)

    def kidney(self, side: str) -> Triple:
        drop, y, x = self.kidney_drop
        low = drop + (14.0 if side == "right" else 0.0)
        return (self.dome - low, 0.42 * self.half_depth + y, SIDES[side] * (56 + x))

    @property
    def liver(self) -> Triple:
        return (self.dome - 52, -8.0, -0.42 * self.half_width)

    @property
    def left_liver(self) -> Triple:
        return (self.dome - 44, -0.50 * self.half_depth, 2.0)

    @property
    def spleen(self) -> Triple:
        return (self.dome - 46, 0.42 * self.half_depth, 0.66 * self.half_width)

    @property
    def stomach(self) -> Triple:
        return (self.dome - 52, -0.22 * self.half_depth, 0.46 * self.half_width)

    @property
    def gallbladder(self) -> Triple:
        return (self.dome - 104, -0.50 * self.half_depth, -46.0)

    @property
    def aorta(self) -> tuple[float, float]:
        """The descending aorta, (y, x)."""
        return (0.50 * self.half_depth, 17.0)

    @property
    def arch(self) -> float:
        """Height of the aortic arch."""
        return self.dome + 0.68 * self.lung_height


def make_anatomy(random: np.random.Generator, phase: int) -> Anatomy:
    """Draw a patient: size, organs, fat, enhancement."""

    def vary(value: float, share: float = 0.1) -> float:
        return float(value * random.uniform(1 - share, 1 + share))

    half_width = float(random.uniform(118, 140))
    dome = float(random.uniform(-8, 22))
    scale = float(random.uniform(0.93, 1.05))
    return Anatomy(
        phase=phase,
        half_width=half_width,
        half_depth=float(half_width * random.uniform(0.63, 0.71)),
        fat=float(random.uniform(7, 30)),
        dome=dome,
        lung_height=vary(172, 0.06),
        heart=(dome + vary(34), vary(-27, 0.15), vary(24, 0.25)),
        heart_radii=(42 * scale, 36 * scale, 47 * scale),
        liver_radii=(vary(66, 0.08), vary(76, 0.06), vary(78, 0.07)),
        spleen_radii=(vary(40), vary(33), vary(20)),
        kidney_radii=(vary(51, 0.08), vary(25, 0.08), vary(27, 0.08)),
        kidney_drop=(vary(112, 0.08), vary(0.0) + float(random.uniform(-5, 5)), vary(4, 1.0)),
        aorta_radius=vary(12.0, 0.12),
        lung=float(random.uniform(-850, -800)),
        visceral_fat=float(random.uniform(0.6, 1.0)),
        branches=random.random((2, 14, 4)).astype(np.float32),
        loops=random.random((26, 7)).astype(np.float32),
        wobble={tissue: float(random.normal(0, 3.5)) for tissue in ENHANCEMENT},
    )


def enlarge_heart(anatomy: Anatomy, factor: float) -> Anatomy:
    z, y, x = anatomy.heart_radii
    return replace(anatomy, heart_radii=(z * factor**0.5, y * factor**0.9, x * factor))


def enlarge_spleen(anatomy: Anatomy, factor: float) -> Anatomy:
    z, y, x = anatomy.spleen_radii
    return replace(anatomy, spleen_radii=(z * factor, y * factor, x * factor))


class Torso(Canvas):
    """A canvas with a patient on it; findings are painted on top."""

    def __init__(self, shape: tuple[int, int, int], spacing_mm: Triple, anatomy: Anatomy):
        super().__init__(shape, spacing_mm)
        self.anatomy = anatomy
        self._draw_walls()
        self._draw_lungs()
        self._draw_spine_and_sternum()
        self._draw_mediastinum()
        self._draw_abdomen()

    # --- the cavity ---------------------------------------------------------------------------

    def _draw_walls(self) -> None:
        """Skin, fat, muscle, ribs and the fat of the cavity, by one table per height.

        `oval` (D, H, W) is 1 on the inner surface of the wall, less inside.
        """
        a, z = self.anatomy, self.axes[0]
        top = np.clip((z - a.dome - 70) / 120, 0, 1.2) ** 2
        waist = np.clip((a.dome - 60 - z) / 80, 0, 1)
        depth = a.half_depth * (1 - 0.34 * top + 0.04 * waist)
        width = a.half_width * (1 - 0.46 * top - 0.07 * waist)
        # |.|**OVAL on the axes only, then one addition over the grid
        high = (np.abs(self.y[0, :, 0]) / depth[:, None]) ** OVAL
        wide = (np.abs(self.x[0, 0]) / width[:, None]) ** OVAL
        high, wide = high.astype(np.float32), wide.astype(np.float32)
        steps = np.linspace(0, FARTHEST, STEPS, dtype=np.float32)
        out = ((steps ** (1 / OVAL) - 1)[None] * depth[:, None]).astype(np.float32)
        table = self._wall_table(out, top, waist)
        shell = soft(out - 1.5, 3) * soft(9.5 - out, 3)
        ring = self._rib_rings()
        self.oval = np.empty_like(self.hu)
        for k in range(len(z)):  # slice by slice stays in the processor's cache
            oval = np.add(high[k, :, None], wide[k], out=self.oval[k])
            row = (oval * np.float32((STEPS - 1) / FARTHEST)).astype(np.int32)
            section = np.take(table[k], row, out=self.hu[k], mode="clip")
            if ring[k].any():
                cover = np.take(shell[k], row, mode="clip")
                cover *= ring[k, :, None]
                section += cover * (np.float32(CORTICAL) - section)

    def _wall_table(self, out: np.ndarray, top: np.ndarray, waist: np.ndarray) -> np.ndarray:
        """HU by height and by mm outside the cavity, (D, STEPS)."""
        a = self.anatomy
        muscle = (13 + 26 * top - 3 * waist)[:, None]
        fat = muscle + (a.fat * (0.8 + 0.5 * waist))[:, None]
        table = np.full(out.shape, FAT + 4, np.float32)
        for edge, value in ((0, a.hu("muscle")), (muscle, FAT), (fat, 15.0), (fat + 3, AIR)):
            table += soft(out - edge, 3) * (np.float32(value) - table)
        return table.astype(np.float32)

    def _rib_rings(self) -> np.ndarray:
        """How much of each (z, y) is at the height of a rib, falling to the front, (D, H)."""
        a, z = self.anatomy, self.axes[0][:, None]
        slope = z - 0.42 * (self.axes[1][None] - a.half_depth)
        ring = soft(6.0 - np.abs((slope - a.dome) % 27 - 13.5), self.spacing_mm[0])
        ring *= (z > a.dome - 75) & (z < a.dome + a.lung_height + 5)
        return ring.astype(np.float32)

    def inside(self, box: Box) -> np.ndarray:
        """How much of each voxel of a box is in the cavity, 0 to 1."""
        return soft((1 - self.oval[box]) * np.float32(self.anatomy.half_depth / OVAL), 3)

    def clipped(
        self,
        centre: Triple,
        radii: Triple,
        value: float,
        *,
        lean: tuple[float, float] = (0.0, 0.0),
        over: tuple[float, float] = SOFT_TISSUE,
    ) -> None:
        """Paint an ellipsoid as far as the wall and the tissues let it grow."""
        box, cover = self.ellipsoid_cover(centre, radii, lean=lean)
        now = self.hu[box]
        cover *= self.inside(box)
        cover *= (now > over[0]) & (now < over[1])
        self.paint(box, cover, value)

    # --- the chest ----------------------------------------------------------------------------

    def dome_height(self, y: np.ndarray, x: np.ndarray, side: str) -> np.ndarray:
        """Height of the diaphragm over the (y, x) plane, mm; lower at the back: (1, H, W)."""
        a = self.anatomy
        top = a.dome - (12 if side == "left" else 0)
        centre = SIDES[side] * 0.48 * a.half_width
        fall = ((x - centre) / 62) ** 2 + ((y + 14) / 74) ** 2
        return top - 34 * np.clip(fall, 0, 1.6)

    @cached_property
    def lungs(self) -> dict[str, tuple[Box, np.ndarray]]:
        """By side: the box of the lung, and how much of each of its voxels is lung."""
        a = self.anatomy
        found = {}
        for side, sign in SIDES.items():
            middle = a.dome + 0.5 * a.lung_height - 34
            reach = (0.5 * a.lung_height + 34, a.half_depth, a.half_width / 2)
            box = self.box((middle, 0, sign * a.half_width / 2), reach)
            z, y, x = self.at(box)
            cover = soft((0.96 - self.oval[box]) * np.float32(a.half_depth / OVAL), 3)
            # the mediastinum: narrow in front, wider at the hilum and by the spine
            share = y / a.half_depth
            edge = 9 + 24 * np.clip(share + 0.85, 0, 1)
            cover *= soft(sign * x - edge, 4)
            cover *= soft(z - self.dome_height(y, x, side), self.spacing_mm[0])
            away = (np.abs(x) - 0.42 * a.half_width) ** 2 + (y - 8) ** 2
            top = a.dome + a.lung_height - away / 70
            cover *= soft(top - z, self.spacing_mm[0])
            found[side] = (box, cover)
        return found

    def _draw_lungs(self) -> None:
        a = self.anatomy
        for side, (box, cover) in self.lungs.items():
            self.paint(box, cover, a.lung)
            z, y, _ = self.at(box)
            # blood pools at the back
            self.hu[box] += cover * np.float32(40) * np.clip(y / a.half_depth + 0.2, 0, 1)
            self._draw_vessels(side)

    def _draw_vessels(self, side: str) -> None:
        """Branches from the hilum, thinner outwards, as dots on the grid."""
        a, sign = self.anatomy, SIDES[side]
        u = a.branches[0 if side == "right" else 1]
        angle = 2 * np.pi * (np.arange(len(u)) + u[:, 0]) / len(u)
        reach = np.stack(
            [
                np.sin(angle) * (60 + 30 * u[:, 1]) - 4,
                np.cos(angle) * (48 + 16 * u[:, 2]),
                sign * (34 + 48 * u[:, 3]),
            ],
            axis=1,
        )
        hilum = np.array([a.dome + 0.47 * a.lung_height, 6, sign * 34], np.float32)
        t = np.linspace(0, 1, 34, dtype=np.float32)[None, :, None]
        bend = np.array([0.0, 9.0, 0.0]) * np.sin(3 * t + 6 * u[:, 1, None, None])
        main = hilum + t * reach[:, None] + bend * t
        fork = hilum + t * reach[:, None] * np.array([0.75, 1.2, 1.1])
        fork = fork + np.array([14.0, -10.0, 0.0]) * np.clip(t - 0.35, 0, 1) * 2
        thick = np.concatenate([main + s for s in ((0, 0, 0), (0, 3, 0), (0, 0, 3 * sign))])
        share = np.concatenate([0.85 - 0.6 * t, *[0.75 - 1.5 * t] * 2]).repeat(len(u), 0)
        points = np.concatenate([thick.reshape(-1, 3), fork.reshape(-1, 3)])
        ends = np.broadcast_to(0.62 - 0.45 * t, (len(u), t.shape[1], 1))
        shares = np.concatenate([share.reshape(-1), ends.reshape(-1)]).clip(0, 1)
        self.dots(points, shares.astype(np.float32), a.hu("heart") * 0.6, below=-450)

    def _draw_spine_and_sternum(self) -> None:
        a = self.anatomy
        back = a.half_depth - 4
        low, high = float(self.axes[0][0]) - 1, float(self.axes[0][-1]) + 1
        muscle = a.hu("muscle")
        for side in SIDES.values():  # along the back, and psoas
            self.tube((back + 20, side * 30), (19, 25), muscle, low=low, high=a.dome + 90)
            self.tube(
                (back - 20, side * 36), (16, 17), muscle, low=low, high=a.dome - 85,
                lean=(0.05, -side * 0.12),
            )  # fmt: skip
        self.tube((back - 6, 0), (15, 19), 85, low=low, high=high)  # discs
        for k in range(int((high - low) // 31) + 1):
            z = low + 12 + k * 31
            self.tube((back - 6, 0), (16, 20), CORTICAL * 0.8, low=z - 12, high=z + 12)
            self.tube((back - 6, 0), (12, 16), SPONGY, low=z - 11, high=z + 11)
            self.tube((back + 18, 0), (13, 14), CORTICAL, low=z - 9, high=z + 8)
            self.ellipsoid((z, back + 16, 0), (10, 7, 34), CORTICAL * 0.8)
            self.ellipsoid((z - 6, back + 34, 0), (9, 12, 4), CORTICAL * 0.8)
        self.tube((back + 16, 0), (8, 9), 30, low=low, high=high)  # spinal canal
        plate = self.box((a.dome + 72, -a.half_depth - 4, 0), (62, 6, 17))
        self.paint(plate, np.ones(self.hu[plate].shape, np.float32), CORTICAL * 0.65)

    def _draw_mediastinum(self) -> None:
        a = self.anatomy
        z, y, x = a.heart
        rz, ry, rx = a.heart_radii
        blood, lean = a.hu("heart"), (0.0, -0.35)
        self.clipped((z, y, x), (rz + 6, ry + 5, rx + 6), FAT + 25, lean=lean, over=(-2000, 0))
        self.clipped((z, y, x), (rz, ry, rx), a.hu("myocardium"), lean=lean, over=(-2000, 250))
        for dz, dy, dx, sz, sy, sx in (
            (-0.08, -0.10, 0.42, 0.62, 0.52, 0.36),  # left ventricle
            (-0.05, -0.32, -0.22, 0.62, 0.46, 0.36),  # right ventricle
            (0.12, 0.22, -0.55, 0.56, 0.50, 0.34),  # right atrium
            (0.30, 0.62, 0.10, 0.42, 0.34, 0.46),  # left atrium
        ):
            centre = (z + dz * rz, y + dy * ry, x + dx * rx - 0.35 * dz * rz)
            self.ellipsoid(centre, (sz * rz, sy * ry, sx * rx), blood)
        low, top, r = float(self.axes[0][0]) - 1, float(self.axes[0][-1]) + 1, a.aorta_radius
        back_y, back_x = a.aorta
        root = z + 0.5 * a.heart_radii[0]
        pool = a.hu("aorta")
        self.tube((-22, -8), (r + 3, r + 3), pool, low=root, high=a.arch, lean=(0.05, 0))
        for t in np.linspace(0, 1, 6):  # the arch, from front right to back left
            centre = (
                a.arch + 10 * np.sin(np.pi * t), -20 + t * (back_y + 20), -8 + t * (back_x + 8)
            )  # fmt: skip
            self.ellipsoid(centre, (r + 2, r + 1, r + 1), pool)
        self.tube((back_y, back_x), (r, r), pool, low=a.dome - 40, high=a.arch)
        belly_y = a.half_depth - 34
        self.tube((belly_y, 8), (r - 2, r - 2), pool, low=low, high=a.dome - 40)
        trunk = a.dome + 0.53 * a.lung_height
        self.ellipsoid((trunk, -24, 18), (16, 16, 14), blood)  # pulmonary trunk
        for side in SIDES.values():
            self.ellipsoid((trunk - 4, 2, side * 30), (11, 11, 20), blood)  # hila
        self.tube((-14, -28), (10, 10), a.hu("vein") * 0.7 + 20, low=root, high=top)
        fork = a.dome + 0.55 * a.lung_height
        self.tube((12, 0), (9, 9), AIR, low=fork, high=top)  # trachea
        for side in SIDES.values():
            self.tube((14, side * 17), (6, 7), -930, low=fork - 26, high=fork, lean=(0, -side))
        self.tube((30, 6), (7, 8), 38, low=a.dome - 30, high=top)  # oesophagus

    # --- the abdomen --------------------------------------------------------------------------

    def _draw_abdomen(self) -> None:
        a = self.anatomy
        low = float(self.axes[0][0]) - 1
        self._draw_bowel()
        z, y, x = a.stomach
        lean = (-0.35, -0.35)
        self.clipped(a.stomach, (44, 34, 34), a.hu("bowel"), lean=lean)
        self.clipped(a.stomach, (40, 30, 30), 18, lean=lean)
        self.clipped((z + 8, y - 14, x), (26, 13, 22), -900, lean=lean)
        self.clipped(a.liver, a.liver_radii, a.hu("liver"), lean=(0.0, -0.12))
        self.clipped(a.left_liver, (34, 36, 60), a.hu("liver"), lean=(0.0, -0.2))
        z, y, x = a.liver
        vein = a.hu("vein")
        for centre, radii in (
            ((z - 6, y + 6, x + 26), (8, 7, 34)),  # portal vein
            ((z + 22, y + 12, x + 6), (22, 5, 5)),  # liver veins
            ((z + 24, y - 14, x + 16), (18, 5, 5)),
            ((z - 14, y + 18, x - 8), (6, 5, 24)),
        ):
            self.ellipsoid(centre, radii, vein, over=(a.hu("liver") - 20, 250))
        self.clipped(a.spleen, a.spleen_radii, a.hu("spleen"), lean=(0.25, 0.1))
        pancreas = a.hu("pancreas")
        for dz, dy, dx, r in ((-8, -6, -26, 15), (0, -12, -6, 11), (3, -8, 16, 11), (9, 6, 40, 12)):
            self.ellipsoid(
                (a.dome - 92 + dz, 0.12 * a.half_depth + dy, dx), (r, r, r + 8), pancreas
            )
        cava = a.hu("vein") if a.phase else a.hu("aorta") - 3
        self.tube((a.half_depth - 38, -24), (10, 13), cava, low=low, high=a.dome + 4)
        for side in SIDES:
            self._draw_kidney(side)
        self.ellipsoid(a.gallbladder, (27, 16, 15), 12, over=(-2000, 250))

    def _draw_kidney(self, side: str) -> None:
        a, sign = self.anatomy, SIDES[side]
        z, y, x = a.kidney(side)
        rz, ry, rx = a.kidney_radii
        lean = (0.1, -sign * 0.2)
        fat = (rz + 10, ry + 9, rx + 8)
        self.ellipsoid((z, y, x), fat, FAT + 6, lean=lean, over=(-300, 200))
        self.ellipsoid((z, y, x), (rz, ry, rx), a.hu("cortex"), lean=lean)
        self.ellipsoid((z, y, x), (rz - 9, ry - 9, rx - 9), a.hu("medulla"), lean=lean)
        self.ellipsoid((z, y, x - sign * 8), (24, 8, 11), FAT + 15, lean=lean)  # sinus
        self.ellipsoid((z, y, x - sign * 9), (15, 6, 7), a.hu("pelvis"), lean=lean)

    def _draw_bowel(self) -> None:
        a = self.anatomy
        wall = a.hu("bowel")
        for k, u in enumerate(a.loops):
            if k < 10:  # colon: a frame at the sides and the front, with gas and stool
                side = 1 if k % 2 else -1
                centre = (
                    a.dome - 105 - 18 * (k // 2) - 10 * u[0],
                    -0.1 * a.half_depth + 24 * (u[1] - 0.5),
                    side * (0.66 * a.half_width + 10 * (u[2] - 0.5)),
                )
                radii = (17 + 5 * u[3], 18 + 6 * u[4], 17 + 5 * u[5])
                inside = -820.0 if u[6] > 0.55 else 25.0 - 120 * float(u[6])
            else:
                centre = (
                    a.dome - 118 - 82 * u[0],
                    (-0.72 + 0.75 * u[1]) * a.half_depth,
                    (u[2] - 0.5) * 1.1 * a.half_width,
                )
                radii = (11 + 6 * u[3], 11 + 6 * u[4], 13 + 11 * u[5])
                inside = -800.0 if u[6] > 0.85 else 18.0
            self.clipped(centre, radii, wall)
            shrunk = (radii[0] - 4, radii[1] - 4, radii[2] - 4)
            self.ellipsoid(centre, shrunk, inside, over=(wall - 30, wall + 30))
