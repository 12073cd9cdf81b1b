"""The findings: one class each says how it is drawn, said, recognised in text and asked about.

To add a finding, add one class to this file and it is drawn, reported, asked about, supervised and
measured everywhere. Wordings are templates over the attributes, so none needs code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from med3dvlm.data.phantoms.anatomy import (
    AIR,
    FLUID,
    SIDES,
    Anatomy,
    dome_height,
    enlarge_heart,
    enlarge_spleen,
    lung_cover,
)
from med3dvlm.data.phantoms.canvas import Canvas, soft

Attributes = Mapping[str, Any]
LOBES = {
    "right upper lobe": ("right", 0.42, -0.1),
    "right middle lobe": ("right", 0.02, -0.5),
    "right lower lobe": ("right", -0.2, 0.42),
    "left upper lobe": ("left", 0.34, -0.3),
    "left lower lobe": ("left", -0.18, 0.42),
}


class Finding:
    """One kind of finding.

    Class attributes:
        name: as CT-RATE calls it, where it does.
        organ: what is affected, for questions.
        attributes: the values that a discrete attribute can have.
        sizes: smallest and largest size in mm, steps of 2; None where size is not stated.
        present, absent: sentences of the findings section; impression: phrases.
        terms: a pattern by which text about this finding is recognised.
    """

    name: ClassVar[str]
    organ: ClassVar[str]
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {}
    sizes: ClassVar[tuple[int, int] | None] = None
    present: ClassVar[tuple[str, ...]]
    absent: ClassVar[tuple[str, ...]]
    impression: ClassVar[tuple[str, ...]]
    terms: ClassVar[str]

    def sample(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw the attributes; `u` are four numbers in 0..1 that place it within them."""
        drawn: dict[str, Any] = {
            key: str(random.choice(values)) for key, values in self.attributes.items()
        }
        if self.sizes is not None:
            low, high = self.sizes
            drawn["size"] = int(random.integers(low // 2, high // 2 + 1) * 2)
        drawn["u"] = tuple(float(u) for u in random.random(4))
        return drawn

    def change(self, anatomy: Anatomy, attributes: Attributes) -> Anatomy:
        """What it does to the anatomy before that is drawn."""
        return anatomy

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        """What it adds to the drawn anatomy."""

    @property
    def noun(self) -> str:
        """The name inside a sentence."""
        return self.name[0].lower() + self.name[1:]

    @classmethod
    def recognised(cls, sentence: str) -> bool:
        return re.search(cls.terms, sentence, re.IGNORECASE) is not None


def sides(side: str) -> list[str]:
    return ["right", "left"] if side == "bilateral" else [side]


def everything(canvas: Canvas) -> tuple[slice, slice, slice]:
    return slice(0, canvas.hu.shape[0]), slice(0, canvas.hu.shape[1]), slice(0, canvas.hu.shape[2])


def in_lung(hu: np.ndarray) -> np.ndarray:
    return np.clip((-300 - hu) / 300, 0, 1)


def place_in_lobe(anatomy: Anatomy, lobe: str, u: tuple[float, ...]) -> tuple[float, float, float]:
    side, up, back = LOBES[lobe]
    z, y, x = anatomy.lung_centre(side)
    depth = anatomy.inner[0]
    return (
        z + up * 0.62 * anatomy.lung_height + (u[0] - 0.5) * 20,
        y + back * depth + (u[1] - 0.5) * 16,
        x + (u[2] - 0.5) * 24,
    )


class PleuralEffusion(Finding):
    name = "Pleural effusion"
    organ = "pleura"
    attributes = {
        "side": ("right", "left", "bilateral"),
        "degree": ("small", "moderate", "large"),
    }
    present = (
        "There is a {degree} {side} pleural effusion.",
        "A {degree} {side} pleural effusion is seen.",
        "{Degree} {side} pleural effusion.",
        "{Degree} {side} pleural fluid is present.",
    )
    absent = (
        "No pleural effusion.",
        "There is no pleural effusion.",
        "The pleural spaces are free of fluid.",
        "No pleural fluid is seen.",
    )
    impression = ("{degree} {side} pleural effusion", "{side} pleural effusion, {degree}")
    terms = r"pleural (effusion|fluid|space)"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        level = {"small": 0.62, "moderate": 0.30, "large": -0.08}[attributes["degree"]]
        depth = anatomy.inner[0]
        for side in sides(attributes["side"]):
            box, cover = lung_cover(canvas, anatomy, side)
            z, y, x = canvas.at(box)
            height = (z - dome_height(y, x, anatomy, side)) / anatomy.lung_height
            behind = soft((y / depth - 0.8 * height - level) * depth, canvas.spacing_mm[2])
            canvas.paint(box, cover * behind, FLUID)


class Consolidation(Finding):
    name = "Consolidation"
    organ = "lung"
    attributes = {"lobe": tuple(LOBES)}
    present = (
        "There is consolidation in the {lobe}.",
        "Consolidation is seen in the {lobe}.",
        "Airspace consolidation of the {lobe}.",
        "The {lobe} shows consolidation.",
    )
    absent = (
        "No consolidation.",
        "There is no consolidation.",
        "No airspace consolidation is seen.",
        "The lungs are free of consolidation.",
    )
    impression = ("consolidation in the {lobe}", "{lobe} consolidation")
    terms = r"consolidation"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        u = attributes["u"]
        z, y, x = place_in_lobe(anatomy, attributes["lobe"], u)
        for k in range(5):  # an irregular mass of lobules
            step = (
                14 * np.sin(2.1 * k + 6 * u[3]),
                16 * np.cos(1.7 * k + 6 * u[3]),
                12 * np.sin(k),
            )
            centre = (z + step[0], y + step[1], x + step[2])
            canvas.ellipsoid(centre, (26, 26, 24), 35, only=in_lung)


class LungOpacity(Finding):
    name = "Lung opacity"
    organ = "lung"
    attributes = {"side": ("right", "left", "bilateral")}
    present = (
        "There is {side} ground-glass opacity.",
        "{Side} ground-glass lung opacity is seen.",
        "Diffuse {side} lung opacity of ground-glass density.",
        "Hazy {side} lung opacity is present.",
    )
    absent = (
        "No lung opacity.",
        "There is no ground-glass opacity.",
        "No ground-glass lung opacity is seen.",
        "The lungs are clear without opacity.",
    )
    impression = ("{side} ground-glass opacity", "{side} lung opacity")
    terms = r"opacity"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        for side in sides(attributes["side"]):
            z, y, x = anatomy.lung_centre(side)
            centre = (z + 25, y + 10 * (attributes["u"][0] - 0.5), x)
            box = canvas.box(centre, (70, 62, 46))
            zz, yy, xx = canvas.at(box)
            r = ((zz - centre[0]) / 66) ** 2 + ((yy - centre[1]) / 58) ** 2
            r = np.sqrt(r + ((xx - centre[2]) / 42) ** 2)
            cover = soft((1 - r) * 40, 30) * in_lung(canvas.hu[box])
            canvas.paint(box, cover, -560)


class LungNodule(Finding):
    name = "Lung nodule"
    organ = "lung"
    attributes = {"lobe": tuple(LOBES)}
    sizes = (14, 34)
    present = (
        "There is a {size} mm nodule in the {lobe}.",
        "A {size} mm lung nodule is seen in the {lobe}.",
        "Nodule of {size} mm in the {lobe}.",
        "The {lobe} contains a {size} mm nodule.",
    )
    absent = (
        "No lung nodule.",
        "There is no lung nodule.",
        "No pulmonary nodule is seen.",
        "The lungs are free of nodules.",
    )
    impression = ("{size} mm nodule in the {lobe}", "{lobe} nodule of {size} mm")
    terms = r"nodule"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        radius = attributes["size"] / 2
        centre = place_in_lobe(anatomy, attributes["lobe"], attributes["u"])
        canvas.ellipsoid(centre, (radius, radius, radius), 45, only=in_lung)


class Emphysema(Finding):
    name = "Emphysema"
    organ = "lung"
    attributes = {"degree": ("mild", "moderate", "severe")}
    present = (
        "There is {degree} emphysema.",
        "{Degree} emphysema is seen in both lungs.",
        "{Degree} bullous emphysema.",
        "Both lungs show {degree} emphysema.",
    )
    absent = (
        "No emphysema.",
        "There is no emphysema.",
        "No emphysema is seen.",
        "The lungs are free of emphysema.",
    )
    impression = ("{degree} emphysema", "emphysema, {degree}")
    terms = r"emphysema"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        count, radius = {"mild": (5, 13), "moderate": (9, 17), "severe": (14, 21)}[
            attributes["degree"]
        ]
        u = attributes["u"]
        for side in SIDES:
            z, y, x = anatomy.lung_centre(side)
            for k in range(count):
                angle = 2.4 * k + 6 * u[0]
                centre = (
                    z + 10 + 62 * ((0.618 * k + u[1]) % 1),
                    y + 46 * np.cos(angle),
                    x + 28 * np.sin(angle),
                )
                canvas.ellipsoid(centre, (radius, radius, radius), AIR, only=in_lung)


class Pneumothorax(Finding):
    name = "Pneumothorax"
    organ = "pleura"
    attributes = {"side": ("right", "left")}
    present = (
        "There is a {side} pneumothorax.",
        "A {side} pneumothorax is seen.",
        "{Side} pneumothorax with collapse of the lung.",
        "{Side} sided pneumothorax is present.",
    )
    absent = (
        "No pneumothorax.",
        "There is no pneumothorax.",
        "No pneumothorax is seen.",
        "Both lungs are expanded without pneumothorax.",
    )
    impression = ("{side} pneumothorax", "pneumothorax on the {side}")
    terms = r"pneumothorax"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        side = attributes["side"]
        z, y, x = anatomy.lung_centre(side)
        box, cover = lung_cover(canvas, anatomy, side)
        cover = cover * in_lung(canvas.hu[box])
        zz, yy, xx = canvas.at(box)
        radii = (0.42 * anatomy.lung_height, 0.62 * anatomy.inner[0], 0.27 * anatomy.inner[1])
        inside = x - SIDES[side] * 14
        r = ((zz - z + 14) / radii[0]) ** 2 + ((yy - y - 10) / radii[1]) ** 2
        lung = soft((1 - np.sqrt(r + ((xx - inside) / radii[2]) ** 2)) * 40, 6)
        canvas.paint(box, cover * (1 - lung), AIR)
        canvas.paint(box, cover * lung, -620)


class PericardialEffusion(Finding):
    name = "Pericardial effusion"
    organ = "heart"
    attributes = {"degree": ("small", "large")}
    present = (
        "There is a {degree} pericardial effusion.",
        "A {degree} pericardial effusion is seen.",
        "{Degree} pericardial effusion.",
        "{Degree} pericardial fluid collection.",
    )
    absent = (
        "No pericardial effusion.",
        "There is no pericardial effusion.",
        "No pericardial fluid.",
        "The pericardium is unremarkable.",
    )
    impression = ("{degree} pericardial effusion", "pericardial effusion, {degree}")
    terms = r"pericardi"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        thick = {"small": 11, "large": 21}[attributes["degree"]]
        z, y, x = anatomy.heart
        inner, outer = anatomy.heart_radii, [r + thick for r in anatomy.heart_radii]
        box = canvas.box((z, y, x), (outer[0] + 8, outer[1] + 8, outer[2] + 8))
        zz, yy, xx = canvas.at(box)

        def scaled(radii: Sequence[float]) -> np.ndarray:
            squares = ((zz - z) / radii[0]) ** 2 + ((yy - y) / radii[1]) ** 2
            return np.sqrt(squares + ((xx - x) / radii[2]) ** 2)

        shell = soft((1 - scaled(outer)) * 45, 4) * soft((scaled(inner) - 1) * 45, 4)
        soft_or_lung = canvas.hu[box] < 90  # neither contrast nor bone
        canvas.paint(box, shell * soft_or_lung * (zz > anatomy.dome - 25), FLUID)


class Cardiomegaly(Finding):
    name = "Cardiomegaly"
    organ = "heart"
    present = (
        "The heart is enlarged.",
        "There is cardiomegaly.",
        "Cardiomegaly is seen.",
        "Enlarged heart.",
    )
    absent = (
        "The heart is normal in size.",
        "Normal heart size.",
        "No cardiomegaly.",
        "Heart size is normal.",
    )
    impression = ("cardiomegaly", "enlarged heart")
    terms = r"cardiomegaly|heart"

    def change(self, anatomy: Anatomy, attributes: Attributes) -> Anatomy:
        return enlarge_heart(anatomy, 1.36 + 0.14 * attributes["u"][0])


class ArterialWallCalcification(Finding):
    name = "Arterial wall calcification"
    organ = "aorta"
    attributes = {"degree": ("mild", "severe")}
    present = (
        "There is {degree} calcification of the aortic wall.",
        "{Degree} aortic wall calcification is seen.",
        "{Degree} calcification along the aorta.",
        "The aorta shows {degree} wall calcification.",
    )
    absent = (
        "No aortic calcification.",
        "There is no calcification of the aorta.",
        "No aortic wall calcification is seen.",
        "The aorta is free of calcification.",
    )
    impression = ("{degree} aortic calcification", "aortic wall calcification, {degree}")
    terms = r"aort\w* .*calcification|calcification .*aort"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        step = {"mild": 48, "severe": 18}[attributes["degree"]]
        y, x = anatomy.aorta
        radius, u = anatomy.aorta_radius, attributes["u"]
        for k, z in enumerate(np.arange(canvas.axes[0][0] + 8, anatomy.dome + 120, step)):
            angle = 2.1 * k + 6 * u[0]
            centre = (z, y + radius * np.sin(angle), x + radius * np.cos(angle))
            canvas.ellipsoid(centre, (9, 6, 6), 1100)


class Lymphadenopathy(Finding):
    name = "Lymphadenopathy"
    organ = "mediastinum"
    sizes = (16, 30)
    present = (
        "There are enlarged mediastinal lymph nodes up to {size} mm.",
        "Mediastinal lymphadenopathy with nodes up to {size} mm.",
        "Enlarged lymph nodes of the mediastinum, the largest {size} mm.",
        "Mediastinal lymphadenopathy is seen, up to {size} mm.",
    )
    absent = (
        "No mediastinal lymphadenopathy.",
        "There is no lymphadenopathy.",
        "No enlarged lymph nodes.",
        "The mediastinal lymph nodes are normal.",
    )
    impression = (
        "mediastinal lymphadenopathy up to {size} mm",
        "lymphadenopathy of up to {size} mm",
    )
    terms = r"lymph"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        radius = attributes["size"] / 2
        places = ((112, -34, 12, 1.0), (96, 24, -28, 0.8), (122, 4, -26, 0.75), (98, -6, 30, 0.7))
        for z, y, x, share in places:
            r = radius * share
            canvas.ellipsoid((anatomy.dome + z, y, x), (r, r, r), 48)


class HiatalHernia(Finding):
    name = "Hiatal hernia"
    organ = "stomach"
    sizes = (36, 56)
    present = (
        "There is a hiatal hernia of {size} mm.",
        "A {size} mm hiatal hernia is seen.",
        "Hiatal hernia measuring {size} mm.",
        "Herniation of the stomach through the hiatus, {size} mm.",
    )
    absent = (
        "No hiatal hernia.",
        "There is no hiatal hernia.",
        "No hernia at the hiatus.",
        "The hiatus is normal.",
    )
    impression = ("{size} mm hiatal hernia", "hiatal hernia of {size} mm")
    terms = r"hiat"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        r = attributes["size"] / 2
        z, y, x = anatomy.dome + 22, 0.2 * anatomy.half_depth + 4, 16.0
        canvas.ellipsoid((z, y, x), (r, r * 0.8, r), 40)
        canvas.ellipsoid((z, y, x), (r - 5, r * 0.8 - 5, r - 5), 15)
        canvas.ellipsoid((z + 2, y - 0.3 * r, x), (0.6 * r, 0.35 * r, 0.6 * r), -900)


class LiverLesion(Finding):
    name = "Liver lesion"
    organ = "liver"
    attributes = {"lobe": ("right", "left")}
    sizes = (20, 48)
    present = (
        "There is a {size} mm hypodense lesion in the {lobe} lobe of the liver.",
        "A {size} mm lesion is seen in the {lobe} liver lobe.",
        "Hypodense {size} mm lesion of the {lobe} hepatic lobe.",
        "The {lobe} lobe of the liver contains a {size} mm lesion.",
    )
    absent = (
        "No liver lesion.",
        "There is no focal liver lesion.",
        "No lesion of the liver is seen.",
        "The liver is homogeneous without lesion.",
    )
    impression = ("{size} mm lesion in the {lobe} liver lobe", "{lobe} liver lesion of {size} mm")
    terms = r"lesion"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        r, u = attributes["size"] / 2, attributes["u"]
        z, y, x = anatomy.liver
        if attributes["lobe"] == "right":
            centre = (z - 4 + 24 * (u[0] - 0.5), y + 40 * (u[1] - 0.5), x + 40 * (u[2] - 0.5) - 4)
        else:
            centre = (z + 2, -0.40 * anatomy.half_depth + 8 * (u[1] - 0.5), -2 + 20 * (u[2] - 0.5))
        value = anatomy.hu("liver") - 55
        canvas.ellipsoid(centre, (r, r, r), value, only=lambda hu: (hu > -60) * (hu < 260.0))


class Gallstones(Finding):
    name = "Gallstones"
    organ = "gallbladder"
    present = (
        "There are stones in the gallbladder.",
        "Gallstones are seen.",
        "The gallbladder contains calcified stones.",
        "Cholelithiasis with calcified gallstones.",
    )
    absent = (
        "No gallstones.",
        "The gallbladder is unremarkable.",
        "No stones in the gallbladder.",
        "The gallbladder is normal.",
    )
    impression = ("gallstones", "cholelithiasis")
    terms = r"gallstone|gallbladder|cholelith"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        z, y, x = anatomy.gallbladder
        for dz, dx in ((-14, -3), (-4, 5), (-12, 6)):
            canvas.ellipsoid((z + dz, y + 6, x + dx), (6.5, 6.5, 6.5), 900)


class Splenomegaly(Finding):
    name = "Splenomegaly"
    organ = "spleen"
    present = (
        "The spleen is enlarged.",
        "There is splenomegaly.",
        "Splenomegaly is seen.",
        "Enlarged spleen.",
    )
    absent = (
        "The spleen is normal in size.",
        "Normal spleen.",
        "No splenomegaly.",
        "The spleen is unremarkable.",
    )
    impression = ("splenomegaly", "enlarged spleen")
    terms = r"spleen|splenomegaly"

    def change(self, anatomy: Anatomy, attributes: Attributes) -> Anatomy:
        return enlarge_spleen(anatomy, 1.5 + 0.2 * attributes["u"][0])


class RenalCyst(Finding):
    name = "Renal cyst"
    organ = "kidney"
    attributes = {"side": ("right", "left")}
    sizes = (24, 52)
    present = (
        "There is a {size} mm cyst of the {side} kidney.",
        "A {size} mm {side} renal cyst is seen.",
        "{Side} renal cyst of {size} mm.",
        "The {side} kidney has a {size} mm cyst.",
    )
    absent = (
        "No renal cyst.",
        "There is no renal cyst.",
        "No cyst of the kidneys is seen.",
        "The kidneys are free of cysts.",
    )
    impression = ("{size} mm {side} renal cyst", "{side} renal cyst of {size} mm")
    terms = r"cyst"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        r, u = attributes["size"] / 2, attributes["u"]
        z, y, x = anatomy.kidney(attributes["side"])
        out = SIDES[attributes["side"]] * (anatomy.kidney_radii[2] + 0.3 * r)
        canvas.ellipsoid((z + 50 * (u[0] - 0.5), y + 6, x + out), (r, r, r), 4)


class KidneyStone(Finding):
    name = "Kidney stone"
    organ = "kidney"
    attributes = {"side": ("right", "left")}
    sizes = (10, 18)
    present = (
        "There is a {size} mm stone in the {side} kidney.",
        "A {size} mm {side} kidney stone is seen.",
        "{Side} renal stone of {size} mm.",
        "The {side} kidney contains a {size} mm stone.",
    )
    absent = (
        "No kidney stone.",
        "There is no renal stone.",
        "No stones of the kidneys are seen.",
        "The kidneys are free of stones.",
    )
    impression = ("{size} mm {side} kidney stone", "{side} renal stone of {size} mm")
    terms = r"(kidney|renal)s? .*stone|stones? .*kidney"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        r, u = attributes["size"] / 2, attributes["u"]
        z, y, x = anatomy.kidney(attributes["side"])
        canvas.ellipsoid((z + 44 * (u[0] - 0.5), y, x), (r, r, r), 1300)


class Ascites(Finding):
    name = "Ascites"
    organ = "peritoneum"
    attributes = {"degree": ("small", "large")}
    present = (
        "There is a {degree} amount of ascites.",
        "{Degree} ascites is seen.",
        "{Degree} volume ascites.",
        "Free abdominal fluid, {degree} amount of ascites.",
    )
    absent = (
        "No ascites.",
        "There is no ascites.",
        "No free abdominal fluid.",
        "The abdomen is free of ascites.",
    )
    impression = ("{degree} ascites", "ascites, {degree} amount")
    terms = r"ascites|abdominal fluid"

    def draw(self, canvas: Canvas, anatomy: Anatomy, attributes: Attributes) -> None:
        thick = {"small": 13, "large": 27}[attributes["degree"]]
        depth, width = anatomy.inner
        r = np.abs(canvas.y / depth) ** 2.4 + np.abs(canvas.x / width) ** 2.4
        inside = (1 - r ** (1 / 2.4)) * depth
        rim = soft(inside, 4) * soft(thick - inside, 4)
        flanks = np.abs(canvas.x) > 0.45 * width  # fluid gathers at the sides
        low = canvas.z < anatomy.dome - 40
        fat = (canvas.hu < -40) & (canvas.hu > -200)
        canvas.paint(everything(canvas), rim * flanks * low * fat, FLUID)


FINDINGS: dict[str, Finding] = {
    kind.name: kind()
    for kind in (
        PleuralEffusion,
        Pneumothorax,
        Consolidation,
        LungOpacity,
        LungNodule,
        Emphysema,
        Lymphadenopathy,
        Cardiomegaly,
        PericardialEffusion,
        ArterialWallCalcification,
        HiatalHernia,
        LiverLesion,
        Gallstones,
        Splenomegaly,
        RenalCyst,
        KidneyStone,
        Ascites,
    )
}
ORGANS = tuple(dict.fromkeys(finding.organ for finding in FINDINGS.values()))


def concept_names() -> tuple[str, ...]:
    """Every yes/no label a study has: findings, their attributes, plane and phase."""
    from med3dvlm.data.phantoms.anatomy import PHASES, PLANES

    names = []
    for finding in FINDINGS.values():
        names.append(finding.name)
        for key, values in finding.attributes.items():
            names += [f"{finding.name}/{key}={value}" for value in values]
        if finding.sizes is not None:
            names.append(f"{finding.name}/size=large")
    names += [f"plane={plane}" for plane in PLANES]
    return (*names, *(f"phase={phase}" for phase in PHASES))
