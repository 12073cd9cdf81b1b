"""Findings of the chest."""

from __future__ import annotations

import numpy as np

from med3dvlm.data.phantoms.anatomy import AIR, FLUID, SIDES, Anatomy, Torso, enlarge_heart
from med3dvlm.data.phantoms.canvas import Triple, soft
from med3dvlm.data.phantoms.finding import (
    LOBES,
    Finding,
    PlacedFinding,
    aerated,
    both,
    lobes_of,
)


def in_lobe(anatomy: Anatomy, placed: PlacedFinding) -> Triple:
    """A place in the finding's lobe, (z, y, x) mm."""
    side, up, back = LOBES[placed.attributes["lobe"]]
    z, y, x = anatomy.lung_centre(side)
    u = placed.u
    return (
        z + up * anatomy.lung_height + (u[0] - 0.5) * 16,
        y + back * anatomy.half_depth + (u[1] - 0.5) * 14,
        x + (u[2] - 0.5) * 22,
    )


def paint_in_lung(torso: Torso, centre: Triple, radii: Triple, value: float) -> None:
    box, cover = torso.ellipsoid_cover(centre, radii)
    cover *= aerated(torso.hu[box])
    torso.paint(box, cover, value)


class PleuralEffusion(Finding):
    name = "Pleural effusion"
    organ = "pleura"
    asked = "a pleural effusion"
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
    level = {"small": 0.42, "moderate": 0.06, "large": -0.36}

    def places(self, placed: PlacedFinding) -> set[str]:
        filled = set()
        for side in both(placed.attributes["side"]):
            filled |= {f"{side} base"}
            if placed.attributes["degree"] != "small":
                filled |= {f"{side} lower lobe"}
            if placed.attributes["degree"] == "large":
                filled |= {f"{side} middle lobe"}
        return filled

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        x = anatomy.lung_centre(both(placed.attributes["side"])[0])[2]
        return (anatomy.dome, 0.65 * anatomy.half_depth, x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a = torso.anatomy
        for side in both(placed.attributes["side"]):
            box, cover = torso.lungs[side]
            z, y, x = torso.at(box)
            height = (z - torso.dome_height(y, x, side)) / a.lung_height
            # lying on the back: fluid fills what is low in the table's sense, and the base
            back = y / a.half_depth - 1.5 * height - self.level[placed.attributes["degree"]]
            torso.paint(box, cover * soft(back * np.float32(a.half_depth), 5), FLUID)


class Pneumothorax(Finding):
    name = "Pneumothorax"
    organ = "pleura"
    asked = "a pneumothorax"
    attributes = {"side": ("right", "left")}
    present = (
        "There is a {side} pneumothorax.",
        "A {side} pneumothorax is seen.",
        "{Side} pneumothorax with collapse of the lung.",
        "A pneumothorax is present on the {side}.",
    )
    absent = (
        "No pneumothorax.",
        "There is no pneumothorax.",
        "No pneumothorax is seen.",
        "Both lungs are expanded without pneumothorax.",
    )
    impression = ("{side} pneumothorax", "pneumothorax on the {side}")
    terms = r"pneumothorax"

    def places(self, placed: PlacedFinding) -> set[str]:
        side = placed.attributes["side"]
        return lobes_of(side) | {f"{side} base", f"{side} opacity"}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        z, y, x = anatomy.lung_centre(placed.attributes["side"])
        return (z, y - 0.4 * anatomy.half_depth, x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a, side = torso.anatomy, placed.attributes["side"]
        box, cover = torso.lungs[side]
        cover = cover * aerated(torso.hu[box])
        z, y, x = a.lung_centre(side)
        zz, yy, xx = torso.at(box)
        # what is left of the lung hangs at its hilum
        share = 0.78 + 0.2 * placed.u[0]
        square = ((zz - z + 8) / (0.42 * share * a.lung_height)) ** 2
        square = square + ((yy - y - 14) / (0.62 * share * a.half_depth)) ** 2
        square = square + ((xx - x + SIDES[side] * 18) / (0.34 * share * a.half_width)) ** 2
        lung = soft((1 - square) * np.float32(18), 4)
        now = torso.hu[box]
        torso.paint(box, cover * (1 - lung), AIR)
        now += cover * lung * (np.maximum(now, -640) - now)


class Consolidation(Finding):
    name = "Consolidation"
    organ = "lung"
    asked = "consolidation"
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

    def places(self, placed: PlacedFinding) -> set[str]:
        return {placed.attributes["lobe"]}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return in_lobe(anatomy, placed)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        z, y, x = self.centre(torso.anatomy, placed)
        turn = 6 * placed.u[3]
        paint_in_lung(torso, (z, y, x), (27, 25, 23), 35)
        for k in range(6):  # an irregular mass of lobules
            centre = (
                z + 20 * np.sin(2.1 * k + turn),
                y + 19 * np.cos(1.7 * k + turn),
                x + 15 * np.sin(k + turn),
            )
            paint_in_lung(torso, centre, (19, 18, 17), 25)
        torso.ellipsoid((z + 6, y, x), (4, 4, 14), -500)  # air in a bronchus


class LungOpacity(Finding):
    name = "Lung opacity"
    organ = "lung"
    asked = "a lung opacity"
    attributes = {"side": ("right", "left", "bilateral")}
    present = (
        "There is {side} ground-glass opacity.",
        "{Side} ground-glass opacity is seen.",
        "Diffuse {side} lung opacity of ground-glass density.",
        "Hazy {side} lung opacity is present.",
    )
    absent = (
        "No lung opacity.",
        "There is no ground-glass opacity.",
        "No ground-glass opacity is seen.",
        "The lungs are clear without opacity.",
    )
    impression = ("{side} ground-glass opacity", "{side} lung opacity")
    terms = r"opacity|opacities|ground-glass"

    def places(self, placed: PlacedFinding) -> set[str]:
        return {f"{side} opacity" for side in both(placed.attributes["side"])}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        z, y, x = anatomy.lung_centre(both(placed.attributes["side"])[0])
        return (z + 20, y + 14 * (placed.u[0] - 0.5), x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        z, y, x = self.centre(torso.anatomy, placed)
        for side in both(placed.attributes["side"]):
            centre = (z, y, SIDES[side] * abs(x))
            for k in range(4):  # patches that run together
                step = (22 * np.sin(2 * k), 20 * np.cos(2.4 * k), 9 * np.sin(3 * k))
                patch = (centre[0] + step[0], centre[1] + step[1], centre[2] + step[2])
                box, cover = torso.ellipsoid_cover(patch, (44, 38, 29))
                now = torso.hu[box]
                now += cover * aerated(now) * (np.maximum(now, -540) - now)


class LungNodule(Finding):
    name = "Lung nodule"
    organ = "lung"
    asked = "a lung nodule"
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

    def places(self, placed: PlacedFinding) -> set[str]:
        return {placed.attributes["lobe"]}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return in_lobe(anatomy, placed)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        r = placed.attributes["size"] / 2
        paint_in_lung(torso, self.centre(torso.anatomy, placed), (r, r, r), 45)


class Emphysema(Finding):
    name = "Emphysema"
    organ = "lung"
    asked = "emphysema"
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
    bullae = {"mild": (6, 13.0), "moderate": (9, 16.0), "severe": (14, 20.0)}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        z, y, x = anatomy.lung_centre("right")
        return (z + 30, y, x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a, u = torso.anatomy, placed.u
        count, radius = self.bullae[placed.attributes["degree"]]
        for side, sign in SIDES.items():
            z, y, x = a.lung_centre(side)
            for k in range(count):  # most in the upper lung, spread by the golden angle
                angle = 2.4 * k + 6 * u[0] + sign
                up = (0.618 * k + u[1]) % 1
                centre = (z - 10 + 80 * up, y + 44 * np.cos(angle), x + 22 * np.sin(angle))
                r = radius * (0.8 + 0.4 * ((0.37 * k + u[2]) % 1))
                paint_in_lung(torso, centre, (r, r, r), AIR)


class Lymphadenopathy(Finding):
    name = "Lymphadenopathy"
    organ = "mediastinum"
    asked = "lymphadenopathy"
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
    # lung heights above the dome, y, x, share of the stated size
    stations = ((0.60, -47, 4, 1.0), (0.62, 4, -27, 0.8), (0.44, 24, -10, 0.8), (0.46, -6, 45, 0.7))

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        up, y, x, _ = self.stations[0]
        return (anatomy.dome + up * anatomy.lung_height, y, x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a = torso.anatomy
        value = (45, 68, 88, 80)[a.phase]
        for up, y, x, share in self.stations:
            r = placed.attributes["size"] / 2 * share
            torso.ellipsoid((a.dome + up * a.lung_height, y, x), (r, r, r), value)


class Cardiomegaly(Finding):
    name = "Cardiomegaly"
    organ = "heart"
    asked = "cardiomegaly"
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
        "The heart is not enlarged.",
    )
    impression = ("cardiomegaly", "enlarged heart")
    terms = r"cardiomegaly|heart"

    def change(self, anatomy: Anatomy, placed: PlacedFinding) -> Anatomy:
        return enlarge_heart(anatomy, 1.36 + 0.14 * placed.u[0])

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return anatomy.heart


class PericardialEffusion(Finding):
    name = "Pericardial effusion"
    organ = "heart"
    asked = "a pericardial effusion"
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
    thick_mm = {"small": 12.0, "large": 22.0}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        z, y, x = anatomy.heart
        return (z, y, x + anatomy.heart_radii[2] + 5)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a = torso.anatomy
        thick = self.thick_mm[placed.attributes["degree"]]
        rz, ry, rx = a.heart_radii
        outer = (rz + thick, ry + thick, rx + thick)
        lean = (0.0, -0.35)
        box, cover = torso.ellipsoid_cover(a.heart, outer, lean=lean)
        z, y, x = torso.at(box)
        up = z - a.heart[0]
        square = (up / rz) ** 2 + ((y - a.heart[1]) / ry) ** 2
        square = square + ((x - a.heart[2] + 0.35 * up) / rx) ** 2
        now = torso.hu[box]
        cover *= soft((square - 1) * np.float32(18), 3) * torso.inside(box)
        cover *= (now < 20) & (z > a.dome - 30)  # fat and lung give way, vessels do not
        torso.paint(box, cover, FLUID)


class ArterialWallCalcification(Finding):
    name = "Arterial wall calcification"
    organ = "aorta"
    asked = "arterial wall calcification"
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
    terms = r"(aort|arterial).*calcifi|calcifi.*aort"
    step_mm = {"mild": 44.0, "severe": 15.0}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return (anatomy.dome + 40, *anatomy.aorta)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a = torso.anatomy
        low, step = float(torso.axes[0][0]) + 8, self.step_mm[placed.attributes["degree"]]
        for k, z in enumerate(np.arange(low, a.arch + 8, step)):
            angle = 2.1 * k + 6 * placed.u[0]
            y, x = a.aorta if z > a.dome - 40 else (a.half_depth - 34, 8)
            r = a.aorta_radius
            centre = (z, y + r * np.sin(angle), x + r * np.cos(angle))
            torso.ellipsoid(centre, (9, 5.5, 5.5), 1100)


class HiatalHernia(Finding):
    name = "Hiatal hernia"
    organ = "stomach"
    asked = "a hiatal hernia"
    sizes = (34, 50)
    present = (
        "There is a hiatal hernia of {size} mm.",
        "A {size} mm hiatal hernia is seen.",
        "Hiatal hernia measuring {size} mm.",
        "Hernia of the stomach at the hiatus, {size} mm.",
    )
    absent = (
        "No hiatal hernia.",
        "There is no hiatal hernia.",
        "No hernia at the hiatus.",
        "The hiatus is normal.",
    )
    impression = ("{size} mm hiatal hernia", "hiatal hernia of {size} mm")
    terms = r"hiat"

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return (anatomy.dome + 16, 26.0, -2.0)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        z, y, x = self.centre(torso.anatomy, placed)
        r = placed.attributes["size"] / 2
        torso.ellipsoid((z, y, x), (r, 0.75 * r, r), torso.anatomy.hu("bowel"))
        torso.ellipsoid((z, y, x), (r - 4, 0.75 * r - 4, r - 4), 15)
        torso.ellipsoid((z + 2, y - 0.25 * r, x), (0.6 * r, 0.35 * r, 0.6 * r), -900)
