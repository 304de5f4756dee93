"""Runs a program with a checkout that every user can enter, even below a closed directory such as /root.

The service runs as a user of its own, which cannot enter a directory with mode 0700. In that case the demo and the
tests run in a mount namespace of their own, in which a directory with mode 0755 and the same contents replaces each
closed directory above the checkout. All paths stay the same, and the namespace ends with its last process.

`python -I -S enterable.py DIRECTORY... -- COMMAND...` is the program; it runs in a mount namespace already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

#: Directories that every system has. One is used as a temporary mount point, only in the own mount namespace.
_STAGES = ("/mnt", "/media", "/srv")


def closed_above(path: Path) -> list[str]:
    """Return the directories at and above `path` that not every user can enter, the outermost first."""
    return [str(one) for one in (*reversed(path.parents), path) if not one.stat().st_mode & 0o001]


def closed_directories() -> list[str]:
    """Return the closed directories above the checkout and its virtual environment."""
    closed = closed_above(CHECKOUT)
    return closed + [one for one in closed_above(Path(sys.prefix)) if one not in closed]


def run_where_enterable() -> None:
    """As root, run this process again in such a namespace, if the service's user cannot enter the checkout."""
    if os.geteuid() == 0 and (closed := closed_directories()):
        sys.stdout.flush()
        words = ["unshare", "--mount", sys.executable, "-I", "-S", __file__, *closed, "--", *sys.orig_argv]
        os.execvp(words[0], words)


def open_up(directory: str) -> None:
    """Replace a directory by one with mode 0755, with bind mounts of all its entries."""
    stage = next(one for one in _STAGES if not f"{directory}/".startswith(f"{one}/"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", stage], check=True)
    for entry in os.scandir(directory):
        place = f"{stage}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), place)
            continue
        if entry.is_dir():
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        subprocess.run(["mount", "--rbind", entry.path, place], check=True)
    subprocess.run(["mount", "--move", stage, directory], check=True)


def main() -> None:
    """See the module's docstring."""
    here = os.getcwd()
    end = sys.argv.index("--")
    for directory in sys.argv[1:end]:
        open_up(directory)
    # By its path: the working directory is still the covered one.
    os.chdir(here)
    os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])


if __name__ == "__main__":
    main()
