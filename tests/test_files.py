"""What support/files.py promises, one statement of fact a test."""

import errno
from pathlib import Path

import pytest
from texts import content

from support.files import is_hidden, name_the_file, replace_folder, write_atomically


def test_an_error_of_the_system_names_the_file_even_where_a_library_hides_it():
    with pytest.raises(OSError, match="No space left on device: 'a.pt'"), name_the_file(Path("a.pt")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left on device: 'a.pt'"), name_the_file(Path("a.pt")):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 (as torch.save does it)
    with pytest.raises(RuntimeError, match="a mistake of the program"), name_the_file(Path("a.pt")):
        raise RuntimeError("a mistake of the program")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_whole_or_as_it_was(tmp_path, failure):
    def fail(file):
        file.write(b"half")
        raise failure

    path = tmp_path / "a"
    for before in ({}, {"a": b"whole"}):
        with pytest.raises(type(failure)):
            write_atomically(path, fail)
        assert content(tmp_path) == before
        write_atomically(path, lambda file: file.write(b"whole"))
        assert content(tmp_path) == {"a": b"whole"}


def test_a_folder_is_replaced_and_keeps_what_others_have_put_into_it(tmp_path):
    old, new = tmp_path / "x", tmp_path / "new"
    for folder, text in ((old, b"old"), (new, b"new")):
        folder.mkdir()
        (folder / "ours").write_bytes(text)
    (old / "theirs").write_bytes(b"theirs")
    replace_folder(new, old, {"ours"})
    assert content(tmp_path) == {"x/ours": b"new", "x/theirs": b"theirs"}
    for i in (1, 2):  # where there are two versions both are kept
        new.mkdir()
        (new / "theirs").write_bytes(b"theirs %d" % i)
        replace_folder(new, old, {"ours"})
    kept = {"x/theirs": b"theirs 2", "x/theirs.old": b"theirs 1", "x/theirs.old.old": b"theirs"}
    assert sorted(content(tmp_path)) == sorted(kept) and sorted(content(tmp_path).values()) == sorted(kept.values())


def test_names_that_file_managers_hide():
    for name in (".DS_Store", "._a.txt", "a/.b/c", "__MACOSX/a.txt", "Thumbs.db", "desktop.ini", "x/desktop.ini"):
        assert is_hidden(name)
    for name in ("a.txt", "a/b.c/d", "thumbs.txt", "my__MACOSX"):
        assert not is_hidden(name)
