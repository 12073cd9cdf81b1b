"""Findings of the abdomen."""

from __future__ import annotations

import numpy as np

from med3dvlm.data.phantoms.anatomy import FLUID, SIDES, Anatomy, Torso, enlarge_spleen
from med3dvlm.data.phantoms.canvas import Triple, soft
from med3dvlm.data.phantoms.finding import Finding, PlacedFinding


class LiverLesion(Finding):
    name = "Liver lesion"
    organ = "liver"
    asked = "a liver lesion"
    attributes = {"lobe": ("right", "left")}
    sizes = (20, 44)
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
    terms = r"(liver|hepatic).*lesion|lesion.*(liver|hepatic)"

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        u = placed.u
        if placed.attributes["lobe"] == "right":
            z, y, x = anatomy.liver
            return (z + 20 * (u[0] - 0.5), y + 40 * (u[1] - 0.5), x - 14 + 30 * (u[2] - 0.5))
        z, y, x = anatomy.left_liver
        return (z + 6 * (u[0] - 0.5), y + 6, x + 14 * (u[2] - 0.5))

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        r = placed.attributes["size"] / 2
        value = torso.anatomy.hu("liver") - 60
        torso.clipped(self.centre(torso.anatomy, placed), (r, r, r), value, over=(-300, 260))


class Gallstones(Finding):
    name = "Gallstones"
    organ = "gallbladder"
    asked = "gallstones"
    plural = True
    present = (
        "There are stones in the gallbladder.",
        "Gallstones are seen.",
        "The gallbladder contains calcified stones.",
        "Multiple calcified gallstones.",
    )
    absent = (
        "No gallstones.",
        "The gallbladder is unremarkable.",
        "No stones in the gallbladder.",
        "The gallbladder is normal.",
    )
    impression = ("gallstones", "stones in the gallbladder")
    terms = r"gallstone|gallbladder"

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        z, y, x = anatomy.gallbladder
        return (z - 10, y + 6, x)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        z, y, x = self.centre(torso.anatomy, placed)
        turn = 6 * placed.u[0]
        for k in range(4):
            centre = (z + 11 * np.sin(2 * k + turn), y, x + 6 * np.cos(1.5 * k + turn))
            torso.ellipsoid(centre, (6.5, 6.0, 6.0), 800)


class Splenomegaly(Finding):
    name = "Splenomegaly"
    organ = "spleen"
    asked = "splenomegaly"
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
        "The spleen is not enlarged.",
    )
    impression = ("splenomegaly", "enlarged spleen")
    terms = r"spleen|splenomegaly"

    def change(self, anatomy: Anatomy, placed: PlacedFinding) -> Anatomy:
        return enlarge_spleen(anatomy, 1.5 + 0.2 * placed.u[0])

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return anatomy.spleen


class RenalCyst(Finding):
    name = "Renal cyst"
    organ = "kidney"
    asked = "a renal cyst"
    attributes = {"side": ("right", "left")}
    sizes = (22, 44)
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

    def places(self, placed: PlacedFinding) -> set[str]:
        return {f"fluid of the {placed.attributes['side']} kidney"}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        side, r = placed.attributes["side"], placed.attributes["size"] / 2
        z, y, x = anatomy.kidney(side)
        pole = 1 if placed.u[0] > 0.5 else -1
        out = SIDES[side] * (0.6 * anatomy.kidney_radii[2] + 0.4 * r)
        return (z + pole * (0.55 * anatomy.kidney_radii[0] + 0.2 * r), y - 8, x + out)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        r = placed.attributes["size"] / 2
        torso.clipped(self.centre(torso.anatomy, placed), (r, r, r), 4, over=(-2000, 300))


class Hydronephrosis(Finding):
    name = "Hydronephrosis"
    organ = "kidney"
    asked = "hydronephrosis"
    attributes = {"side": ("right", "left"), "degree": ("mild", "severe")}
    present = (
        "There is {degree} {side} hydronephrosis.",
        "{Degree} hydronephrosis of the {side} kidney.",
        "{Degree} {side} hydronephrosis is seen.",
        "The {side} kidney shows {degree} hydronephrosis.",
    )
    absent = (
        "No hydronephrosis.",
        "There is no hydronephrosis.",
        "No hydronephrosis is seen.",
        "The kidneys drain without hydronephrosis.",
    )
    impression = ("{degree} {side} hydronephrosis", "{side} hydronephrosis, {degree}")
    terms = r"hydronephrosis"

    def places(self, placed: PlacedFinding) -> set[str]:
        return {f"fluid of the {placed.attributes['side']} kidney"}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        side = placed.attributes["side"]
        z, y, x = anatomy.kidney(side)
        return (z, y, x - SIDES[side] * 11)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        z, y, x = self.centre(torso.anatomy, placed)
        scale = {"mild": 1.1, "severe": 1.6}[placed.attributes["degree"]]
        out = SIDES[placed.attributes["side"]]
        torso.ellipsoid((z, y, x), (19 * scale, 12 * scale, 16 * scale), 3)
        for up in (-1, 0, 1):  # calyces
            centre = (z + 22 * up, y, x + out * (16 - 3 * abs(up)))
            torso.ellipsoid(centre, (8 * scale, 7 * scale, 7 * scale), 3)


class KidneyStone(Finding):
    name = "Kidney stone"
    organ = "kidney"
    asked = "a kidney stone"
    attributes = {"side": ("right", "left")}
    sizes = (12, 20)
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
    terms = r"(kidney|renal).*stone|stone.*kidney"

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        side = placed.attributes["side"]
        z, y, x = anatomy.kidney(side)
        up = (placed.u[0] - 0.5) * 36
        return (z + up, y + 0.1 * up, x - SIDES[side] * (2 + 0.2 * up))

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        r = placed.attributes["size"] / 2
        torso.ellipsoid(self.centre(torso.anatomy, placed), (r, r, r), 1300)


class Ascites(Finding):
    name = "Ascites"
    organ = "peritoneum"
    asked = "ascites"
    attributes = {"degree": ("small", "large")}
    present = (
        "There is a {degree} amount of ascites.",
        "{Degree} volume of ascites is seen.",
        "Ascites of {degree} volume.",
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
    thick_mm = {"small": 13.0, "large": 28.0}

    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        return (anatomy.dome - 150, 0.0, -0.85 * anatomy.half_width)

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:
        a = torso.anatomy
        thick = self.thick_mm[placed.attributes["degree"]]
        low = int(np.searchsorted(torso.axes[0], a.dome - 30))
        box = (slice(0, low), slice(None), slice(None))
        _, y, x = torso.at(box)
        now = torso.hu[box]
        deep = (1 - torso.oval[box]) * np.float32(a.half_depth / 2.0)  # mm under the surface
        cover = soft(deep - 1, 3)
        cover *= soft(thick - deep, 4)
        # fluid gathers at the flanks, before the psoas
        cover *= soft(np.abs(x) - 0.5 * a.half_width, 10) * soft(0.72 * a.half_depth - y, 10)
        cover *= (now < -30) & (now > -200)
        torso.paint(box, cover, FLUID)
