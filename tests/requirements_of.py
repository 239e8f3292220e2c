"""What an installed package requires here, less some: `python requirements_of.py PACKAGE
EXCEPT...`. Or, `--alias NAME VERSION`: metadata for a package that is installed under another name.
Used by `make test-serving`.
"""

import importlib.metadata
import sys
import sysconfig
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement


def main(first: str, *rest: str) -> None:
    if first == "--alias":
        name, version = rest
        folder = Path(sysconfig.get_path("purelib")) / f"{name}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        return
    for text in importlib.metadata.requires(first) or ():
        wanted = Requirement(text)
        if wanted.name not in rest and (
            wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        ):
            wanted.marker = None
            print(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
