"""Objects at a place: whole or not there, with the place's own time of their last use."""

import contextlib
import os
import secrets
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.serve.objects import ChangedError, objects_at
from tests.tiny import refused


class NoSinglePut(MemoryFileSystem):
    """A file system of those whose puts can be seen half done; where one breaks off is a class."""

    protocol = "halves"
    broken = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        half = value[: len(value) // 2] if self.broken else value
        super().pipe_file(path, half, mode=mode, **kwargs)
        if self.broken:
            raise RuntimeError("the connection was lost")  # of its own kind, as libraries have them


@pytest.fixture(scope="module", autouse=True)
def _register():
    fsspec.register_implementation("halves", NoSinglePut, clobber=True)


@pytest.fixture(params=["folder", "memory", "halves"])
def place(request, tmp_path):
    return tmp_path if request.param == "folder" else f"{request.param}:/{tmp_path}"


def put(objects, name, data=b"data"):
    return objects.write(name, lambda path: path.write_bytes(data))


def get(objects, name):
    return objects.read(name, lambda path: path.read_bytes())


def test_what_is_put_is_there(place):
    objects = objects_at(place)
    assert put(objects, "a", b"12345") == 5
    assert get(objects, "a") == get(objects_at(place), "a") == b"12345"
    with objects.open("a") as file:
        assert file.read(2) == b"12"
    assert [(one.name, one.nbytes) for one in objects.all()] == [("a", 5)]
    assert objects.find("a") == next(objects.all())
    assert objects.touch("a")
    objects.remove("a")
    objects.remove("a")
    assert list(objects.all()) == []
    assert objects.find("a") is None
    assert not objects.touch("a")
    with pytest.raises(FileNotFoundError):
        get(objects, "a")


def test_a_use_is_seen_by_others(place):
    objects, others = objects_at(place), objects_at(place)
    put(objects, "a")
    time.sleep(0.02)
    put(objects, "b")
    used = {one.name: one.used for one in others.all()}
    assert used["a"] < used["b"]
    time.sleep(0.02)
    objects.touch("a")
    used = {one.name: one.used for one in others.all()}
    assert used["a"] > used["b"]
    assert others.find("a").used == used["a"]
    assert len(used) == 2


def test_what_all_share_is_drawn_once(place):
    """However many servers draw at the same time."""
    objects = [objects_at(place) for _ in range(8)]
    start, drawn = threading.Barrier(8), []

    def draw(one):
        start.wait()
        drawn.append(one.create("secret", secrets.token_bytes(8)))

    threads = [threading.Thread(target=draw, args=(one,)) for one in objects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 1
    assert objects_at(place).create("secret", b"other") == drawn[0]
    assert objects[0].exists("secret")
    assert not objects[0].exists("other")
    assert list(objects[0].all()) == []


def test_a_broken_put_leaves_nothing(tmp_path, monkeypatch):
    objects = objects_at(f"halves:/{tmp_path}")
    put(objects, "a")
    monkeypatch.setattr(NoSinglePut, "broken", True)
    with pytest.raises(OSError, match="the connection was lost"):
        put(objects, "b")
    monkeypatch.undo()
    assert [one.name for one in objects.all()] == ["a"]
    assert not any("part" in path for path in fsspec.filesystem("halves").find(str(tmp_path)))


def test_marks_of_what_is_gone_are_removed(tmp_path):
    objects, files = objects_at(f"memory:/{tmp_path}"), fsspec.filesystem("memory")
    put(objects, "a")
    objects.touch("a")
    for name in ("old", "new"):
        files.pipe_file(f"{tmp_path}/used/{name}", b"")
    old = files.store[f"{tmp_path}/used/old"]
    old.created = old.created.replace(year=2020)
    assert [one.name for one in objects.all()] == ["a"]
    left = {path.rpartition("/")[2] for path in files.find(f"{tmp_path}/used")}
    assert left == {"a", "new"}  # of which another server may have removed the object just now


def test_a_folder_is_told_from_a_url(tmp_path):
    put(objects_at(f"file://{tmp_path}/one"), "a")
    assert get(objects_at(str(tmp_path / "one")), "a") == b"data"
    with refused("nonsense://x"):
        objects_at("nonsense://x")


def test_a_library_that_is_missing_is_named_with_what_brings_it(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with refused("s3://bucket: Install s3fs to access S3; pip install 'cometlm[s3]'"):
        objects_at("s3://bucket")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_is_read_only_can_be_read(tmp_path):
    objects = objects_at(tmp_path)
    put(objects, "a")
    with contextlib.ExitStack() as stack:
        stack.callback(tmp_path.chmod, 0o700)
        tmp_path.chmod(0o500)
        assert objects.touch("a")
        assert get(objects, "a") == b"data"
        with pytest.raises(PermissionError):
            objects.remove("a")


def test_changes_of_several_servers(tmp_path):
    """None of them is lost, though each reads, waits and writes."""
    put(objects_at(tmp_path), "count", b"0")

    def count(times):
        objects = objects_at(tmp_path)
        for _ in range(times):
            with objects.changing("count") as version:
                now = int(get(objects, "count"))
                time.sleep(0.001)
                data = b"%d" % (now + 1)
                objects.write("count", lambda path, data=data: write_whole(path, data), version)

    threads = [threading.Thread(target=count, args=(15,)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert get(objects_at(tmp_path), "count") == b"60"
    assert [one.name for one in objects_at(tmp_path).all()] == ["count"]


def test_a_change_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("cometlm.serve.objects._PATIENCE", 0.05)
    one, two = objects_at(tmp_path), objects_at(tmp_path)
    with one.changing("a"), pytest.raises(ChangedError), two.changing("a"):
        pass
    with two.changing("a"):
        pass
