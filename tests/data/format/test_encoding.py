"""Compressed encodings of log-mel: exactness, quantisation error, and damaged bytes."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from benchmarks import compression as benchmark
from common.errors import UserError
from data.format.compression import CODECS, Codec, decode, decode_range, encode, encode_blocks
from data.format.dataset import open_dataset
from data.format.schema import BLOCK_FRAMES, CHECKSUM_FRAMES, block_range, shard_name
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards.derive import derive, stored_recording
from tests.made_datasets import FEATURES, make_dataset, noise, verify

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 9))
# All 65,536 values: zeros of both signs, subnormal numbers, infinities, every NaN.
ANY_BITS = hnp.arrays(np.uint16, SHAPES).map(lambda bits: bits.view(np.float16))
FINITE = hnp.arrays(np.float16, SHAPES, elements=st.floats(width=16, allow_nan=False, allow_infinity=False))


def decoded(data: bytes, codec: Codec, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.float16)
    decode(data, codec, out)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint16), b.view(np.uint16))


def step_of(values: np.ndarray) -> np.ndarray:
    """Quantisation step of every bin under uint8, float64 [M]."""
    exact = values.astype(np.float64)
    return (exact.max(axis=0) - exact.min(axis=0)) / 255


@given(ANY_BITS)
@settings(deadline=None)
def test_shuffle_zstd_gives_back_every_bit(values: np.ndarray) -> None:
    assert same_bits(decoded(encode(values, "shuffle-zstd"), "shuffle-zstd", values.shape), values)


@given(FINITE)
@settings(deadline=None)
def test_the_error_of_uint8_is_at_most_half_a_step(values: np.ndarray) -> None:
    read = decoded(encode(values, "uint8"), "uint8", values.shape).astype(np.float64)
    exact = values.astype(np.float64)
    # In addition to the half step: float32 arithmetic over the bin's range, and rounding of the result to float16.
    rounding = np.abs(exact).max(axis=0) * 2**-20 + np.spacing(np.abs(read).astype(np.float16)).astype(np.float64) / 2
    assert (np.abs(read - exact) <= step_of(values) / 2 + rounding).all()


def test_uint8_keeps_a_constant_bin() -> None:
    values = noise(100).astype(np.float16)
    values[:, 3] = -13.8
    with warnings.catch_warnings(action="error"):  # no division by a step of zero
        read = decoded(encode(values, "uint8"), "uint8", values.shape)
    assert same_bits(read[:, 3].copy(), values[:, 3].copy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_uint8_refuses_values_that_are_not_finite(bad: float) -> None:
    values = noise(20).astype(np.float16)
    values[7, 5] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        encode(values, "uint8")


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_does_not_change_its_input_and_accepts_any_memory_layout(codec: Codec) -> None:
    wide = noise(60).astype(np.float16)
    strided = wide[::2, 1:]
    before = wide.copy()
    assert encode(strided, codec) == encode(strided.copy(), codec)
    assert same_bits(wide, before)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("frames", [1, BLOCK_FRAMES - 1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 3 * BLOCK_FRAMES + 77])
def test_decoding_a_range_equals_that_range_of_the_recording(codec: Codec, frames: int) -> None:
    values = noise(frames).astype(np.float16)[:, :11]
    blocks = encode_blocks(values, codec)
    sizes = [len(block) for block in blocks]
    whole = np.concatenate(
        [decoded(b, codec, values[i * BLOCK_FRAMES :][:BLOCK_FRAMES].shape) for i, b in enumerate(blocks)]
    )
    if codec == "shuffle-zstd":
        assert same_bits(whole, values)
    edges = sorted({e + d for e in range(0, frames + 1, BLOCK_FRAMES) for d in (-1, 0, 1)} | {frames - 1, frames})
    edges = [e for e in edges if 0 <= e <= frames]
    for start in edges:
        for stop in (e for e in edges if e > start):
            first, last = block_range(start, stop)
            out = np.empty((stop - start, 11), np.float16)
            decode_range(b"".join(blocks[first:last]), sizes[first:last], frames, start, codec, out)
            assert same_bits(out, whole[start:stop])


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_depends_on_its_own_frames_alone(codec: Codec) -> None:
    values = noise(3 * BLOCK_FRAMES).astype(np.float16)
    other = noise(3 * BLOCK_FRAMES, seed=1).astype(np.float16)
    other[BLOCK_FRAMES : 2 * BLOCK_FRAMES] = values[BLOCK_FRAMES : 2 * BLOCK_FRAMES]
    blocks, others = encode_blocks(values, codec), encode_blocks(other, codec)
    assert [a == b for a, b in zip(blocks, others, strict=True)] == [False, True, False]


def test_checksums_cover_whole_blocks() -> None:
    assert CHECKSUM_FRAMES % BLOCK_FRAMES == 0


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_decodes_only_to_its_shape(codec: Codec) -> None:
    data = encode(noise(50).astype(np.float16)[:, :8], codec)
    for shape in ((49, 8), (51, 8), (50, 7), (50, 9), (1, 1), (5000, 80)):
        with pytest.raises(UserError):
            decoded(data, codec, shape)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_and_every_extension_is_detected(codec: Codec) -> None:
    data = encode(noise(12).astype(np.float16)[:, :5], codec)
    for size in range(len(data)):
        with pytest.raises(UserError):
            decoded(data[:size], codec, (12, 5))
    with pytest.raises(UserError):
        decoded(data + b"\0", codec, (12, 5))
    # A valid zstd frame after the last one.
    with pytest.raises(UserError):
        decoded(data + pa.Codec("zstd").compress(b"more", asbytes=True), codec, (12, 5))


@given(st.sampled_from(CODECS), st.data())
@settings(deadline=None, max_examples=400)
def test_damaged_bytes_give_values_or_one_error(codec: Codec, draws: st.DataObject) -> None:
    values = noise(draws.draw(st.integers(1, 40))).astype(np.float16)[:, :6]
    data = bytearray(encode(values, codec))
    for _ in range(draws.draw(st.integers(1, 4))):
        place = draws.draw(st.integers(0, max(0, len(data) - 1)))
        change = draws.draw(st.sampled_from(["flip", "delete", "insert", "cut"]))
        if change == "flip" and data:
            data[place] ^= 1 << draws.draw(st.integers(0, 7))
        elif change == "delete":
            del data[place : place + draws.draw(st.integers(1, 20))]
        elif change == "insert":
            data[place:place] = draws.draw(st.binary(max_size=20))
        else:
            del data[place:]
    try:
        read = decoded(bytes(data), codec, values.shape)
    except UserError:
        return
    assert codec == "shuffle-zstd" or np.isfinite(read).all()


@given(st.sampled_from(CODECS), st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_give_values_or_one_error(codec: Codec, data: bytes) -> None:
    for front in (b"", b"\x28\xb5\x2f\xfd", bytes(4 * 3) + b"\x28\xb5\x2f\xfd"):  # zstd's magic number
        try:
            decoded(front + data, codec, (7, 3))
        except UserError:
            continue


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_that_claims_a_gigabyte_takes_no_memory(codec: Codec) -> None:
    frames, bins = 64, 80
    mebibyte = pa.Codec("zstd").compress(bytes(2**20), asbytes=True)
    terabyte = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"
    for bomb in (mebibyte * 1024, terabyte):
        data = (bytes(4 * bins) if codec == "uint8" else b"") + bomb
        default = pa.default_memory_pool()
        counting = pa.proxy_memory_pool(default)
        pa.set_memory_pool(counting)
        tracemalloc.start()
        try:
            with pytest.raises(UserError):
                decoded(data, codec, (frames, bins))
            peak = tracemalloc.get_traced_memory()[1] + counting.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(default)
        assert 2 * frames * bins <= peak < 20 * frames * bins


@pytest.mark.parametrize(
    "bounds",
    [
        [[np.nan, 0], [1, 1]],
        [[0, 0], [1, np.inf]],
        [[-np.inf, 0], [1, 1]],
        [[np.inf, 0], [np.inf, 1]],
        [[2, 0], [1, 1]],
    ],
)
def test_invalid_uint8_bounds_are_refused(bounds: list[list[float]]) -> None:
    data = encode(noise(9).astype(np.float16)[:, :2], "uint8")
    with pytest.raises(UserError, match="bounds"):
        decoded(np.array(bounds, np.float16).tobytes() + data[8:], "uint8", (9, 2))


def test_sizes_that_do_not_fit_their_blocks_are_refused() -> None:
    frames = 2 * BLOCK_FRAMES
    blocks = encode_blocks(noise(frames).astype(np.float16), "uint8")
    data, (a, b) = b"".join(blocks), map(len, blocks)
    out = np.empty((frames, 80), np.float16)
    decode_range(data, [a, b], frames, 0, "uint8", out)
    for sizes in ([], [a], [a, b, 0], [a, b + 1], [a + 1, b - 1], [-1, a + b + 1], [a + b, 0], [2**63, b]):
        with pytest.raises(UserError):
            decode_range(data, sizes, frames, 0, "uint8", out)


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(UserError, match="'gzip'.*shuffle-zstd"):
        encode(noise(3).astype(np.float16), "gzip")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'gzip'.*shuffle-zstd"):
        decoded(b"", "gzip", (3, 80))  # type: ignore[arg-type]


@pytest.mark.parametrize("candidate", benchmark.candidates(), ids=lambda candidate: candidate.name)
def test_every_candidate_of_the_benchmark_reads_what_it_wrote(candidate: benchmark.Candidate) -> None:
    values = noise(1300).astype(np.float16)
    with tempfile.TemporaryFile() as file:
        check_candidate(candidate, benchmark.Stored(candidate, values, file), values)


def check_candidate(candidate: benchmark.Candidate, stored: benchmark.Stored, values: np.ndarray) -> None:
    whole = stored.read(0, 1300)
    steps = next((2**bits - 1 for bits in (4, 6) if candidate.name.startswith(f"{bits} bits")), 255)
    spread = np.ptp(values.astype(np.float64), axis=0) / steps
    lossy = candidate.name.startswith("uint8") or "bits" in candidate.name
    allowed = (0.5 * spread + 0.01) if lossy else 0
    assert (np.abs(whole.astype(np.float64) - values) <= allowed).all()
    for start, stop in ((0, 1), (511, 513), (100, 1200), (1299, 1300)):
        assert same_bits(stored.read(start, stop), whole[start:stop])


def test_the_benchmark_ends_with_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "set", [300] * 3)
    options = ["--minutes", "0.1", "--crop_seconds", "2", "--crops", "2", "--rounds", "1"]
    benchmark.main(["--dataset", str(tmp_path / "set"), *options])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["candidates"]["plain float16"]["relative_size"] == 1


# --- datasets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["uint8", "shuffle-zstd"])
def test_a_compressed_dataset_reads_the_same_frames_from_anywhere(tmp_path: Path, encoding: Codec) -> None:
    lengths = [3, 511, 512, 513, 5000]
    with DatasetWriter(tmp_path / "packed", FEATURES, 300_000, encoding=encoding) as writer:
        for number, frames in enumerate(lengths):
            recording = Recording(f"r{number:03d}", f"text {number}", language="en", speaker=f"s{number % 3}")
            writer.add(recording, noise(frames, number))
        writer.finish()
    plain, packed = make_dataset(tmp_path / "plain", lengths), open_dataset(tmp_path / "packed")
    assert packed.encoding == encoding and not verify(packed)
    rng = np.random.default_rng(0)
    for i, frames in enumerate(lengths):
        whole = packed.read(i)
        step = np.ptp(plain.read(i).astype(np.float32), axis=0) / 255
        assert (np.abs(whole.astype(np.float32) - plain.read(i)) <= (step if encoding == "uint8" else 0)).all()
        for start, stop in np.sort(rng.integers(0, frames + 1, (20, 2)), axis=1).tolist():
            assert np.array_equal(packed.read(i, start, stop), whole[start:stop])
            assert np.array_equal(packed.read(i, start, stop, verify=True), whole[start:stop])
    assert (packed.fingerprint == plain.fingerprint) == (encoding == "shuffle-zstd")
    assert packed.index.bytes.sum() < 0.95 * plain.index.bytes.sum()
    for shard in packed.shards():
        assert safetensors.numpy.load_file(packed.path / shard_name(shard))  # readable by other programs
    copy = derive(tmp_path / "copy", [(packed, i, stored_recording(packed, i)) for i in range(len(packed))])
    assert copy.encoding == encoding and not verify(copy)
    with pytest.raises(UserError, match="differ in their layout"):
        derive(tmp_path / "both", [(d, 0, stored_recording(d, 0)) for d in (plain, packed)])
    with pytest.raises(UserError, match="started with the layout"):
        DatasetWriter(tmp_path / "packed", FEATURES)


def test_damage_to_a_compressed_dataset_names_the_recording(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FEATURES, encoding="uint8") as writer:
        for number in range(3):
            writer.add(Recording(f"r{number:03d}"), noise(2000, number))
        writer.finish()
    dataset = open_dataset(tmp_path)
    with open(tmp_path / shard_name(0), "r+b") as file:
        file.seek(int(dataset.index.offset[1]) + int(dataset.index.block_bytes(1)[0]) + 400)
        file.write(b"damage")
    assert [problem.split("'")[1] for problem in verify(open_dataset(tmp_path))] == ["r001"]
    with pytest.raises(UserError, match="'r001'"):
        open_dataset(tmp_path).read(1, 600, 700, verify=True)
    open_dataset(tmp_path).read(1, 0, 500)
