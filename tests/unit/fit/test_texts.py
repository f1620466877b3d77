"""Texts from files: the rows of every format with their locations; errors of invalid rows."""

import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from outside import SST5, needs

from vllm_steer import SteerError
from vllm_steer.texts import (
    LABEL_MAPS,
    label_map,
    read_labelled,
    read_rows,
    read_texts,
    read_two_sides,
    take,
    text_of,
)


@pytest.fixture
def write_file(tmp_path: Path) -> Any:
    def write(name: str, content: str | bytes) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def lines(path: Path) -> list[tuple[str, Any]]:
    return [
        (row.location.partition(":")[2], row.problem or dict(row.values)) for row in read_rows(path)
    ]


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "Zoë"}\n\n{"text": "b"}\n'),
        ("a.json", '[{"text": "Zoë"},\n\n{"text": "b"}]\n'),
        ("a.csv", "text\nZoë\nb\n"),
        ("a.tsv", "text\tn\nZoë\t1\nb\t2\n"),
        ("a.txt", "Zoë\n \nb"),
        ("a.TXT", "Zoë\nb"),
    ],
)
@pytest.mark.parametrize("prefix", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_every_format_is_read_with_a_bom_and_with_crlf(
    name: str, content: str, prefix: bytes, newline: str, write_file: Any
) -> None:
    path = write_file(name, prefix + content.replace("\n", newline).encode())
    assert list(read_texts(path)) == ["Zoë", "b"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '\n{"n": 1}\n\n{"n": 2}', ["2", "4"]),
        ("a.json", '\n[\n{"n":\n1}\n,\n{"n": 2}]', ["3", "6"]),
        ("a.csv", '\nn,m\n"a\nb\n",1\n\n"c ""d"" , e",2\n', ["3", "7"]),
        ("a.csv", 'n,m\r\n"a\r\nb",1\r\nc,2\r\n', ["2", "4"]),
        ("a.txt", "\n\na\n\nb\n", ["3", "5"]),
    ],
)
def test_a_row_is_named_by_the_line_that_it_begins_in(
    name: str, content: str, expected: list[str], write_file: Any
) -> None:
    assert [line for line, _ in lines(write_file(name, content))] == expected


