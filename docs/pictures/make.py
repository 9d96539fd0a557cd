"""Makes the pictures of the documentation from real runs:  python docs/pictures/make.py [FOLDER]

FOLDER keeps the runs, and what is there isn't trained again. Needs Chromium and real images (RAYCIFAR_DATA).
"""

import io
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbclient
import nbformat
from PIL import Image
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME, TerminalTheme

PICTURES = Path(__file__).parent
sys.path.insert(0, str(PICTURES.parents[1] / "tests"))

from browser import Browser  # noqa: E402

MAX_BYTES = 200_000
COLUMNS = 128
# The reports that are shown.
PAGES = {"report": "results/first", "dead": "study/dead", "black": "study/black", "comparison": "results/both"}

# The README's commands. What each of them writes is kept in FOLDER, for the README to quote.
TRAIN = "train --model cnn --limit 5000 --val-size 2000 --epochs 30"
COMMANDS = {
    "first": f"{TRAIN} --augment none --workers 0 --name first",
    "report": "report results/first",
    "second": f"{TRAIN} --workers 0 --name second",
    "both": "compare results/first results/second --name both",
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "pictures-runs").resolve()
    folder.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        said = folder / f"{name}.txt"
        if not said.exists():
            said.write_text(raycifar(command, folder))
    run_study(folder)
    for name, theme in (("light", DEFAULT_TERMINAL_THEME), ("dark", SVG_EXPORT_THEME)):
        draw_terminal((folder / "first.txt").read_text(), folder, theme, PICTURES / f"terminal-{name}.svg")
        for picture, run in PAGES.items():
            photograph(folder / run / "report.html", PICTURES / f"{picture}-{name}.png")
        photograph_tensorboard(folder / "results", PICTURES / f"tensorboard-{name}.png")


def raycifar(command: str, folder: Path) -> str:
    """Run a command of raycifar in a folder, and return what it writes."""
    print(f"$ raycifar {command}", flush=True)
    line = [sys.executable, "-m", "raycifar", *shlex.split(command)]
    return subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def run_study(folder: Path) -> None:
    """Train the study's two networks that score 0.01, by those cells of its notebook that do so."""
    notebook = nbformat.read(PICTURES.parent / "study.ipynb", 4)
    notebook["cells"] = [cell for cell in notebook["cells"] if "picture" in cell["metadata"].get("tags", ())]
    print("Executing study.ipynb", flush=True)
    nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(folder)}}).execute()


def draw_terminal(text: str, folder: Path, theme: TerminalTheme, picture: Path) -> None:
    """Draw what the first run wrote, without the lines on steps of slow machines, and without this machine's paths."""
    for path, name in ((os.environ.get("RAYCIFAR_DATA"), "cifar100"), (f"{folder}/", "")):
        text = text.replace(path, name) if path else text
    lines = [line for line in text.splitlines() if ", step " not in line and not line.endswith(" …")]
    epochs = [line for line in lines if line.startswith("epoch ")]
    hidden = set(epochs[3:-3])
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    console.print(f"$ raycifar {COMMANDS['first']}")
    for line in lines:
        if line not in hidden:
            console.print(line)
        elif line == epochs[3]:
            console.print("…")
    svg = console.export_svg(title="raycifar train", theme=theme)
    faces = svg.split("@font-face")  # a forge loads no fonts: the reader's own will do
    picture.write_text(faces[0] + faces[-1].partition("}")[2])


def photograph(page: Path, picture: Path) -> None:
    """Take a picture of a report, down to its first two charts."""
    with Browser() as browser:
        browser.open(page, 1040, dark="dark" in picture.stem)
        charts = "[...document.querySelectorAll('.columns section')].slice(0, 2)"
        bottom = browser.evaluate(f"Math.max(...{charts}.map(chart => chart.getBoundingClientRect().bottom))")
        browser.whole(picture, most=round(bottom) + 16)
    shrink(picture)


def photograph_tensorboard(runs: Path, picture: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name, "--port", str(port)]
    with subprocess.Popen(command, cwd=runs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}/"
            deadline = time.monotonic() + 60
            while True:
                try:
                    urlopen(f"{url}data/runs", timeout=5)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
            time.sleep(10)  # for it to read the runs
            dark = "dark" in picture.stem
            options = "_smoothingWeight=0&tagFilter=loss%7Ctop-1"
            with Browser() as browser:
                browser.open(f"{url}data/runs")
                browser.evaluate("localStorage.setItem('_ignoreYOutliers', 'false')")  # or it cuts curves off
                browser.open(f"{url}?darkMode={str(dark).lower()}#scalars&{options}", 1440, dark=dark)
                browser.evaluate("new Promise(drawn => setTimeout(drawn, 10_000))")
                browser.whole(picture, most=746)
        finally:
            server.terminate()
    shrink(picture)


def shrink(picture: Path) -> None:
    """Save a picture with as many colors as fit into 200 kB."""
    image = Image.open(picture).convert("RGB")
    for colors in (256, 128, 64, 32):
        image.quantize(colors, dither=Image.Dither.NONE).save(picture, optimize=True)
        if picture.stat().st_size < MAX_BYTES:
            return
    raise SystemExit(f"{picture} is too large.")


if __name__ == "__main__":
    main()
