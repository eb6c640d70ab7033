"""Packages that a test installs, as far as entry points need it."""

from __future__ import annotations

from pathlib import Path


def install_entry_point(place: Path, package: str, group: str, entry: str) -> None:
    """Put a package with one entry point into a folder, as an installer does."""
    information = place / f"{package}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
