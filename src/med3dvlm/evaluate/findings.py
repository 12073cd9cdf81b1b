"""Which findings a free report states, by rules: CT-RATE's 18, or the phantoms'."""

from __future__ import annotations

from collections.abc import Mapping

from med3dvlm.data.assertions import Status, Term, read_assertions
from med3dvlm.data.phantoms import PHANTOM_TERMS

ARTERY = r"(?:aort\w*|carotid\w*|subclavian|brachiocephalic|supra-?aortic|arterial walls?)"
CORONARY = r"(?:coronar\w*|\bLAD\b|left anterior descending|circumflex)"
PLAQUE = r"(?:calcif\w*|plaques?)"
LARGE = r"\b(?:[1-9]\d(?:\.\d+)? ?mm|[1-9](?:\.\d+)? ?cm)\b"  # 10 mm and more
ENLARGED = r"(?:enlarge\w*|larger|increased?|above normal)"
OTHER_ORGAN = r"(?:thyroid|adrenal|breast|hepatic|liver|spleen|subcutaneous|schmorl)"
OTHER_SEROSA = r"(?:(?:,| and| or|,? and/or|-) ?(?:peri|pleur)\w*al)*"

CT_RATE_TERMS: dict[str, Term] = {
    "Medical material": Term(
        r"catheters?|pacemakers?|stents?|(?:sternotomy|sternal|cerclage) wires?|\w+ tube|\bport\b|"
        r"prosthe\w+|implants?|surgical (?:clips?|material)|sutures?|\bscrews?\b|cannula|"
        r"electrodes?|medical (?:material|device)|\bcoils?\b|drainage tube"
    ),
    "Arterial wall calcification": Term(
        rf"{ARTERY}[^.;]*?{PLAQUE}|{PLAQUE}[^.;]*?{ARTERY}", unlike=r"aortic valve"
    ),
    "Cardiomegaly": Term(
        rf"cardiomegaly|enlarged heart|(?:heart|cardiac|cardiothoracic)\b[^.;,]*?{ENLARGED}",
        normal=r"(?:heart|cardiac|cardiothoracic)\b[^.;,]*?(?<!than )(?<!above )normal|"
        r"normal (?:heart|cardiac) (?:size|contour)",
    ),
    "Pericardial effusion": Term(
        rf"pericardial{OTHER_SEROSA} (?:effusion|fluid)|(?:effusion|fluid)[^.;,]*?pericardi\w+",
        normal=r"pericardium (?:is|appears) (?:normal|unremarkable)",
    ),
    "Coronary artery wall calcification": Term(
        rf"{CORONARY}[^.;]*?{PLAQUE}|{PLAQUE}[^.;]*?{CORONARY}"
    ),
    "Hiatal hernia": Term(r"hiat(?:al|us) hernia\w*|hernia\w*[^.;,]*?hiat\w+"),
    "Lymphadenopathy": Term(
        r"lymphadenopath\w*|adenopath\w*|\bLAP\b|(?:enlarged|patholog\w*)[^.;]*?lymph nodes?|"
        rf"lymph nodes?[^.;]*?(?:enlarged|patholog\w*|{LARGE})",
        normal=r"lymph nodes?[^.;]*?(?:below|less than|smaller than|under|not exceed\w*|"
        r"not reach\w*|subcentimet\w+|millimet\w+|normal)|"
        r"(?:subcentimet\w+|millimet\w+|small)[^.;,]*?lymph nodes?",
    ),
    "Emphysema": Term(r"emphysem\w*", unlike=r"(?:subcutaneous|soft tissue)[^.;,]*?emphysem"),
    "Atelectasis": Term(r"\w*atelecta\w*"),
    "Lung nodule": Term(
        r"\b(?:micro)?nodules?\b",
        unlike=rf"{OTHER_ORGAN}[^.;,]*?nodules?|nodules?[^.;,]*?{OTHER_ORGAN}",
    ),
    "Lung opacity": Term(r"ground[- ]glass|frosted glass|opacit\w+|infiltrat\w+|infiltrations?"),
    "Pulmonary fibrotic sequela": Term(
        r"fibro(?:sis|tic|atelecta)\w*|sequela[el]?\w*|honeycomb\w*|pleuroparenchymal bands?",
        unlike=r"sequela\w*[^.;]*?(?:fracture|\brib)|fracture sequela",
    ),
    "Pleural effusion": Term(
        rf"pleural{OTHER_SEROSA} (?:effusion|fluid)|(?:effusion|fluid)[^.;,]*?\bpleural|"
        r"hydrothorax",
        normal=r"pleural (?:spaces?|cavit\w+) (?:is|are) (?:clear|free|normal|unremarkable)",
    ),
    "Mosaic attenuation pattern": Term(r"mosaic"),
    "Peribronchial thickening": Term(
        r"peribronch\w+ (?:wall )?(?:thick|cuff)\w*|bronchial walls?[^.;,]*?thick\w*|"
        r"thick\w*[^.;,]*?bronchial walls?"
    ),
    "Consolidation": Term(r"consolidat\w*"),
    "Bronchiectasis": Term(r"bronchiecta\w*|bronchiolecta\w*"),
    "Interlobular septal thickening": Term(
        r"septal thick\w*|thicken\w*[^.;,]*?sept(?:a|um|al)\b|septa\b[^.;,]*?thick\w*",
        unlike=r"(?:nasal|interventricular|interatrial) sept\w+",
    ),
}

VOCABULARIES: dict[str, Mapping[str, Term]] = {"phantoms": PHANTOM_TERMS, "ct-rate": CT_RATE_TERMS}


def extract_findings(text: str, terms: Mapping[str, Term] = CT_RATE_TERMS) -> dict[str, Status]:
    """present, absent, uncertain or not mentioned, for every finding of `terms`.

    Args:
        text: a report in English.
        terms: how the findings are named; CT-RATE's 18 by default, `PHANTOM_TERMS` of
            `med3dvlm.data.phantoms` for phantom reports.
    """
    return read_assertions(text, terms)


def asserted(statuses: Mapping[str, Status], *, uncertain: bool = False) -> dict[str, bool]:
    """Which findings are present, for `finding_table`; `uncertain` ones count where asked."""
    kept = ("present", "uncertain") if uncertain else ("present",)
    return {name: status in kept for name, status in statuses.items()}
