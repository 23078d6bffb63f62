"""What is written: whole or not at all, through symlinks, and into devices and FIFOs without replacing them."""

import os
import stat
import threading

import pytest

pytest.importorskip("typer")

from fastattn.train.errors import OutputError
from fastattn.train.output_files import check_output_directory, check_outputs, create_file, write_file, write_text


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def hidden(directory):
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


def test_a_file_is_made_with_the_usual_mode_and_keeps_its_own(tmp_path):
    path, usual = tmp_path / "a", tmp_path / "usual"
    usual.write_text("")
    write_text(path, "one")
    assert path.read_text() == "one" and mode_of(path) == mode_of(usual)
    path.chmod(0o640)
    before = path.stat()
    write_text(path, "two")
    after = path.stat()
    assert path.read_text() == "two" and mode_of(path) == 0o640
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino  # in one step: who reads the old one reads it whole


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    os.chown(path, 12345, 23456)
    write_text(path, "two")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def test_symlinks_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to(target)
    second.symlink_to("link")
    for text in ("made where the link points", "and replaced there"):
        write_text(second, text)
        assert target.read_text() == text
        assert link.is_symlink() and second.is_symlink() and not target.is_symlink()
    assert not hidden(tmp_path) and not hidden(tmp_path / "far")


def test_a_fifo_takes_the_content_and_stays(tmp_path):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        received = []
        reader = threading.Thread(target=lambda received=received: received.append(fifo.read_bytes()))
        reader.start()
        write_text(path, "through")
        reader.join()
        assert received == [b"through"]
        assert stat.S_ISFIFO(fifo.stat().st_mode) and link.is_symlink()


def test_a_device_takes_the_content_and_stays(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is
        null.write_text("")
    except PermissionError:
        pytest.skip("only root makes devices, and not everywhere")
    write_text(null, "lost")
    assert stat.S_ISCHR(null.stat().st_mode)


def test_an_open_file_under_proc_is_written_not_replaced(tmp_path):
    """As /dev/stdout, where the shell sent it into a file."""
    path = tmp_path / "a"
    with open(path, "w") as file:
        write_text(f"/proc/self/fd/{file.fileno()}", "here")
        assert path.read_text() == "here"
        assert os.fstat(file.fileno()).st_ino == path.stat().st_ino


def test_what_fails_leaves_the_old_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(path, fail)
    assert path.read_text() == "old" and not hidden(tmp_path)


def test_a_file_that_cannot_be_replaced_is_written(tmp_path, monkeypatch):
    """A file mounted by itself, as containers do."""
    path = tmp_path / "a"
    path.write_text("old and longer")

    def refuse(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)
    write_text(path, "new")
    assert path.read_text() == "new" and not hidden(tmp_path)


def test_bad_places_are_named(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("about")
    (tmp_path / "about").symlink_to("round")
    for name, message in {
        "directory": "is a directory",
        "absent/a": r"the directory .*absent does not exist",
        "file/a": "cannot be written: Not a directory",
        "round": "cannot be written: Too many levels of symbolic links",
        "a" * 300: "cannot be written: File name too long",
    }.items():
        path = tmp_path / name
        with pytest.raises(OutputError, match=message):
            write_text(path, "text")
        with pytest.raises(OutputError, match=f"^--html .*{message}") as error:
            check_outputs({"--png": None, "--html": path})
        assert str(path) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["about", "directory", "file", "round"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_what_may_not_be_written_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_text("")
    path.chmod(0o444)
    with pytest.raises(OutputError, match="--png .*may not be written"):
        check_outputs({"--png": path})
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="--png .*nothing may be written into the directory"):
        check_outputs({"--png": tmp_path / "b"})


def test_a_file_is_written_for_one_purpose(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to("a")
    with pytest.raises(OutputError, match="--png .*link: this file is written for --html already"):
        check_outputs({"--html": path, "--png": link})
    with pytest.raises(OutputError, match="--html .*a: this file is read"):
        check_outputs({"--html": path}, inputs=[link])


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    check_output_directory(tmp_path / "new" / "er", "--pictures")
    assert not (tmp_path / "new").exists()
    for name in ("file", "file/below"):
        with pytest.raises(OutputError, match=f"--pictures .*{name}: .*file is not a directory"):
            check_output_directory(tmp_path / name, "--pictures")


def test_a_new_file_is_made_once(tmp_path, monkeypatch):
    create_file(tmp_path / "a", "first")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a", "second")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # a file system without hard links
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a", "third")
    assert (tmp_path / "a").read_text() == "first"
    create_file(tmp_path / "b", "new")
    assert (tmp_path / "b").read_text() == "new" and not hidden(tmp_path)
