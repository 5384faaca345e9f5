"""What a person sees of a run in Prefect's UI, in a real browser: checked to be there, and kept as pictures."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

from deployments.browser import Browser
from deployments.processes import Services, until

WIDTH = 1280
DONE = (33, 157, 75)  # the green in which the graph draws what is completed
SIDE, BELOW_GRAPH = 256, 510  # where the menu ends, and the graph
# the first button on the graph shows all of it
CENTRE = """(canvas => canvas && [...document.querySelectorAll('button')].find(b => canvas.compareDocumentPosition(b) & 4))
    (document.querySelector('canvas'))"""
KINDS = ("results", "solutions", "evaluation", "groups", "frontier", "report", "plan")


class Eyes:
    """A browser on the UI of a server."""

    def __init__(self, browser: Browser, ui: str):
        self.browser, self.ui = browser, ui

    def look(self, path: str, *texts: str) -> None:
        """Open a page and wait until it shows all of the texts. Raises TimeoutError that names those missing."""
        self.browser.open(f"{self.ui}/v2/{path}", WIDTH)
        self.wait(*texts)

    def wait(self, *texts: str) -> None:
        """Wait until the page shows all of the texts."""
        missing = list(texts)

        def there() -> bool:
            shown = str(self.browser.run("document.body.innerText"))
            missing[:] = [t for t in texts if t not in shown]
            return not missing

        try:
            until("the page", there, 60)
        except TimeoutError:
            raise TimeoutError(
                f"{self.browser.run('location.href')} does not show {missing}"
            ) from None

    def press(self, what: str) -> None:
        """Press what a JavaScript expression finds, in the middle, as a mouse does."""
        find = f"""(() => {{
            const found = {what};
            if (!found) return null;
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = until(
            f"{what} on {self.browser.run('location.href')}", lambda: self.browser.run(find), 30
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.browser.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    def tab(self, name: str) -> None:
        """Go to the tab of this name."""
        self.press(
            f"[...document.querySelectorAll('[role=tab]')].find(e => e.innerText.trim() === {json.dumps(name)})"
        )

    def graph(self, size: int) -> None:
        """Wait until the graph, which is drawn and not text, shows bars of completed tasks of `size` pixels together."""
        self.press(CENTRE)  # it follows the time that goes on
        with tempfile.NamedTemporaryFile(suffix=".png") as file:

            def drawn() -> bool:
                self.browser.picture(Path(file.name), (SIDE, 0, WIDTH - SIDE, 500))
                pixels = imread(io.BytesIO(Path(file.name).read_bytes()))[..., :3] * 255
                green = np.abs(pixels - DONE).max(axis=-1) < 4
                green[np.count_nonzero(green, axis=1) > 250] = (
                    False  # the line of the whole run at the bottom
                )
                return int(green.sum()) > size

            until("the graph of tasks", drawn, 60, 2.0)


def take(services: Services, run: dict[str, Any], folder: Path) -> list[Path]:
    """Look at a calibration that has ended, and at the deployments' form; returns the pictures, PNG.

    Raises TimeoutError where the UI does not show the run, its graph, its cached tasks or its artifacts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    artifacts = services.post("artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    ids = {a["key"]: a["id"] for a in artifacts if a["key"]}
    deployment = services.get("deployments/name/calibrate/calibrate")["id"]
    # the browser's children write on for a moment after it has ended
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(Path(profile))
        eyes = Eyes(browser, services.api.removesuffix("/api"))

        def keep(name: str, height: int, left: int = 0, top: int = 0) -> None:
            paths.append(folder / f"ui-{name}.png")
            browser.picture(paths[-1], (left, top, WIDTH - left, height))

        try:
            eyes.look(
                f"runs/flow-run/{run['id']}",
                run["name"],
                "Completed",
                "partition: 1 of 1 tasks cached",
            )
            eyes.graph(200)
            keep("run", 1000)
            eyes.tab("Task Runs")
            eyes.press(
                "[...document.querySelectorAll('button')].find(e => e.innerText.trim() === 'Newest to oldest')"
            )
            eyes.press(
                "[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim() === 'Oldest to newest')"
            )
            eyes.wait(f"partition {run['name']}", "Cached")
            keep("tasks", 1000, SIDE, BELOW_GRAPH)
            eyes.tab("Artifacts")
            eyes.wait(*KINDS)
            keep("artifacts", 1100, SIDE, BELOW_GRAPH)
            eyes.look(
                f"artifacts/artifact/{ids['results']}",
                "predicted_loss_mse",
                "ip_et",
                "Predicted and measured",
                run["name"],
            )
            keep("results", 620, SIDE)
            eyes.look(f"artifacts/artifact/{ids['frontier']}", "Frontier: ", run["name"])
            until(
                "the picture",
                lambda: browser.run(
                    "[...document.images].some(i => i.src.startsWith('data:') && i.naturalWidth > 300)"
                ),
                30,
            )
            keep("frontier", 620, SIDE)
            eyes.look(
                f"deployments/deployment/{deployment}/run",
                "Tokens per block",
                "on the normalised RMSE of the loss",
            )
            keep("form", 1000)
        finally:
            browser.close()
    return paths
