"""Search: studies by words, or those like another."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import select

from med3dvlm.service import studies
from med3dvlm.service.api.common import Core, HexId, MaySearch, QueryText
from med3dvlm.service.api.schemas import HitsOut
from med3dvlm.service.studies import VOLUME, Conflict, Unusable, key
from med3dvlm.service.tables import Study

router = APIRouter(prefix="/api/search", tags=["search"])


@router.get("", response_model=HitsOut)
def search(
    identity: MaySearch,
    core: Core,
    text: Annotated[QueryText, Query(description="What is to be seen.")] = "",
    study: Annotated[HexId | None, Query(description="Studies like this one.")] = None,
    top: Annotated[int, Query(ge=1, le=100)] = 10,
    where: Annotated[list[QueryText] | None, Query(description="modality=CT, …")] = None,
) -> dict[str, Any]:
    """The studies that fit best, best first; what reports say counts once they are signed."""
    vector = None
    if study is not None:
        with core.database.reading() as session:
            studies.get_ready(session, study)
        vector = core.index.vector(key(study, VOLUME))
        if vector is None:
            raise Conflict("The study is not in the search index yet; try again in a moment.")
    elif not text.strip():
        raise Unusable("Say what is sought: text, or study.")
    wanted = top if study is None else top + 1
    found = core.index.search(text.strip() or None, vector=vector, top=wanted, where=where or ())
    with core.database.reading() as session:
        rows = session.scalars(select(Study).where(Study.id.in_([hit.id for hit in found])))
        known = {row.id: row for row in rows}
    hits = [
        {
            "study": studies.describe(core, known[hit.id]),
            "score": hit.score,
            "first_line": next(iter(hit.report.splitlines()), ""),
            "thumbnail": f"/api/studies/{hit.id}/thumbnail.png",
        }
        for hit in found
        if hit.id in known and hit.id != study
    ]
    return {"hits": hits[:top]}
