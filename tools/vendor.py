"""Refresh what the workstation page carries from npm: `make vendor`, where a network is.

`vendor.json` beside the files pins each package by version and npm's integrity, and each file by
its SHA-256. To move to another version: change it there, clear the hashes, run this, read the
changes, commit. Whoever runs it again gets the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

FOLDER = Path(__file__).parents[1] / "src/med3dvlm/service/web/vendor"
ESM_STRING = re.compile(r'\s*export const esm = "([^"]*)";?\s*')


def main() -> None:
    listing = FOLDER / "vendor.json"
    packages = json.loads(listing.read_text())
    for package in packages:
        refresh(package)
    listing.write_text(json.dumps(packages, indent=2) + "\n")


def refresh(package: dict[str, Any]) -> None:
    """Write a package's files, and its hashes where `vendor.json` has none yet."""
    with tempfile.TemporaryDirectory() as folder:
        tarball = fetch(f"{package['package']}@{package['version']}", Path(folder))
        digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        pin(package, "integrity", f"sha512-{digest}", package["package"])
        with tarfile.open(tarball) as archive:
            for file in package["files"]:
                member = archive.extractfile(f"package/{file['from']}")
                if member is None:
                    sys.exit(f"{package['package']} has no file {file['from']}.")
                content = member.read()
                if file.get("percent_encoded"):
                    content = decode(content)
                pin(file, "sha256", hashlib.sha256(content).hexdigest(), file["to"])
                (FOLDER / file["to"]).write_bytes(content)


def fetch(name: str, folder: Path) -> Path:
    command = ["npm", "pack", "--silent", name, "--pack-destination", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / done.stdout.split()[-1]


def decode(content: bytes) -> bytes:
    """NiiVue's minified module is published as a string that is meant for a `blob:` import.

    Written out, it is an ordinary module that a strict content security policy lets in.
    """
    match = ESM_STRING.fullmatch(content.decode())
    if match is None:
        sys.exit("The minified module is no longer one percent-encoded string: look at it.")
    return unquote(match[1]).encode()


def pin(entry: dict[str, Any], name: str, found: str, what: str) -> None:
    if entry[name] and entry[name] != found:
        sys.exit(f"{what}: {name} is {found}, vendor.json says {entry[name]}.")
    entry[name] = found


if __name__ == "__main__":
    main()
