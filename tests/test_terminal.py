"""What stands on a terminal in the end: wrapped lines, and one whole line after Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

import lab  # noqa: F401  (imports once what each fork needs)
import pytest
from conftest import write_checkpoint

from vit_dist import console


class Screen:
    """What a terminal of `width` columns shows: as much of it as these programs use."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part == "\x1b[A":
                self.row = max(0, self.row - 1)
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif not part.startswith("\x1b"):
                if self.column == self.width:
                    self._down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def _train(argv: list[str]) -> None:
    """In a fork, on its terminal."""
    code = 70
    try:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False))
        from vit_dist import train

        code = train.main(argv)
    finally:
        os._exit(code)


def read(descriptor: int) -> str:
    try:
        return os.read(descriptor, 1 << 16).decode()
    except OSError:  # the other side is gone
        return ""


@pytest.mark.parametrize("width", [80, 120])
def test_ctrl_c_clears_the_bar_and_leaves_one_whole_line(tmp_path: Path, photos: Path, width: int) -> None:
    model = write_checkpoint(tmp_path / "model")
    argv = ["--data", photos, "--model", model, "--output_dir", tmp_path / "run", "--max_steps", 100_000]
    argv += ["--logging_steps", 1, "--report_to", "none", "--eval_strategy", "no", "--dataloader_num_workers", 0]
    pid, terminal = pty.fork()
    if pid == 0:
        _train(list(map(str, argv)))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    shown, deadline = "", time.monotonic() + 240
    while not re.search(r"\b[5-9]/100000", shown) and time.monotonic() < deadline:
        shown += read(terminal)
    os.write(terminal, b"\x03")
    while more := read(terminal):
        shown += more
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, shown
    screen = Screen(width)
    screen.feed(shown)
    lines = [line.rstrip() for line in screen.lines if line.strip()]
    said = " ".join(" ".join(lines[-2:]).split())
    assert re.search(r"stopped at step \d+ \(SIGINT on rank 0\): checkpoint-\d+ is committed; the same command", said)
    assert "goes on" in lines[-1] and not [line for line in lines if "%|" in line or "^C" in line], lines[-6:]
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line.startswith("data     ")], "the plan is there"


def test_lines_are_wrapped_at_words_on_a_terminal_only(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    line = "data     " + " ".join(["word"] * 20)
    with os.fdopen(slave, "w") as terminal:
        first, second = console.wrapped(line, terminal).splitlines()
        assert len(first) <= 60 and second.startswith("         word")
        assert " ".join(f"{first} {second}".split()) == " ".join(line.split())
        row = "name      " * 3 + "x" * 50
        assert console.wrapped(row, terminal) == row, "a row of a table"
        assert console.wrapped("/" + "x" * 100, terminal) == "/" + "x" * 100, "a long path is not broken"
    os.close(master)
    with (tmp_path / "log").open("w") as file:
        assert console.wrapped(line, file) == line
