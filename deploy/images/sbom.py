"""Install what an image installs into a plain directory, say how large that is, and list it as a CycloneDX SBOM.

    make sbom IMAGE=router        # -> build/images/router/ and build/images/router.cdx.json

The commands are those of the image's Dockerfile, so this is also what there is of a build where no container engine is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from deploy.images.requirements import LEFT_OUT, ROOT, requirements

BUILT = ROOT / "build" / "images"


def install(image: str, folder: Path) -> int:
    """A virtual environment like the image's /opt/penumbra. -> its size in bytes.

    pip's own words say how far it is. Raises CalledProcessError when a package can not be installed.
    """
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder), "install"]
    pip += ["--progress-bar", "off"]
    wanted = requirements(image)
    # torch first: in an empty environment others pull its CUDA build.
    for part in ([one for one in wanted if one.startswith("torch")], wanted):
        if part:
            subprocess.run([*pip, "--no-compile", *part], check=True)
    environment = os.environ | {"PENUMBRA_MARCH": "x86-64-v3"}
    subprocess.run([*pip, "--no-compile", "--no-deps", str(ROOT)], check=True, env=environment)
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def write_sbom(folder: Path, out: Path) -> None:
    """CycloneDX JSON of everything installed in `folder`, the same bytes for the same packages."""
    subprocess.run(
        [
            *(sys.executable, "-m", "cyclonedx_py", "environment", str(folder / "bin" / "python")),
            *("--output-reproducible", "--of", "JSON", "-o", str(out)),
        ],
        check=True,
    )


def main(image: str) -> None:
    folder, out = BUILT / image, BUILT / f"{image}.cdx.json"
    size = install(image, folder)
    write_sbom(folder, out)
    print(f"{image}: {size / 1e6:.0f} MB in {folder.relative_to(ROOT)}, listed in {out.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in LEFT_OUT):
        sys.exit(f"usage: python -m deploy.images.sbom {' | '.join(LEFT_OUT)}")
    main(sys.argv[1])
