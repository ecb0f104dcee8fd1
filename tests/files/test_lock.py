"""Locks never touch what s2d did not write."""

import os

import pytest

from s2dcli.errors import UsageError
from s2dcli.files.lock import lock_of, locked


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link", "file", "fifo", "folder"])
@pytest.mark.parametrize("output", ["folder", "file"])
def test_what_lies_under_the_name_of_a_lock_is_not_followed_nor_written_to(tmp_path, output, kind):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_text("precious")
    if output == "folder":
        out.mkdir()
    path = lock_of(out)
    if kind == "symbolic link":
        path.symlink_to(mine)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        path.hardlink_to(mine)
    elif kind == "file":
        path.write_text("precious")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    taken = r"out: .*lock, the name of its lock, is taken by what s2d did not write; move .* away"
    with pytest.raises(UsageError, match=taken), locked(out):
        pass
    assert mine.read_text() == "precious"
    assert os.path.lexists(path)
    assert not (tmp_path / "nothing").exists()
