"""Which lines of a run's .jsonl files are rows, and which are damaged."""

from fd_large.recipes.row_files import lines_of, newest_line, numbers_of


def test_a_line_is_a_row_or_damaged(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert lines_of(file) == []
    damaged = [b'{"update": 1' + b"0" * 30 + b"}", b'{"update": -1}', b'{"update": true}']
    damaged += [b'{"update": "x"}', b'{"update": null}', b"[1, 2]", b"{}", b'{"u": "\xff"}', b"{"]
    file.write_bytes(b"\n".join([b'{"update": 0}', *damaged, b'{"update": 1}', b'{"update": 2}']))
    lines = lines_of(file)
    assert [line.row for line in lines] == [{"update": 0}, *[None] * 9, {"update": 1}, None]
    assert b"".join(line.raw for line in lines) == file.read_bytes()
    assert numbers_of(lines[1:2]) == "line 2"
    assert numbers_of(lines[1:3]) == "lines 2, 3"


def test_the_newest_line_is_read_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert newest_line(path) == []
    rows = "".join(f'{{"update": {n}, "pad": "{"x" * 90}"}}\n' for n in range(2000))
    path.write_text(rows)
    assert [line.row["update"] for line in newest_line(path)] == [1999]
    path.write_text(rows + '{"update": 2000, "pa')
    assert newest_line(path)[0].row["update"] == 1999
    path.write_text("no row\n")
    assert newest_line(path) == []
