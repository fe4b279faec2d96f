"""Safetensors files nobody should trust: verdicts against the safetensors package, and folders that lie."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.errors import CheckpointError
from tenfold.shards import DTYPE_BITS, INDEX_NAME, Problems, Stored, read_folder, read_shard, shown

FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def file(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` is a JSON value, or the text or bytes to put in its place."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data + payload


def one(payload: bytes = b"abcd", **changes: object) -> bytes:
    return file({"a": FLOAT | changes}, payload)


def two(first: list[int], second: list[int], payload: bytes) -> bytes:
    octets = {"dtype": "U8", "shape": [4]}
    return file({"a": octets | {"data_offsets": first}, "b": octets | {"data_offsets": second}}, payload)


def many(count: int) -> bytes:
    entry = {"dtype": "U8", "shape": [1]}
    return file({f"t{i}": entry | {"data_offsets": [i, i + 1]} for i in range(count)}, bytes(count))


# The set of reliability.md, row 40: 23 files safetensors rejects and 6 it accepts, with a plain one for measure.
MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "length 2^63": lambda: file({"a": FLOAT}, b"abcd", 2**63),
    "length past the end": lambda: file({"a": FLOAT}, b"abcd", 1000),
    "length 100 MB + 1": lambda: file({"a": FLOAT}, b"abcd", 100_000_001),
    "not JSON": lambda: file("{'a': 1}"),
    "not UTF-8": lambda: file(b'{"a\xff": 1}'),
    "a list": lambda: file([1]),
    "truncated": lambda: one(b"abc"),
    "trailing bytes": lambda: one(b"abcde"),
    "overlap": lambda: two([0, 4], [2, 6], bytes(6)),
    "hole": lambda: two([0, 4], [5, 9], bytes(9)),
    "end before start": lambda: one(data_offsets=[4, 0]),
    "negative offset": lambda: one(data_offsets=[-4, 0]),
    "product beyond 64 bits": lambda: one(b"", shape=[2**40, 2**40], data_offsets=[0, 0]),
    "size is not shape": lambda: one(shape=[2]),
    "unknown dtype": lambda: one(dtype="F33"),
    "negative shape": lambda: one(shape=[-1]),
    "float shape": lambda: one(shape=[1.0]),
    "field twice": lambda: file('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
    "metadata of numbers": lambda: file({"__metadata__": {"a": 1}}),
    "50,000 deep": lambda: file('{"a":' + "[" * 50_000 + "]" * 50_000 + "}"),
    "F4 of half bytes": lambda: one(b"ab", dtype="F4", shape=[3], data_offsets=[0, 2]),
    "empty tensor at another's offset": lambda: file(
        {"a": FLOAT, "b": FLOAT | {"shape": [0], "data_offsets": [4, 4]}}, b"abcd"
    ),
    "a path as name": lambda: file({"../../etc/passwd": FLOAT}, b"abcd"),
    "NUL in a name": lambda: file({"a\0b": FLOAT}, b"abcd"),
    "100,000 tensors": lambda: many(100_000),
    "NaN values": lambda: one(struct.pack("<f", float("nan"))),
    "e8m0 scales": lambda: one(dtype="F8_E8M0", shape=[4]),
    "plain": one,
}

# Beyond that set: what the grammar of JSON and of headers allows and does not.
ODD: dict[str, Callable[[], bytes]] = {
    "no header": lambda: struct.pack("<Q", 0),
    "no tensors": lambda: file("{}"),
    "bytes without tensors": lambda: file("{}", b"x"),
    "spaces around": lambda: file('\n {"a":' + json.dumps(FLOAT) + "} \t", b"abcd"),
    "NUL behind": lambda: file(json.dumps({"a": FLOAT}) + "\0", b"abcd"),
    "byte order mark": lambda: file(b"\xef\xbb\xbf{}"),
    "control character": lambda: file(b'{"a\x01":' + json.dumps(FLOAT).encode() + b"}", b"abcd"),
    "surrogate pair": lambda: file({"\U0001f600": FLOAT}, b"abcd"),
    "half a pair as name": lambda: file('{"\\ud800":' + json.dumps(FLOAT) + "}", b"abcd"),
    "half a pair in metadata": lambda: file('{"__metadata__":{"k":"\\udc00"}}'),
    "minus zero": lambda: file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', b"abcd"),
    "exponent": lambda: file('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', b"abcd"),
    "true as count": lambda: one(shape=[True]),
    "text as count": lambda: one(shape=["1"]),
    "three offsets": lambda: one(data_offsets=[0, 4, 4]),
    "one offset": lambda: one(data_offsets=[0]),
    "no shape": lambda: file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"abcd"),
    "NaN constant": lambda: file('{"__metadata__":NaN}'),
    "null metadata": lambda: file({"__metadata__": None, "a": FLOAT}, b"abcd"),
    "metadata as list": lambda: file({"__metadata__": []}),
    "metadata twice": lambda: file('{"__metadata__":{},"__metadata__":{}}'),
    "a scalar": lambda: one(shape=[]),
    "zero hides overflow": lambda: one(b"", shape=[2**63, 4, 0], data_offsets=[0, 0]),
    "zero comes first": lambda: one(b"", shape=[0, 2**63, 4], data_offsets=[0, 0]),
    "64 bits and no more": lambda: one(b"", shape=[2**64 - 1, 0], data_offsets=[0, 0]),
    "more than 64 bits": lambda: one(b"", shape=[2**64, 0], data_offsets=[0, 0]),
    "empty tensor inside another": lambda: file(
        {"a": FLOAT, "b": FLOAT | {"shape": [0], "data_offsets": [2, 2]}}, b"abcd"
    ),
    "unaligned": lambda: file(
        {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": FLOAT | {"data_offsets": [1, 5]}}, b"abcde"
    ),
}


def of_dtype(name: str) -> Callable[[], bytes]:
    num_bytes = DTYPE_BITS[name]
    return lambda: one(bytes(num_bytes), dtype=name, shape=[8], data_offsets=[0, num_bytes])


ODD |= {f"dtype {name}": of_dtype(name) for name in DTYPE_BITS}

# Every difference that is meant: safetensors accepts these, this package does not.
STRICTER: dict[str, Callable[[], bytes]] = {
    "a tensor twice": lambda: file(f'{{"a":{json.dumps(FLOAT)},"a":{json.dumps(FLOAT)}}}', b"abcd"),
    "a metadata key twice": lambda: file('{"__metadata__":{"x":"1","x":"2"}}'),
    "a field nobody knows": lambda: one(extra=1),
    "a tensor as a list": lambda: file({"a": ["F32", [1], [0, 4]]}, b"abcd"),
    "a dtype as an object": lambda: one(dtype={"F32": None}),
    "millions of fields": lambda: file('{"__metadata__":{"":"' + "," * 2_500_001 + '"}}'),
}


def oracle(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as opened:
            return opened.keys() is not None
    except safetensors.SafetensorError:
        return False


def accepted(path: Path) -> bool:
    """The verdict of this package; anything but a verdict is an error of the test."""
    try:
        read_shard(path)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("name", [*MALFORMED, *ODD])
def test_verdicts_are_those_of_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MALFORMED | ODD)[name]())
    started = time.process_time()
    verdict = accepted(path)
    assert time.process_time() - started < 20  # what is not linear in the header takes minutes
    assert verdict is oracle(path)


def test_the_set_has_thirty_files() -> None:
    assert len(MALFORMED) == 30


@pytest.mark.parametrize("name", STRICTER)
def test_where_this_package_is_stricter(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(STRICTER[name]())
    assert oracle(path)
    assert not accepted(path)


COUNT = st.integers(0, 6) | st.sampled_from([-1, 2**32, 2**63, 2**64 - 1, 2**64, 0.5, None, "1", True])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33", 3, None]),
        "shape": st.lists(COUNT, max_size=3) | COUNT,
        "data_offsets": st.lists(COUNT, min_size=2, max_size=2) | st.lists(COUNT, max_size=3),
    }
)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), st.binary(max_size=12))
def test_random_headers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], payload: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(file(header, payload))
    assert accepted(path) is oracle(path)


@st.composite
def sound_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Headers whose tensors cover the payload, in any order of names."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=5, unique=True)):
        dtype = draw(st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits % 8 == 0]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        num_bytes = DTYPE_BITS[dtype] // 8
        for extent in shape:
            num_bytes *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    return header, bytes(range(256)) * (position // 256 + 1)


@settings(max_examples=150)
@given(sound_files(), st.data())
def test_sound_files_and_one_wrong_byte(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    header, octets = sound
    total = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    whole = file(header, octets[:total])
    path.write_bytes(whole)
    shard = read_shard(path)
    assert oracle(path)
    for tensor in shard.tensors:
        start, stop = header[tensor.name]["data_offsets"]
        assert whole[tensor.offset : tensor.offset + tensor.num_bytes] == octets[start:stop]
        assert (tensor.dtype, list(tensor.shape)) == (header[tensor.name]["dtype"], header[tensor.name]["shape"])
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:position] + bytes([data.draw(st.integers(0, 255))]) + whole[position + 1 :]
    path.write_bytes(damaged)
    assert not accepted(path) or oracle(path)  # never laxer


SEEDS = [content for build in (MALFORMED | ODD | STRICTER).values() if len(content := build()) < 1000]
TOKENS = [
    *(b'"a"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"', b'"F4"', b'"F6_E2M3"', b'"U8"'),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"-", b"0", b"1", b"4", b"8", b"00", b"1.0", b"1e0", b"-0"),
    *(b"null", b"true", b"NaN", b"18446744073709551615", b"18446744073709551616", b"4294967296", b"\\u0061"),
    *(b"\\ud800", b"\\n", b"\n", b"\0", b"\xff", b"\xc3\xa9", b"/", b"\xef\xbb\xbf"),
]
MEANT = ("is there twice", "by something else than dtype", "the unknown dtype {")


def mutated(number: int) -> bytes:
    """A small file with up to four pieces taken out, put in, moved or overwritten; its length mostly fits again."""
    dice = random.Random(number)
    content = dice.choice(SEEDS)
    length = min(int.from_bytes(content[:8], "little"), len(content) - 8) if len(content) >= 8 else 0
    header, payload = bytearray(content[8 : 8 + length]), content[8 + length :]
    for _ in range(dice.choice((0, 1, 1, 1, 2, 4))):
        at, stop = sorted(dice.randrange(len(header) + 1) for _ in range(2))
        piece = dice.choice((dice.choice(TOKENS), dice.choice(TOKENS), bytes(header[at : at + 20]), dice.randbytes(1)))
        if dice.random() < 0.5:
            at = stop = dice.randrange(len(header) + 1)
        elif dice.random() < 0.9:
            stop = min(stop, at + dice.randrange(1, 8))
        header[at:stop] = b"" if dice.random() < 0.2 else piece
    if dice.random() < 0.1:
        payload = dice.choice((payload + b"\0", payload[:-1], payload + payload))
    return file(bytes(header), payload, None if dice.random() < 0.95 else max(0, len(header) + dice.randrange(-2, 3)))


def check_mutated(path: Path, first: int, count: int) -> dict[str, int]:
    """How many files both accept, both refuse, and this package alone, for a reason that is meant."""
    found = {"accepted": 0, "refused": 0, "stricter": 0}
    for number in range(first, first + count):
        path.write_bytes(mutated(number))
        theirs, problem = oracle(path), ""
        try:
            read_shard(path)
        except CheckpointError as exc:
            problem = str(exc)
        assert theirs or problem, f"file {number} is accepted, safetensors refuses it"
        assert not theirs or not problem or any(meant in problem for meant in MEANT), f"file {number} {problem}"
        found["stricter" if theirs and problem else "refused" if problem else "accepted"] += 1
    return found


def test_mutated_headers(tmp_path: Path) -> None:
    found = check_mutated(tmp_path / "mutated.safetensors", 0, 2000)
    assert found["accepted"] > 100, found
    assert found["stricter"] > 20, found


@pytest.mark.slow
def test_a_million_mutated_headers(tmp_path: Path) -> None:
    print(check_mutated(tmp_path / "mutated.safetensors", 2000, 1_000_000))


# ---------------------------------------------------------------------------------------------- folders


def tensor_file(*names: str) -> bytes:
    return file(
        {name: FLOAT | {"data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}, bytes(4 * len(names))
    )


def write(folder: Path, shards: dict[str, bytes], weight_map: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    if weight_map is not None:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> Stored:
    problems = Problems(folder)
    stored = read_folder(folder, problems)
    problems.raise_any()
    return stored


def error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BOTH = {"a": A, "b": B}


def halves() -> dict[str, bytes]:
    return {A: tensor_file("a"), B: tensor_file("b")}


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    stored = read(write(tmp_path, halves(), BOTH))
    assert {name: tensor.shard for name, tensor in stored.tensors.items()} == BOTH
    assert [shard.name for shard in stored.shards] == [A, B]
    assert not stored.unread
    assert not stored.partly_unread


def test_a_folder_without_index(tmp_path: Path) -> None:
    assert set(read(write(tmp_path, {"model.safetensors": tensor_file("a", "b")})).tensors) == {"a", "b"}


def test_half_a_checkpoint_without_index(tmp_path: Path) -> None:
    assert f"missing shards (1): {A}" in error(write(tmp_path, {B: tensor_file("b")}))


def test_a_missing_and_a_damaged_shard_are_one_error(tmp_path: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    write(tmp_path, {A: tensor_file("a"), B: tensor_file("b")[:-1]}, {**BOTH, "c": third})
    problems = Problems(tmp_path)
    stored = read_folder(tmp_path, problems)
    assert stored.unread == {"b", "c"}
    message = error(tmp_path)
    assert f"missing shards (1): {third}" in message
    assert f"damaged shards (1): {B} is truncated: its tensors take 4 bytes, the file holds 3" in message


def test_without_an_index_nobody_knows_what_a_damaged_shard_held(tmp_path: Path) -> None:
    write(tmp_path, {A: tensor_file("a"), B: b"\0"})
    assert read_folder(tmp_path, Problems(tmp_path)).partly_unread


def test_a_tensor_absent_from_its_shard(tmp_path: Path) -> None:
    message = error(write(tmp_path, halves(), {**BOTH, "c": A}))
    assert f"tensors absent from the shard the index names (1): c in {A}" in message


def test_a_tensor_the_index_does_not_list(tmp_path: Path) -> None:
    message = error(write(tmp_path, {A: tensor_file("a", "x"), B: tensor_file("b")}, BOTH))
    assert f"tensors the index does not list (1): x in {A}" in message


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    message = error(write(tmp_path, {A: tensor_file("a"), B: tensor_file("a", "b")}))
    assert f"tensors in two shards (1): a in {A} and {B}" in message


def test_a_shard_the_index_does_not_name(tmp_path: Path) -> None:
    message = error(write(tmp_path, {**halves(), "extra.safetensors": tensor_file("a")}, BOTH))
    assert "shards the index does not name (1): extra.safetensors" in message


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "..",
        ".safetensors",
        "",
        "-rf.safetensors",
        "model.bin",
        "x" * 300 + ".safetensors",
    ],
    ids=ascii,
)
def test_the_index_names_plain_files_only(name: str, tmp_path: Path) -> None:
    outside = write(tmp_path / "model", {A: tensor_file("a")}, {"a": A, "b": name})
    (tmp_path / "model.safetensors").write_bytes(tensor_file("b"))
    message = error(outside)
    assert "shard names that are not plain *.safetensors file names (1)" in message
    assert "\0" not in message


def test_names_that_differ_by_case(tmp_path: Path) -> None:
    message = error(write(tmp_path, halves(), {**BOTH, "c": B.upper().replace("SAFETENSORS", "safetensors")}))
    assert "shard names that differ by case only (1)" in message


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map":[]}', b'{"weight_map":{"a":1}}', b"\xff", b'{"weight_map":{"a":"x","a":"x"}}'],
    ids=ascii,
)
def test_a_broken_index(index: bytes, tmp_path: Path) -> None:
    write(tmp_path, halves())
    (tmp_path / INDEX_NAME).write_bytes(index)
    assert f"broken index files (1): {INDEX_NAME}" in error(tmp_path)


def test_a_deep_index(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map":' + "[" * 100_000)
    assert "nested too deeply" in error(tmp_path)


def test_an_index_of_many_missing_shards(tmp_path: Path) -> None:
    write(tmp_path, {}, {f"t{i}": f"{i}.safetensors" for i in range(100_000)})
    started = time.process_time()
    message = error(tmp_path)
    assert time.process_time() - started < 2
    assert "missing shards (100000): 0.safetensors; " in message
    assert "and 99995 more" in message


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes(tensor_file("a"))
    folder = write(tmp_path / "model", {})
    (folder / "model.safetensors").symlink_to(outside)
    assert "damaged shards (1): model.safetensors is a link out of the checkpoint's folder" in error(folder)


def test_a_link_to_an_index_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "model", halves())
    write(tmp_path / "other", {}, BOTH)
    (tmp_path / "model" / INDEX_NAME).symlink_to(tmp_path / "other" / INDEX_NAME)
    assert "is a link out of the checkpoint's folder" in error(tmp_path / "model")


def test_links_of_a_download_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    write(blobs, {"f00d": tensor_file("a"), "beef": tensor_file("b")})
    for name, blob in ((A, "f00d"), (B, "beef")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    assert set(read(snapshot).tensors) == {"a", "b"}
    (tmp_path / "latest").symlink_to(snapshot)
    assert set(read(tmp_path / "latest").tensors) == {"a", "b"}


def test_a_link_within_the_folder(tmp_path: Path) -> None:
    write(tmp_path, {"data": tensor_file("a")})
    (tmp_path / "model.safetensors").symlink_to("data")
    assert set(read(tmp_path).tensors) == {"a"}


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / A).symlink_to("gone")
    (tmp_path / B).symlink_to(B)
    message = error(tmp_path)
    assert f"missing shards (1): {A}" in message
    assert f"{B} is a link that leads nowhere" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / A)
    (tmp_path / B).mkdir()
    message = error(tmp_path)
    assert f"{A} is not a regular file" in message
    assert f"{B} " in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / name).chmod(0)
    message = error(tmp_path)
    assert name in message
    assert "never opened" in message


def test_other_folders_without_weights(tmp_path: Path) -> None:
    assert "no *.safetensors; fetch the weights" in error(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "only model.gguf" in error(tmp_path)
    assert "is not a folder" in error(tmp_path / "model.gguf")
    assert "is not a folder" in error(tmp_path / "nowhere")


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / A).write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 3\n")
    assert "git lfs pull" in error(tmp_path)


def test_an_error_lists_five_of_each_kind(tmp_path: Path) -> None:
    problems = Problems(tmp_path)
    for number in range(7):
        problems.add("missing tensors", f"t{number}")
    problems.add("odd things", "x")
    with pytest.raises(CheckpointError) as caught:
        problems.raise_any()
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  missing tensors (7): t0; t1; t2; t3; t4; and 2 more", "  odd things (1): x"]
    assert lines[3].startswith("fetch the files")
    Problems(tmp_path).raise_any()


def test_names_are_safe_to_print() -> None:
    assert shown("layers.0.wq") == "layers.0.wq"
    assert shown("a\x1b[2J\0") == r"'a\x1b[2J\x00'"
    assert shown("") == "''"
    assert len(shown("x" * 10_000)) == 120
