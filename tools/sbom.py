"""Writes the software bill of materials of a wheel: CycloneDX 1.6 as JSON.

    python tools/sbom.py dist/gptc-0.1.0-py3-none-linux_x86_64.whl > dist/gptc-0.1.0.cdx.json

What the wheel needs comes from its metadata, versions and hashes from requirements.lock. Its own
files are listed with the SHA-256 of its RECORD, with which their content is compared. The same
wheel and lock give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"


def canonical(name: str) -> str:
    """A package's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, list[tuple[str, list[str]]]]:
    """The versions of each package in a lock, each with its hashes."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for block in re.split(r"\n(?=\S)", text):
        if head := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", block):
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", block)
            found.setdefault(canonical(head[1]), []).append((head[2], hashes))
    return found


def requirements(metadata: Any) -> list[tuple[str, str]]:
    """The packages that a wheel needs, each with the extra that asks for it, "" for none."""
    found = []
    for line in metadata.get_all("Requires-Dist") or ():
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name and canonical(name[0]) != canonical(metadata["Name"]):
            found.append((canonical(name[0]), extra[1] if extra else ""))
    return found


def check(archive: zipfile.ZipFile, record: list[list[str]]) -> None:
    """SystemExit unless the RECORD of a wheel has each file, with the hash of its content."""
    inside = sorted(name for name in archive.namelist() if not name.endswith("/"))
    listed = sorted(row[0] for row in record)
    if inside != listed:
        odd = sorted(set(inside) ^ set(listed)) or inside
        sys.exit(f"{archive.filename}: {odd[0]} is in it or in its RECORD alone: build again")
    for name, digest, *_ in record:
        if digest and _sha256(digest)["content"] != hashlib.sha256(archive.read(name)).hexdigest():
            sys.exit(f"{archive.filename}: {name} differs from its hash in RECORD: build again")
        if not digest and not name.endswith("dist-info/RECORD"):
            sys.exit(f"{archive.filename}: {name} has no hash in RECORD: build again")


def bill(wheel: Path, lock: str) -> dict[str, Any]:
    """The bill of materials of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = {
            name.rpartition("/")[2]: name for name in archive.namelist() if "dist-info/" in name
        }
        metadata = Parser().parsestr(archive.read(names["METADATA"]).decode())
        record = list(csv.reader(io.StringIO(archive.read(names["RECORD"]).decode())))
        check(archive, record)
    own, version = canonical(metadata["Name"]), metadata["Version"]
    reference = f"pkg:pypi/{own}@{version}"
    packages: dict[str, dict[str, Any]] = {}
    pinned = locked(lock)
    for name, extra in requirements(metadata):
        for number, _ in pinned.get(name, [("", [])]):
            purl = f"pkg:pypi/{name}@{number}".rstrip("@")
            part = {"type": "library", "bom-ref": purl, "name": name, "purl": purl}
            part |= {"version": number} if number else {}
            part["scope"] = "optional" if extra else "required"
            if packages.get(purl, part)["scope"] != "required" or purl not in packages:
                packages[purl] = part
    files = [
        {"type": "file", "name": name, "hashes": [_sha256(digest)]}
        for name, digest, *_ in record
        if digest
    ]
    whole = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": reference,
                "name": own,
                "version": version,
                "purl": reference,
                "licenses": [{"license": {"id": metadata["License-Expression"] or "MIT"}}],
                "hashes": [{"alg": "SHA-256", "content": whole}],
            }
        },
        "components": [*(packages[key] for key in sorted(packages)), *files],
        "dependencies": [{"ref": reference, "dependsOn": sorted(packages)}],
    }


def _sha256(digest: str) -> dict[str, str]:
    """A hash of a RECORD, `sha256=` and base64 without padding, as CycloneDX writes it."""
    _, _, encoded = digest.partition("sha256=")
    content = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    return {"alg": "SHA-256", "content": content}


def main() -> None:
    """Prints the bill of the wheel that is named."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/sbom.py WHEEL")
    print(json.dumps(bill(Path(sys.argv[1]), LOCK.read_text()), indent=2))


if __name__ == "__main__":
    main()
