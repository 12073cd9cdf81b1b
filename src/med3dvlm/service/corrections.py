"""What people signed, as training data: a manifest with the volumes beside it.

med3dvlm service corrections signed/
med3dvlm prepare folder signed/ -o signed.store --preparation …
med3dvlm train instruction recipe.yaml data.store=signed.store
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from med3dvlm.files import atomic_file
from med3dvlm.service import reviews
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service

MANIFEST = "manifest.jsonl"


def write_corrections(service: Service, folder: Path, identity: Identity) -> int:
    """Write the manifest of :func:`reviews.corrections` and its volumes; says how many.

    Volumes that are there already are not copied again. The export is noted in the audit log
    before anything is written.

    Raises:
        ValueError: if nothing was signed yet.
    """
    with service.database.session() as session:
        record(session, identity, "corrections.export", "corrections")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = []
    with service.database.reading() as session:
        for row in reviews.corrections(session):
            target = folder / row["path"]
            if not target.is_file():
                with atomic_file(target) as temporary:
                    shutil.copyfile(service.storage.fetch(row["path"]), temporary)
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not rows:
        raise ValueError("no report was signed yet: there is nothing to learn from.")
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text("".join(rows), "utf-8")
    return len(rows)
