import json

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from bmm.errors import RecipeError
from bmm.tasks.rows import drawn, label_numbers, open_rows

ROWS = [{"text": f"t{n}", "label": n % 2} for n in range(5)]


def write(form, folder):
    if form == "jsonl":
        (folder / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif form == "csv":
        (folder / "d.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))
    elif form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
    elif form == "npz":
        np.savez(folder / "d.npz", text=np.array([r["text"] for r in ROWS]), label=np.array([r["label"] for r in ROWS]))
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "d"))
        return folder / "d"
    return folder / f"d.{form}"


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "npz", "datasets"])
def test_every_form_gives_the_same_rows(form, tmp_path):
    rows = open_rows(write(form, tmp_path))
    assert len(rows) == 5
    assert set(rows.columns) == {"text", "label"}
    got = list(rows.iterate([3, 0]))
    assert [n for n, _ in got] == [3, 0]
    assert [str(r["text"]) for _, r in got] == ["t3", "t0"]
    assert label_numbers(rows, [(n, r["label"]) for n, r in got], None, 2).tolist() == [1, 0]
    rows.require(["text"])
    with pytest.raises(RecipeError, match="has no column 'sentence'"):
        rows.require(["sentence"])


def test_class_folders(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        for n in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{n}.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    rows = open_rows(tmp_path)
    assert rows.classes == ("cat", "dog")
    found = [row for _, row in rows.iterate(range(4))]
    assert [r["label"] for r in found] == ["cat", "cat", "dog", "dog"]
    assert rows.where(2).endswith("dog/0.png")


def test_what_is_wrong_is_named_by_file_and_place(tmp_path):
    def refused(name, content, message):
        path = tmp_path / name
        path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
        with pytest.raises(RecipeError, match=message) as caught:
            open_rows(path)
        assert name in caught.value.message

    refused("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON")
    refused("b.jsonl", "[1]\n", "line 1: list, not an object")
    refused("c.csv", "a,b\n1\n", "line 2: not as many fields")
    refused("d.parquet", b"xx", "no parquet file")
    refused("e.npz", b"xx", "no readable .npz")
    refused("f.txt", "x", "of no known form")
    refused("g.jsonl", "", "is empty")
    refused("h.jsonl", b"\xff\xfe", "cannot read")
    np.savez(tmp_path / "i.npz", a=np.zeros(3), b=np.zeros(2))
    with pytest.raises(RecipeError, match="unlike length"):
        open_rows(tmp_path / "i.npz")
    with pytest.raises(RecipeError, match="no data at"):
        open_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no images in class folders"):
        open_rows(tmp_path / "empty")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(RecipeError, match="holds the splits train") as caught:
        open_rows(tmp_path / "dict")
    assert len(open_rows(caught.value.hint.partition(": ")[2])) == 5


def test_labels(tmp_path):
    rows = open_rows(write("jsonl", tmp_path))
    assert label_numbers(rows, [(0, "b"), (1, "a"), (2, 1), (3, "0")], ["a", "b"], None).tolist() == [1, 0, 1, 0]
    for value, classes, count, message in (
        ("c", ["a", "b"], None, "line 1: no class 'c'"),
        ("c", None, 2, "is a name"),
        (2, ["a", "b"], None, "label 2 is outside the classes"),
        (2, None, 2, "outside the classes"),
        (-1, None, None, "outside the classes"),
        (0.5, None, 2, "outside the classes"),
        (None, None, 2, "is no label"),
    ):
        with pytest.raises(RecipeError, match=message):
            label_numbers(rows, [(0, value)], classes, count)


def test_what_is_drawn_is_the_same_every_time():
    assert drawn(100, 10) == drawn(100, 10) != drawn(100, 10, seed=1)
    assert drawn(100, 10) == drawn(100, None)[:10]
    assert sorted(drawn(7, None)) == list(range(7))