def test_quotes_newlines_and_delimiters_stay_in_a_csv_value(write_file: Any) -> None:
    path = write_file("a.csv", 'text,label\n"a\nb, ""c""",1\n')
    assert read_labelled(path) == [('a\nb, "c"', 1.0)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_json_items_over_chunk_boundaries(
    size: int, write_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_steer.texts.rows._CHUNK", size)
    items = [
        {"text": 'a ] } , [ { " \\ é \U0001f600', "more": {"deep": [[1, [2.5e3]], {"x": None}]}},
        {"text": "", "n": -120.5},
        {},
    ] * 3
    for indent in (None, 2):
        path = write_file("a.json", json.dumps(items, indent=indent, ensure_ascii=indent is None))
        assert [dict(row.values) for row in read_rows(path)] == items
    numbers = write_file("b.json", "[ 12345 ,678 , true\t]\n ")
    message = [row.problem for row in read_rows(numbers)]
    assert message == [f"the row is {v}; expected an object" for v in ("12345", "678", "True")]
    assert list(read_rows(write_file("c.json", " [ \n] \n"))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: a JSON file holds one list of objects"),
        ('\n{"text": "a"}', ":2: a JSON file holds one list of objects"),
        ('[{"text": "a"}', ":1: invalid JSON .the list does not end"),
        ('[{"text": "a"},\n{"text": }]', ":2: invalid JSON .Expecting value.$"),
        ('[{"text": "a"}\n{"text": "b"}]', ":2: invalid JSON .'{' where a comma or ] is expected"),
        ('[{"text": "a"},,{}]', ":1: invalid JSON .Expecting value"),
        ('[,{"text": "a"}]', ":1: invalid JSON"),
        ('[{"text": "a"},]', ":1: invalid JSON"),
        ("[123", ":1: invalid JSON .the list does not end"),
        ('[{"text": "a"}]\n[{"text": "b"}]', ":2: there is content after the end of the list"),
        ("[" * 100_000, ":1: invalid JSON .nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [2, 1 << 16])
def test_a_broken_json_file_is_named_with_its_line(
    content: str, message: str, size: int, write_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_steer.texts.rows._CHUNK", size)
    with pytest.raises(SteerError, match="a.json" + message):
        list(read_rows(write_file("a.json", content)))


def test_a_bad_item_does_not_take_the_rest_of_a_large_json_file_into_memory(
    write_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_steer.texts.rows._LONGEST", 1 << 18)
    path = write_file("a.json", b'[{"text": "a"},\n{"text": oops}' + b',{"text": "b"}' * 400_000)
    tracemalloc.start()
    with pytest.raises(
        SteerError, match=r"a.json:2: invalid JSON within 262144 characters .Expecting value"
    ):
        list(read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 < path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_reading_a_large_file_holds_little_of_it(name: str, write_file: Any) -> None:
    row = {"text": "x" * 100}
    count = 10_000
    content = {
        "a.jsonl": "\n".join([json.dumps(row)] * count),
        "a.json": json.dumps([row] * count),
        "a.csv": "text,n\n" + f"{row['text']},1\n" * count,
        "a.txt": f"{row['text']}\n" * count,
    }[name]
    path = write_file(name, content)
    tracemalloc.start()
    result = sum(row.problem == "" for row in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result == count
    assert peak < 1 << 19 < path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "location"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2"),
        ("a.csv", b"text,n\na,1\n\xff,1\n", "a.csv:3"),
        ("a.csv", b"text,\xff\na,1\n", "a.csv:1"),
        ("a.txt", b"a\n\nb\xe9\n", "a.txt:3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": {"text": "\xff"}}\n', "a.jsonl:2"),
        ("a.txt", "a\n".encode("utf-16"), "a.txt:1"),
    ],
)
def test_bytes_that_are_not_utf8_are_named_by_their_line(
    name: str, content: bytes, location: str, write_file: Any
) -> None:
    with pytest.raises(SteerError, match=f"{location}: it has bytes that are not UTF-8"):
        read_texts(write_file(name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"\n', r"a.jsonl:1: invalid JSON \(Expecting ',' delimiter\)"),
        ("a.jsonl", '{"text": "a"} {}\n', r"a.jsonl:1: invalid JSON \(Extra data\)"),
        ("a.jsonl", '["a"]\n', r"a.jsonl:1: the row is \['a'\]; expected an object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: invalid JSON .nested too deeply"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", "a.jsonl:1: invalid JSON .Exceeds the limit"),
        ("a.csv", "text,n\na\n", "a.csv:2: 1 values; the first line names 2"),
        ("a.csv", "text,n\na,b,c\n", "a.csv:2: 3 values; the first line names 2"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the first line must name each column once"),
        ("a.csv", "text,\na,b\n", "a.csv:1: the first line must name each column once"),
        ("a.csv", 'text,n\na,1\n"b,1\n', r"a.csv:3: invalid CSV \(unexpected end of data\)"),
        ("a.csv", 'text,n\n"a"b,1\n', "a.csv:2: invalid CSV"),
        (
            "a.jsonl",
            '{"body": "a"}\n',
            "a.jsonl:1: the field 'text' is missing; the row has 'body'",
        ),
        ("a.jsonl", "{}\n", "a.jsonl:1: the field 'text' is missing; the row has nothing"),
        ("a.csv", "body,n\na,1\n", "a.csv:2: the field 'text' is missing; the row has 'body', 'n'"),
        ("a.jsonl", '{"text": " "}\n', "a.jsonl:1: text is ' '; expected a text"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: text is 3; expected a text"),
        ("a.txt", "\n \n", "a.txt: the file has no rows"),
        ("a.csv", "", "a.csv: the file has no rows"),
        ("a.csv", "text,n\n", "a.csv: the file has no rows"),
        ("a.json", "[]", "a.json: the file has no rows"),
        (
            "a.md",
            "a",
            "a.md: the file name extension is .md; supported: .jsonl, .json, .csv, .tsv, .t",
        ),
        ("noending", "a", "noending: the file name extension is missing; supported:"),
    ],
)
def test_errors_of_bad_files_and_rows(
    name: str, content: str, message: str, write_file: Any
) -> None:
    with pytest.raises(SteerError, match=message):
        read_texts(write_file(name, content))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"gone.txt: no such file; give a file of texts"):
        read_texts(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(
        SteerError, match=r"folder.txt: is not a regular file; give a file of texts"
    ):
        read_texts(tmp_path / "folder.txt")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.timeout(20)
def test_reading_does_not_wait_for_a_pipe_or_device(tmp_path: Path, ending: str) -> None:
    os.mkfifo(tmp_path / f"pipe{ending}")
    (tmp_path / f"zeros{ending}").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(SteerError, match=f"{name}{ending}: is not a regular file"):
            read_texts(tmp_path / f"{name}{ending}")


@pytest.mark.parametrize("name", ["a\0b.txt", "\ud800.txt", "x" * 5000 + ".txt"])
def test_an_impossible_file_name_is_one_error(name: str) -> None:
    with pytest.raises(SteerError, match="no such file"):
        read_texts(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x", "label": 1, "label": -1}\n'),
        ("a.json", '[{"text": "x", "label": 1, "label": -1}]'),
    ],
)
def test_a_duplicate_key_of_a_row_is_refused(name: str, content: str, write_file: Any) -> None:
    with pytest.raises(SteerError, match=r"a\.jsonl?:1: the key 'label' is given twice"):
        read_labelled(write_file(name, content))


def test_a_quoted_value_of_a_tsv_file_stays_in_its_cell(write_file: Any) -> None:
    """Most TSV files are written without quoting, where a quote would merge rows."""
    path = write_file("a.tsv", 'text\tlabel\n"a b\t1\nc"\t-1\nd\t1\n')
    with pytest.raises(SteerError, match=r"a\.tsv:2: a quoted value with a tab or a line break"):
        read_labelled(path)


def test_a_line_without_end_is_not_read_whole(write_file: Any) -> None:
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(SteerError, match=f"{name}:2: a line of more than 1[0-9]* characters"):
            read_texts(write_file(name, '"a"\n' + "a" * (17 << 20)))


def test_bad_rows_are_named_together_after_the_good_ones(write_file: Any) -> None:
    path = write_file(
        "a.jsonl", "".join(f'{{"text": "{"x" if i % 2 else ""}"}}\n' for i in range(30))
    )
    rows, good_rows = take(read_rows(path), lambda row: text_of(row, "text")), []
    with pytest.raises(SteerError) as caught:
        good_rows.extend(rows)
    line_numbers = [
        part.split(":")[1] for part in str(caught.value).split("; ") if "a.jsonl" in part
    ]
    assert line_numbers == [str(line) for line in range(1, 21, 2)]
    assert str(caught.value).endswith("; and 5 more bad rows")


def test_a_prompt_inside_an_object(write_file: Any) -> None:
    path = write_file("a.jsonl", '{"prompt": {"text": "So", "toxicity": 0.1}}\n')
    assert list(read_texts(path, text_field="prompt")) == ["So"]


def test_labels_by_a_known_map_and_by_pairs() -> None:
    assert [label_map("sst5")(value) for value in (0, "1", 2.0, " 3 ", "4.0")] == [
        -1,
        -0.5,
        0,
        0.5,
        1,
    ]
    assert label_map("toxicity")(0) == 1.0
    mapped = label_map(" good = 1 ,bad=-1,a=b=0.5,true=1,False=-0.25,1.5=0.1")
    assert [mapped(v) for v in ("good", "bad", "a=b", True, False, 1.5)] == [
        1,
        -1,
        0.5,
        1,
        -0.25,
        0.1,
    ]


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", " 1 ", -1, 0.25, "-0.5", "1e-1"])
def test_a_label_without_a_map_is_its_number(value: Any) -> None:
    assert label_map(None)(value) == float(value)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, "good", "nan", float("nan"), 1.01, "inf", [1], {}, 10**400),
        *("0_1", "\u0661", "\uff11", "0x1", "01"),
    ],
)
def test_a_label_outside_the_range_is_refused(value: Any) -> None:
    with pytest.raises(SteerError, match=r"is not a number in \[-1, 1\]; give a label map such as"):
        label_map(None)(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "sst3",
            "label map 'sst3': expected one of sst2, sst5, yelp, toxicity, a range such as 1:5, or",
        ),
        ("5:1", "label map '5:1': expected the lowest and the highest label, such as 1:5"),
        ("1:1", "label map '1:1': expected the lowest and the highest label, such as 1:5"),
        ("1:2000", "label map '1:2000': expected one of"),
        ("", "label map '': expected one of"),
        ("good=1,", "label map 'good=1,': expected one of"),
        ("=1", "label map '=1': expected one of"),
        ("good=2", r"label '2' is not a number in \[-1, 1\]"),
        ("good=", r"label '' is not a number in \[-1, 1\]"),
        ("good=1,good=-1", "good is listed twice; give each label once"),
    ],
)
def test_an_invalid_label_map_is_refused(value: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        label_map(value)


def test_a_label_outside_the_map_is_refused() -> None:
    for value in ("good", True, None, 2, 1.01):
        with pytest.raises(SteerError, match="is not in the label map; it has 0=-1, 1=1"):
            label_map("sst2")(value)


def test_a_range_spreads_its_labels_evenly() -> None:
    assert [label_map("1:5")(label) for label in (1, "2", 3.0, "4.0", 5)] == [-1, -0.5, 0, 0.5, 1]
    assert [label_map(" 0:2 ")(label) for label in "012"] == [-1, 0, 1]
    with pytest.raises(SteerError, match=r"label 0 is not in the label map; it has 1=-1, 2=1$"):
        label_map("1:2")(0)


@pytest.mark.parametrize(
    ("name", "label", "shifted"),
    [
        ("sst2", 2, "1=-1,2=1"),
        ("sst5", "5", "1=-1,2=-0.5,3=0,4=0.5,5=1"),
        ("yelp", "5.0", "1=-1,2=-0.6,3=-0.2,4=0.2,5=0.6"),
        ("0=1,1=-1", "2", "1=1,2=-1"),
    ],
)
def test_labels_that_begin_at_1_are_told_their_map(name: str, label: Any, shifted: str) -> None:
    with pytest.raises(SteerError, match=f"; if the labels begin at 1, give {shifted}$"):
        label_map(name)(label)
    with pytest.raises(SteerError, match=r"it has 0=\S+ 1=[^;]*$"):
        label_map(name)(6)


def test_every_known_map_has_strengths_between_the_sides() -> None:
    assert all(-1 <= value <= 1 for table in LABEL_MAPS.values() for value in table.values())


def test_labelled_texts_of_one_file_and_of_two(write_file: Any) -> None:
    entry = write_file("a.csv", "review,stars\nfine,1.0\npoor,0\n")
    rows = read_labelled(entry, text_field="review", label_field="stars", labels="sst2")
    two = read_two_sides(write_file("p.txt", "fine\n"), write_file("n.jsonl", '{"text": "poor"}\n'))
    assert rows == two == [("fine", 1.0), ("poor", -1.0)]


@pytest.mark.parametrize(
    ("content", "labels", "message"),
    [
        ("text,label\na,0\nb,1\n", None, "the labels are 0 and 1, and the label 0 means neutral"),
        ("text,label\na,x\n", None, r"a.csv:2: label 'x' is not a number in \[-1, 1\]"),
        ("text,label\na,1\nb,2\n", "sst2", "^a.csv:3: label '2' is not in the label map"),
        ("text,n\na,1\n", None, "a.csv:2: the field 'label' is missing; every row needs a label"),
        ("text,label\n", None, "a.csv: the file has no rows"),
    ],
)
def test_errors_of_bad_labels(
    content: str, labels: str | None, message: str, write_file: Any
) -> None:
    with pytest.raises(SteerError, match=message):
        read_labelled(write_file("a.csv", content), labels=labels)


@pytest.mark.parametrize("separator", [" ", "\t", " \t "])
def test_a_fasttext_file_has_labelled_texts(separator: str, write_file: Any) -> None:
    path = write_file(
        "a.txt", f"__label__5{separator}so good , so good\n\n__label__1{separator}bad\n"
    )
    assert read_labelled(path, labels="1:5") == [("so good , so good", 1.0), ("bad", -1.0)]
    assert list(read_texts(path)) == ["so good , so good", "bad"]
    with pytest.raises(SteerError, match=r"^a.txt:1: label '5' is not in .* give 1=-1,2=-0.5,3=0"):
        read_labelled(path, labels="sst5")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("__label__1 __label__5 good", "it has 2 labels, '__label__1' and '__label__5'; expected"),
        ("__label__1 good __label__5", "it has 2 labels, '__label__1' and '__label__5'; expected"),
        ("__label__ good", "a label has no name; expected __label__NAME and a text"),
        ("__label__1 ", "text is ''; expected a text"),
        ("good", "the field 'label' is missing; every row needs a label"),
        ("good __label__1", "the field 'label' is missing; every row needs a label"),
    ],
)
def test_errors_of_bad_fasttext_lines(line: str, message: str, write_file: Any) -> None:
    with pytest.raises(SteerError, match=f"^a.txt:2: {message}"):
        read_labelled(write_file("a.txt", f"__label__1 bad\n{line}\n"))


@needs(SST5)
def test_a_real_fasttext_file() -> None:
    texts = read_labelled(SST5, labels="1:5")
    counts = Counter(label for _, label in texts)
    assert counts == {-1.0: 1093, -0.5: 2218, 0.0: 1624, 0.5: 2322, 1.0: 1288}  # by grep -c
    assert not any("__label__" in text for text, _ in texts)
    assert texts[3].text.startswith("You 'd think by now America would have had enough of plucky")
