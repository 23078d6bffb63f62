"""Runs every command of ``fastattn.needs.NEEDS`` with tiny settings and tells what it did and what it imported.

``python tests/command_needs.py FOLDER`` prints a line of JSON for each row. Each runs in a process of its own, forked
from this one, so that torch is imported once. ``make test-install`` runs it in environments that hold one extra each,
or none (tests/install_checks.py).
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import torch

from fastattn import cli, needs

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {name for commands in needs.NEEDS.values() for names in commands.values() for name in names}

TEXT_MODEL = "--embed-dim 16 --num-heads 2 --layers 1 --feedforward-dim 16 --steps 2 --batch-size 4"
DETECTOR = "--embed-dim 16 --num-heads 2 --encoder-layers 1 --decoder-layers 1 --feedforward-dim 16 --steps 1"
#: What follows a row's command; the rows in the order in which they need each other's results.
ARGUMENTS = {
    "fastattn train translate": f"--out translate --data pairs.tsv --max-length 20 {TEXT_MODEL}",
    "fastattn train classify": f"--out classify --data reviews.csv {TEXT_MODEL}",
    "fastattn train detect --data demo": f"--out demo {DETECTOR} --batch-size 2",
    "fastattn train detect": f"--out detect --data demo/scenes {DETECTOR} --batch-size 2",
    "fastattn predict translate": "--model translate word",
    "fastattn predict translate --attention-map": "map.png --model translate word",
    "fastattn predict classify": "--model classify word --html page.html",
    "fastattn predict classify --png": "words.png --model classify word",
    "fastattn predict detect": "--model detect demo/scenes/test/000000.png",
    "fastattn predict detect --pictures": "pictures --model detect demo/scenes/test/000000.png --threshold 0",
    "examples/translate_dates.py": "--out dates --pairs 60 --steps 1",
    "examples/classify_reviews.py": "--out reviews --reviews 40 --epochs 1 --encoder cnn",
    "examples/digits.py": "--epochs 1 --batch 512",
}


def watch_imports(imported: set[str]) -> None:
    """Collect the optional modules that this package's own code imports, leaving out what those import in turn."""
    real = builtins.__import__

    def watched(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        root = name.partition(".")[0]
        if level == 0 and root in OPTIONAL and importer in ("fastattn", "__main__"):
            imported.add(root)
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = watched


def run_row(row: str, folder: Path) -> dict:
    """Run a row's command in ``folder``: its exit status, what it printed, and the optional modules it imported."""
    from fastattn.train import scenes

    scenes.write_demonstration.__defaults__ = (4, 2)  # of thousands of scenes, a few
    os.chdir(folder)
    program, *arguments = f"{row} {ARGUMENTS[row]}".split()
    imported: set[str] = set()
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watch_imports(imported)
        try:
            if program == "fastattn":
                sys.argv = [program, *arguments]
                cli.main()
            else:
                sys.argv = [str(ROOT / program), *arguments]
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # as Python does it
                print(status, file=err)
                status = 1
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=err)
            status = 70
    told = {"row": row, "status": status or 0, "out": out.getvalue(), "err": err.getvalue()}
    return told | {"imported": sorted(imported)}


def in_a_fork(row: str, folder: Path) -> dict:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "w") as pipe:
            json.dump(run_row(row, folder), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    (folder / "pairs.tsv").write_text("".join(f"word {i}\tWort {i}\n" for i in range(12)))
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(40)))
    for row in ARGUMENTS:
        before = {path.name for path in folder.iterdir()}
        told = in_a_fork(row, folder)
        told["written"] = sorted({path.name for path in folder.iterdir()} - before)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
