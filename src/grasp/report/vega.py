"""The one door to vl-convert: charts drawn without a browser, and the JavaScript that makes them
interactive offline.

The script (Vega, Vega-Lite and vega-embed in one text of 0.9 MB) takes seconds to put together and
is the same every time, so it is kept in the user's cache directory. The first time, a child process
makes it while the charts are drawn here.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vl_convert

from grasp.core.writing import whole_file
from grasp.errors import CheckpointError
from grasp.report.look import by_variable

logger = logging.getLogger(__name__)

SNIPPET = "window.vegaEmbed = vegaEmbed;"
CHILD = (
    "import sys, vl_convert;"
    " sys.stdout.buffer.write(vl_convert.javascript_bundle(sys.argv[1]).encode())"
)


def cache_directory() -> Path:
    """Where grasp keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grasp"


class Runtime:
    """The script of the page: `Runtime()` starts making it where it is not kept yet, `text()` waits
    for it.
    """

    def __init__(self, cache: Path | None = None):
        self.path = (
            cache or cache_directory()
        ) / f"vega-embed-vl-convert-{version('vl-convert-python')}.js"
        self.child: subprocess.Popen[bytes] | None = None
        if not self.path.is_file():
            # PYTHONSAFEPATH: the child must not import what lies in the current directory
            environment = {**os.environ, "PYTHONSAFEPATH": "1"}
            command = [sys.executable, "-c", CHILD, SNIPPET]
            self.child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )

    def text(self) -> str:
        """The script."""
        if self.child is None:
            return self.path.read_text(encoding="utf-8")
        child, self.child = self.child, None
        made = child.communicate()[0].decode("utf-8")
        script = made if child.returncode == 0 and made else vl_convert.javascript_bundle(SNIPPET)
        self._keep(script)
        return script

    def stop(self) -> None:
        """End the child where its script is not wanted any more."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def _keep(self, script: str) -> None:
        """Write the cached copy whole or not at all; without it the next report takes longer."""
        try:
            with whole_file(self.path) as scratch:
                scratch.write_text(script, encoding="utf-8")
        except CheckpointError as failure:
            logger.info("not kept: %s", failure)


def draw(spec: dict[str, Any], config: dict[str, Any], name: str, described: str) -> str:
    """A chart as inline SVG that follows the page's colours. `name` keeps its ids apart from those
    of other charts on the page.
    """
    svg = str(vl_convert.vegalite_to_svg(spec, config=config))
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    head, rest = svg.split(">", 1)
    words = described.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return by_variable(
        f'{head} role="img" aria-labelledby="{name}-title"><title'
        f' id="{name}-title">{words}</title>{rest}'
    )
