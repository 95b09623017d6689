"""Records survive JSON, say what was refused, and show everything that a reader needs."""

import json

import pytest

from bench import record as record_module
from bench.measure import Gate, Ratio, Roof, Summary, Work
from bench.record import Record, Row, machine_record, print_header, print_rows

ROOF = Roof(read=10e9, update=20e9, copy=20e9, int8=1e12, bfloat16=5e11, float32=1e11)


def rows():
    work = Work(read=10_000_000, updated=1_000_000)
    group = {"shape": "tiny", "batch": 8}
    return [
        Row(group, "base", Summary.of([0.004, 0.005, 0.006]), work, ROOF.seconds(work), Gate(0.0, 0.0)),
        Row(
            group,
            "ours[seed=3]",
            Summary.of([0.002, 0.0025, 0.003]),
            work,
            ROOF.seconds(work),
            Gate(0.3, 0.1),
            {"base": "refused: numerics", "other": Ratio(2.0, 1.5, 2.5)},
            {"state MB": 1.25},
        ),
        Row(group, "bytes only", values={"state MB": 2.5}),
    ]


def make(path=None, members=None):
    members = rows() if members is None else members
    return Record("decode", {"shape": "tiny", "batch": [8]}, machine_record(), ROOF, members, True, path)


@pytest.fixture
def printed(monkeypatch):
    import io

    import rich.console

    text = io.StringIO()
    monkeypatch.setattr(record_module, "console", rich.console.Console(file=text, width=220))
    return text


def test_round_trip(tmp_path):
    written = make(tmp_path / "deep" / "record.json")
    written.write()
    assert Record.read(written.path) == written
    assert [path.name for path in written.path.parent.iterdir()] == ["record.json"]


def test_every_group_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    found = make(tmp_path / "record.json", members=[])
    found.complete = False
    for count, row in enumerate(rows(), start=1):
        found.add([row])
        seen = Record.read(found.path)
        assert len(seen.rows) == count and not seen.complete


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for content in ("[]", "{}", json.dumps({"format": 99})):
        path.write_text(content)
        with pytest.raises(ValueError, match="no benchmark record"):
            Record.read(path)


def test_a_failed_check_is_known_of_the_record():
    assert make().refused
    assert not make(members=rows()[:1]).refused


def test_the_machine_is_named():
    machine = machine_record()
    assert machine["threads"] >= 1 and machine["cores"] >= 1
    assert machine["processor"] and machine["isa"] in ("avx512", "avx2", "portable")
    assert {"torch", "transformers", "torchao"} <= set(machine["versions"])


def test_what_is_printed(printed):
    found = make()
    print_header(found)
    print_rows(found.rows)
    text = printed.getvalue()
    for part in (
        "tiny",
        "batch 8",
        "threads",
        "torch",
        "10.0 GB/s",
        "12",
        "0.3 (0.1)",
        "2.00 (1.50 - 2.50)",
        "1.25",
        "ours[seed=3]",
    ):
        assert part in text, part
    assert "refused: numerics" in text
    # 10 MB at 10 GB/s and 2 x 1 MB at 20 GB/s are 1.1 ms, of 5 and of 2.5.
    assert "22%" in text and "44%" in text
