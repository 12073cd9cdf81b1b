"""Read every scan under a path, one line each; or measure the memory of a large series.

python benchmarks/read_scans.py FOLDER          what read_scan makes of every file and series
python benchmarks/read_scans.py --large 1000    time and peak memory of a 512×512×N int16 CT
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from med3dvlm.scan import PRESETS, Scan, ScanError, prepare, read_scan, save_dicom_series
from med3dvlm.scan.dicom_series import is_dicom
from med3dvlm.scan.slices import PICTURES

LIMIT_GB = 3.0


def candidates(root: Path) -> list[Path]:
    """Files, and folders that hold slices; DICOM slices also one by one."""
    if root.is_file():
        return [root]
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    paths = []
    for folder in sorted(folders):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if any(is_dicom(file) or file.suffix.lower() in PICTURES for file in files):
            paths.append(folder)
        paths += [file for file in files if not is_dicom(file)]
    return paths


def line(path: Path) -> str:
    start = time.perf_counter()
    try:
        scan = read_scan(path)
    except ScanError as error:
        return f"ERROR {time.perf_counter() - start:6.2f} s  {error}"
    size = "×".join(map(str, scan.shape))
    spacing = "×".join(f"{mm:.4g}" for mm in scan.spacing_mm)
    notes = " | ".join(scan.warnings) or "-"
    seconds = time.perf_counter() - start
    return f"ok    {seconds:6.2f} s  {path}  {size}  {spacing} mm  {scan.units}  {notes}"


def measure(name: str, path: Path) -> None:
    """Read and prepare in a process of its own, so that its peak is its own."""
    start = time.perf_counter()
    scan = read_scan(path)
    read = time.perf_counter() - start
    prepared = ""
    for preset in PRESETS:
        start = time.perf_counter()
        prepare(scan, PRESETS[preset])
        prepared += f", prepare {preset} {time.perf_counter() - start:.2f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    verdict = "ok" if peak < LIMIT_GB else f"MORE THAN {LIMIT_GB} GB"
    print(f"{name}: read {read:.1f} s{prepared}, peak {peak:.2f} GB, {verdict}")


def large(slices: int) -> None:
    """A torso-like CT as a DICOM series and as NIfTI."""
    from med3dvlm.scan import save_nifti

    generator = np.random.default_rng(0)
    array = np.empty((slices, 512, 512), np.float32)
    plane = generator.integers(-1024, 1500, (512, 512)).astype(np.float32)
    for z in range(slices):
        array[z] = np.roll(plane, z, axis=1)
    affine = np.diag([0.8, 0.8, 1.0, 1.0])
    scan = Scan(array, (1.0, 0.8, 0.8), affine, modality="CT", units="HU")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        series, nifti = Path(folder, "series"), Path(folder, "scan.nii")
        save_dicom_series(scan, series)
        save_nifti(scan, nifti)
        del array, scan
        for name, path in (("DICOM series", series), ("NIfTI", nifti)):
            process = spawn.Process(target=measure, args=(f"{name}, 512×512×{slices}", path))
            process.start()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--large", type=int, metavar="SLICES")
    arguments = parser.parse_args()
    if arguments.large:
        large(arguments.large)
    for path in candidates(arguments.path) if arguments.path else ():
        print(line(path))


if __name__ == "__main__":
    main()
