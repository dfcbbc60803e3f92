"""Files of the store: whole or not there, and never believed without a check."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_int8kv.store import files, index
from vllm_int8kv.store.files import BadFile, Header, MissingFile
from vllm_int8kv.store.index import Evictor, Index
from vllm_int8kv.store.namespace import block_hash, folder_fingerprint, model_identity

HEADER = Header("n" * 32, "ab12", "exact", 300)
PAYLOAD = bytes(range(256)) + b"x" * 44


@pytest.fixture
def written(tmp_path) -> Path:
    files.write(tmp_path, HEADER, [PAYLOAD[:100], memoryview(PAYLOAD)[100:]])
    return files.path_of(tmp_path, HEADER.namespace, HEADER.block)


def test_what_was_written_is_read(written, tmp_path):
    assert written == tmp_path / HEADER.namespace / "ab" / "ab12.kv"
    header, payload = files.read(written, HEADER)
    assert header == HEADER and bytes(payload) == PAYLOAD
    assert [path.name for path in written.parent.iterdir()] == ["ab12.kv"]


def test_every_changed_byte_is_noticed(written):
    data = written.read_bytes()
    for place in range(len(data)):
        written.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BadFile):
            files.read(written, HEADER)


def test_every_cut_is_noticed(written):
    data = written.read_bytes()
    for length in range(len(data)):
        written.write_bytes(data[:length])
        with pytest.raises(BadFile):
            files.read(written, HEADER)
    written.write_bytes(data + b"\0")
    with pytest.raises(BadFile, match=rf"it has {len(data) + 1} bytes, expected {len(data)}"):
        files.read(written, HEADER)


@pytest.mark.parametrize("name", ["namespace", "block", "codec"])
def test_the_file_of_something_else_is_noticed(written, name):
    with pytest.raises(BadFile, match=rf"its {name} is {getattr(HEADER, name)}, expected other"):
        files.read(written, replace(HEADER, **{name: "other"}))


def test_words_for_what_is_no_file(written, tmp_path):
    with pytest.raises(MissingFile, match="it is gone"):
        files.read(tmp_path / "missing.kv", HEADER)
    data = written.read_bytes()
    written.write_bytes(b"something else that is long enough")
    with pytest.raises(BadFile, match="it is no file of the store"):
        files.read(written)
    written.write_bytes(data[:7] + b"\x02" + data[8:])
    with pytest.raises(BadFile, match="its version is 2, expected 1"):
        files.read(written)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path, HEADER, [PAYLOAD])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_block_must_be_there_for_every_rank(tmp_path):
    found = Index(tmp_path, ["rank0", "rank1"])
    files.write(tmp_path, replace(HEADER, namespace="rank0"), [PAYLOAD])
    assert not found.has("ab12")
    files.write(tmp_path, replace(HEADER, namespace="rank1"), [PAYLOAD])
    assert not found.has("ab12")  # it was not there a moment ago
    assert Index(tmp_path, ["rank0", "rank1"]).has("ab12")


def test_what_was_absent_is_asked_for_again_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MISS_SECONDS", 0.05)
    found = Index(tmp_path, [HEADER.namespace])
    assert not found.has("ab12")
    files.write(tmp_path, HEADER, [PAYLOAD])
    time.sleep(0.06)
    assert found.has("ab12")
    found.forget("ab12", 60)
    assert not found.has("ab12")
    found.add("ab12")
    assert found.has("ab12")


def write_blocks(root: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        files.write(root, replace(HEADER, block=f"{number:04x}"), [PAYLOAD])
        paths.append(files.path_of(root, HEADER.namespace, f"{number:04x}"))
    return paths


def test_what_was_used_longest_ago_goes_first(tmp_path):
    paths = write_blocks(tmp_path, 10)
    size = paths[0].stat().st_size
    for number, path in enumerate(paths):
        os.utime(path, (1000 + number, 1000 + number))
    index.touch(paths[:2], range(2))
    removed, num_bytes = index.collect(tmp_path, 5 * size)
    left = {path.name for path in tmp_path.rglob("*.kv")}
    assert (removed, num_bytes) == (6, 4 * size)  # down to nine tenths
    assert left == {path.name for path in (*paths[:2], *paths[8:])}


def test_the_end_of_a_prefix_goes_before_its_beginning(tmp_path):
    paths = write_blocks(tmp_path, 4)
    index.touch(paths, range(len(paths)))
    used = [path.stat().st_mtime for path in paths]
    assert used == sorted(used, reverse=True) and used[0] - used[3] == pytest.approx(3e-3, abs=1e-4)


def test_an_engine_that_restarts_knows_how_full_the_folder_is(tmp_path):
    size = write_blocks(tmp_path, 6)[0].stat().st_size
    evictor = Evictor(tmp_path, 5 * size)
    assert evictor.wrote(size) == 2  # 4 are left
    assert evictor.wrote(0) == 0
    assert Evictor(tmp_path, None).wrote(size) == 0


def test_what_other_engines_write_counts(tmp_path):
    size = write_blocks(tmp_path, 1)[0].stat().st_size
    evictor = Evictor(tmp_path, 10 * size)
    assert evictor.wrote(size) == 0
    write_blocks(tmp_path, 12)  # by others
    assert evictor.wrote(size) > 0


def test_a_folder_that_does_not_answer_is_a_miss(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert not Index(tmp_path, [HEADER.namespace]).has("ab12")


def test_a_model_without_weights_is_told_apart_from_no_other(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="there are no weights in"):
        folder_fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"KVStoreConnector cannot tell the weights of .* from others: there are no"):
        model_identity(str(tmp_path), None, "auto", 0)


def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path):
    (path,) = write_blocks(tmp_path, 1)
    old, new = (path.with_name(f".{name}.1.2{files.TEMPORARY_SUFFIX}") for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    assert index.collect(tmp_path, 1 << 20)[0] == 1
    assert not old.exists() and new.exists() and path.exists()


def test_hashes_of_blocks_depend_on_all_that_matters():
    one = block_hash("", [1, 2, 3], None)
    others = [
        block_hash("", [1, 2, 4], None),
        block_hash(one, [1, 2, 3], None),
        block_hash("", [1, 2, 3], (("cache_salt", "a"),)),
        block_hash("", [1, 2, 3], (("lora", "name", "/path"),)),
        block_hash("", [258, 3, 0], None),
    ]
    assert len({one, *others}) == 6 and one == block_hash("", [1, 2, 3], None)


def test_checkpoints_are_told_apart_by_their_bytes(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    a, b = (tmp_path / name for name in ("a", "b"))
    assert folder_fingerprint(a) == folder_fingerprint(b)
    data = bytearray(bytes(1 << 20))
    data[::997] = b"\1" * len(data[::997])  # as training changes weights all over
    (b / "model.safetensors").write_bytes(data)
    assert folder_fingerprint(a) != folder_fingerprint(b)
