"""Images inside Parquet, Arrow, JSON and tar are the images that they are as files: same pixels, nothing held in memory."""

import base64
import io
import json
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from helpers.samples import encoder
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.image_digests import content_key
from llava_accel.data.images import decode, image_size
from llava_accel.data.records import parse_record
from llava_accel.data.row_forms import RowForm
from llava_accel.prepare import main
from llava_accel.sources import extraction
from llava_accel.sources.image_parts import digest_of_ends, part_of, read_image
from llava_accel.sources.mapped_table import Table
from llava_accel.sources.named import Named
from llava_accel.sources.problems import DataError

NUM_ROWS = 5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare hf` has no key for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def png(number: int, size: tuple[int, int] = (30, 20)) -> bytes:
    """Image `number`; two neighbours are the same."""
    values = np.random.default_rng(number // 2).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def rows(image: Callable[[int], object]) -> list[dict[str, object]]:
    return [{"id": str(n), "image": image(n), "conversations": TURNS} for n in range(NUM_ROWS)]


def in_struct(number: int) -> object:
    return {"bytes": png(number), "path": f"{number}.png"}


def in_text(number: int) -> str:
    return base64.b64encode(png(number)).decode()


_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(kind: pa.DataType, image: Callable[[int], object]) -> pa.Table:
    schema = pa.schema([("id", pa.string()), ("image", kind), ("conversations", pa.list_(_TURN))])
    return pa.Table.from_pylist(rows(image), schema=schema)


def _parquet(folder: Path, kind: pa.DataType, image: Callable[[int], object]) -> Path:
    parquet.write_table(table(kind, image), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def _arrow(folder: Path, kind: pa.DataType, image: Callable[[int], object], compression: str | None = None) -> Path:
    whole = table(kind, image)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(folder / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, whole.schema, options=options) as out,
    ):
        out.write_table(whole, max_chunksize=2)
    return folder / "a.arrow"


def _lines(folder: Path, image: Callable[[int], object]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(image)))
    return folder / "a.jsonl"


def _escaped(folder: Path, image: Callable[[int], object]) -> Path:
    """As PHP writes JSON."""
    path = _lines(folder, image)
    path.write_text(path.read_text().replace("/", "\\/"))
    return path


def _array(folder: Path, image: Callable[[int], object]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows(image), indent=1))
    return folder / "a.json"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for n in range(NUM_ROWS):
            row = {"conversations": TURNS, "image": "the name that it had.jpg"}
            _add(archive, f"{'x' * 120}/{n}.png", png(n))  # a name that takes a header of its own
            _add(archive, f"{'x' * 120}/{n}.json", json.dumps(row).encode())
    return folder / "a.tar"


FORMS: dict[str, Callable[[Path], Path]] = {
    "parquet of structs": lambda folder: _parquet(folder, _STRUCT, in_struct),
    "parquet of bytes": lambda folder: _parquet(folder, pa.binary(), png),
    "parquet of large bytes": lambda folder: _parquet(folder, pa.large_binary(), png),
    "parquet of lists": lambda folder: _parquet(folder, pa.list_(_STRUCT), lambda n: [in_struct(n)]),
    "parquet of base64": lambda folder: _parquet(folder, pa.string(), in_text),
    "arrow of structs": lambda folder: _arrow(folder, _STRUCT, in_struct),
    "arrow of lists": lambda folder: _arrow(folder, pa.list_(_STRUCT), lambda n: [in_struct(n)]),
    "compressed arrow": lambda folder: _arrow(folder, _STRUCT, in_struct, "zstd"),
    "lines of base64": lambda folder: _lines(folder, in_text),
    "lines of URL-safe base64": lambda folder: _lines(folder, lambda n: base64.urlsafe_b64encode(png(n)).decode()),
    "lines of data URIs": lambda folder: _lines(folder, lambda n: f"data:image/png;base64,{in_text(n)}"),
    "lines of data URIs with escaped slashes": lambda folder: _escaped(
        folder, lambda n: f"data:image/png;base64,{in_text(n)}"
    ),
    "lines of base64 with escaped slashes": lambda folder: _escaped(folder, in_text),
    "lines of structs": lambda folder: _lines(folder, lambda n: {"bytes": in_text(n), "path": None}),
    "an array of base64": lambda folder: _array(folder, in_text),
    "a shard": _tar,
}


def corpus(path: Path, **settings: object) -> Corpus:
    return Corpus(open_sources([Named(str(path))], path.parent / "cache"), encoder(**settings))


@pytest.mark.parametrize("form", FORMS)
def test_the_pixels_are_those_of_the_file_and_equal_images_have_one_name(tmp_path: Path, form: str) -> None:
    data = corpus(FORMS[form](tmp_path))
    assert len(data) == NUM_ROWS
    addresses = [data.image_files(n)[0] for n in range(NUM_ROWS)]
    for found in (addresses, [data.image_name(n, address) for n, address in enumerate(addresses)]):
        assert found[0] == found[1] != found[2] == found[3] != found[4]
    for n, address in enumerate(addresses):
        assert len(data.sources[0].raw(n)) < 500, "rows hold no image"
        assert read_image(address) == png(n)
        assert image_size(address) == (30, 20)
        assert np.array_equal(np.asarray(decode(address)), np.asarray(Image.open(io.BytesIO(png(n)))))
        assert [view.file for view in data.encode(n).example.images] == [address]


def test_arrow_and_tar_are_read_where_they_are_and_parquet_is_copied_once(tmp_path: Path) -> None:
    for form in ("arrow of structs", "a shard"):
        path = FORMS[form](tmp_path)
        part = part_of(corpus(path).image_files(3)[0])
        assert part and part.file == str(path)
    assert not (tmp_path / "cache" / "embedded").exists()
    corpus(FORMS["parquet of structs"](tmp_path))
    (copies,) = (tmp_path / "cache" / "embedded").iterdir()
    assert copies.stat().st_size == sum(len(png(n)) for n in (0, 2, 4)), "neighbours that are equal are copied once"


@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_samples_of_a_shard_whose_names_have_dots_are_not_taken_for_one(tmp_path: Path, suffix: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n in range(2):
            _add(archive, f"photo.{n}.png", png(2 * n))
            _add(archive, f"photo.{n}.{suffix}", b'{"caption": "a cat"}')
    with pytest.raises(
        DataError, match=rf"row 1: photo\.0\.{suffix} and photo\.1\.{suffix} are of one sample.* no dot"
    ):
        corpus(tmp_path / "a.tar")


def test_a_worker_gets_no_copy(tmp_path: Path) -> None:
    data = corpus(FORMS["arrow of structs"](tmp_path))
    sent = pickle.dumps(data.sources)
    assert len(sent) < 2000
    assert pickle.loads(sent)[0].address(data.image_files(2)[0]) == data.image_files(2)[0]


def test_copies_that_are_gone_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = FORMS["lines of base64"](tmp_path)
    corpus(path)
    (copies,) = (tmp_path / "cache" / "embedded").iterdir()
    copies.unlink()
    assert read_image(corpus(path).image_files(4)[0]) == png(4)
    assert "is made anew" in capsys.readouterr().err


def test_plain_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    """Long words are no images: a hash, an address, a text that explains base64."""
    line = json.dumps({"id": "a" * 64, "text": in_text(0), "conversations": [{"from": "gpt", "value": in_text(1)}]})
    (tmp_path / "a.jsonl").write_text(f" {line}\n")
    assert Table(tmp_path / "a.jsonl", tmp_path / "cache")[0] == line.encode()


@pytest.mark.parametrize(
    "value",
    [
        {"llava_accel.part": [0, 0, 10, "0" * 32, "a"]},
        {"llava_accel.part": [5, 0, 10, "0" * 32, "a"]},
        {"llava_accel.part": [0, -1, 10, "0" * 32, "a"]},
        {"llava_accel.part": "x"},
        "/etc/passwd#bytes=0+10#" + "0" * 32 + "#a.png",
    ],
)
def test_a_row_cannot_name_parts_of_other_files(tmp_path: Path, value: object) -> None:
    fields = {"id": 1, "image": value, "conversations": TURNS}
    with pytest.raises(DataError):
        parse_record(json.dumps(fields).encode(), 1)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n cut off", b"\xff\xd8\xff\0\0", b"\0\xff\xfe"])
def test_what_is_no_image_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    data = corpus(_parquet(tmp_path, pa.binary(), lambda _: content))
    with pytest.raises(DataError) as caught:
        decode(data.image_files(0)[0])
    assert caught.value.remedy


def test_text_in_bytes_is_text(tmp_path: Path) -> None:
    data = pa.table({"conversations": [json.dumps(TURNS).encode()], "id": [b"one"]})
    parquet.write_table(data, tmp_path / "a.parquet")
    assert json.loads(Table(tmp_path / "a.parquet", tmp_path / "cache")[0])["id"] == "one"


def test_nulls_stand_for_nothing(tmp_path: Path) -> None:
    kinds = {"image": _STRUCT, "images": pa.list_(_STRUCT)}
    written = pa.Table.from_pylist(
        [{"image": None, "images": None}, {"image": {"bytes": None, "path": "a.png"}, "images": [None]}],
        schema=pa.schema(list(kinds.items())),
    )
    parquet.write_table(written, tmp_path / "a.parquet")
    opened = Table(tmp_path / "a.parquet", tmp_path / "cache")
    assert json.loads(opened[0]) == {"image": None, "images": None}
    assert json.loads(opened[1]) == {"image": {"bytes": None, "path": "a.png"}, "images": [None]}


def test_a_copy_of_a_row_holds_its_image(tmp_path: Path) -> None:
    data = corpus(FORMS["arrow of structs"](tmp_path))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(data.sources[0].whole(n) for n in range(NUM_ROWS)))
    copied = corpus(tmp_path / "b.jsonl")
    assert [read_image(copied.image_files(n)[0]) for n in range(NUM_ROWS)] == [png(n) for n in range(NUM_ROWS)]


def drawing(number: int) -> bytes:
    """As a JPEG whose colours differ from those of others in the middle alone: of one size, and both ends are equal."""
    return b"\xff\xd8\xff" + bytes(9000) + bytes([number]) + bytes(9000)


@pytest.mark.parametrize("form", ["arrow", "parquet", "shard"])
def test_images_that_differ_in_their_middle_alone_are_not_taken_for_one(tmp_path: Path, form: str) -> None:
    shown = [drawing(n) for n in (0, 1, 0, 2, 1)]
    assert len({digest_of_ends(io.BytesIO(content)) for content in shown}) == 1 and len({*shown}) == 3
    if form == "shard":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for n, content in enumerate(shown):
                _add(archive, f"{n}.jpg", content)
                _add(archive, f"{n}.txt", b"a drawing")
    else:
        write = _arrow if form == "arrow" else _parquet
        write(tmp_path, _STRUCT, lambda n: {"bytes": shown[n], "path": None})
    data = corpus(next(tmp_path.glob("a.*")))
    addresses = [data.image_files(n)[0] for n in range(5)]
    assert [read_image(address) for address in addresses] == shown
    names = [data.image_name(n, address) for n, address in enumerate(addresses)]
    assert len({*names}) == len({*addresses}) == 3 == len({content_key(address) for address in addresses})


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_pages_without_compression_are_told_apart_in_different_files(tmp_path: Path, kind: str) -> None:
    def page(number: int) -> bytes:
        values = np.full((100, 100, 3), 255, np.uint8)
        values[50, 50] = number
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        return buffer.getvalue()

    names: set[str] = set()
    for number in range(2):
        (folder := tmp_path / str(number)).mkdir()
        content = page(number)
        data = corpus(_parquet(folder, _STRUCT, lambda _, content=content: {"bytes": content, "path": None}))
        names |= {data.image_name(row, data.image_files(row)[0]) for row in range(NUM_ROWS)}
    assert len(names) == 2


def test_the_memory_that_copies_are_remembered_in_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_REMEMBERED", 1)
    data = corpus(FORMS["parquet of structs"](tmp_path))
    assert [read_image(data.image_files(n)[0]) for n in range(NUM_ROWS)] == [png(n) for n in range(NUM_ROWS)]


@pytest.mark.parametrize("form", ["parquet of structs", "a shard", "lines of base64"])
def test_prepare_hf_writes_records_and_files_that_say_the_same(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = FORMS[form](tmp_path), tmp_path / "out"
    main(["hf", "--set", str(path), "--out", str(out)])
    assert f"next: llava-accel init my.toml --data {out}/train.jsonl" in capsys.readouterr().out
    written = Corpus(open_sources([Named(str(out / "train.jsonl"), str(out / "images"))], tmp_path / "c"), encoder())
    given = corpus(path)
    for n in range(NUM_ROWS):
        assert written.record(n).turns == given.record(n).turns and written.record(n).id == given.record(n).id
        assert read_image(written.image_files(n)[0]) == png(n)
    assert len(list((out / "images").iterdir())) == 3, "an image that three rows show is one file"


def test_prepare_hf_reads_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"photo": in_text(n), "q": f"What {n}?", "label": "red"} for n in range(NUM_ROWS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    names = ["--columns", "image=photo", "question=q", "answer=label"]
    main(["hf", "--set", str(tmp_path / "a.jsonl"), *names, "--out", str(tmp_path / "out")])
    first = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert [turn["value"] for turn in first["conversations"]] == ["<image>\nWhat 0?", "red"]
    with pytest.raises(SystemExit, match="2"):
        main(["hf", "--set", str(tmp_path / "a.jsonl"), "--columns", "photo", "--out", str(tmp_path / "out")])
    assert "it is not OURS=THEIRS" in capsys.readouterr().err


def test_prepare_hf_keeps_both_answers_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": "x", "question": "What?", "chosen": "a cat", "rejected": "a dog"}, {"question": "Q", "answer": "A"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    main(["hf", "--set", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    raw = (tmp_path / "out" / "train.jsonl").read_bytes().splitlines()
    written = [parse_record(line, 1, RowForm(pairs=True)) for line in raw]
    assert [(each.turns[-1].text, each.rejected) for each in written] == [("a cat", "a dog"), ("A", None)]


def test_prepare_hf_keeps_files_of_one_name_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, folder in ((0, "one"), (2, "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(n))
    lines = [{"id": name, "image": f"{name}/a.png", "conversations": TURNS} for name in ("one", "two")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    out = tmp_path / "out"
    main(["hf", "--set", str(tmp_path / "a.jsonl"), "--out", str(out)])
    written = [json.loads(line)["image"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert [(out / "images" / name).read_bytes() for name in written] == [png(0), png(2)]


@pytest.mark.parametrize("text", ["a" * 40 + " " * 200_000 + "!", "_" * 100_000 + "\n" * 100_000 + "."])
def test_a_long_text_that_is_no_image_is_told_apart_at_once(text: str) -> None:
    since = time.process_time()
    assert extraction.image_of_base64(text) is None
    assert time.process_time() - since < 2


@pytest.mark.parametrize("ending", ["", "\n", "  \n\n"])
def test_white_space_in_and_behind_the_base64_of_an_image_is_none_of_it(ending: str) -> None:
    for number in range(0, 6, 2):
        lines = base64.encodebytes(png(number)).decode()
        assert extraction.image_of_base64(f"data:image/png;base64,{lines.strip()}{ending}") == png(number)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_shard_is_refused_and_not_left_out_of_its_sample(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("0.png", png(0)), ("0.json", b"{}"), ("1.png", b""), ("1.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == "1.png":
                member.type, member.linkname = kind, "0.png"
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"1\.png is a link to 0\.png.*--hard-dereference"):
        Table(tmp_path / "a.tar", tmp_path / "cache")


def test_a_sample_whose_files_are_apart_is_refused_with_how_to_bring_them_together(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("0.png", png(0)), ("1.png", png(2)), ("0.txt", b"a cat"), ("1.txt", b"a dog")):
            _add(archive, name, content)
    with pytest.raises(
        DataError, match=r"row 3: the files of the sample '0' are not side by side.*tar --sort=name -cf"
    ):
        Table(tmp_path / "a.tar", tmp_path / "cache")
