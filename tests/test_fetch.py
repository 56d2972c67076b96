"""Downloads against a small server on this machine: broken, resumed, wrong, absent."""

import hashlib
import http.server
import os
import re
import threading
from pathlib import Path

import pytest
from rich.progress import Progress

from experiments.data import download, files
from experiments.data import fetch as fetching
from experiments.data.fetch import DataSet, File, command, fetch, locate
from experiments.errors import DataError

SMALL = b"one\ntwo\n"
LARGE = bytes(range(256)) * 1000


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents`; remembers each request as (path, Range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {"/small.txt": SMALL, "/large.bin": LARGE}
        self.requests: list[tuple[str, str | None]] = []
        self.gives_ranges = True
        self.shifts_ranges = False
        self.bytes_before_cut: list[int] = []  # one entry per request that is to be cut off

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.contents.get(self.path)
        if content is None:
            return self.send_error(404)
        start = 0
        if wanted and self.server.gives_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            start = max(start - 5, 0) if self.server.shifts_ranges else start
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.bytes_before_cut.pop(0)] if self.server.bytes_before_cut else body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        data_set = DataSet(
            files=tuple(
                File(path, running.url(url), hashlib.sha256(content).hexdigest(), len(content))
                for path, url, content in (("small.txt", "small.txt", SMALL), ("deep/large.bin", "large.bin", LARGE))
            ),
            licence="none",
            home="http://127.0.0.1/home",
        )
        monkeypatch.setattr(fetching, "DATA_SETS", {"sample": data_set})
        yield running
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {"small.txt": SMALL, os.path.join("deep", "large.bin"): LARGE}


def test_fetch_gets_all_files(server, tmp_path):
    assert fetch("sample", tmp_path) == tmp_path / "sample"
    assert contents(tmp_path / "sample") == WHOLE
    assert server.requests == [("/small.txt", None), ("/large.bin", None)]


def test_what_is_there_is_kept(server, tmp_path):
    fetch("sample", tmp_path)
    before = (tmp_path / "sample" / "small.txt").stat()
    fetch("sample", tmp_path)
    after = (tmp_path / "sample" / "small.txt").stat()
    assert len(server.requests) == 2
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_only_missing_files_are_downloaded(server, tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "small.txt").write_bytes(SMALL)
    fetch("sample", tmp_path)
    assert server.requests == [("/large.bin", None)]


def test_progress_is_reported(server, tmp_path):
    reports = []
    fetch("sample", tmp_path, report=lambda *report: reports.append(report))
    assert {path for path, _, _ in reports} == {"small.txt", "deep/large.bin"}
    done = [done for path, done, _ in reports if path == "deep/large.bin"]
    assert done == sorted(done) and len(done) > 2 and done[-1] == len(LARGE)
    assert {total for path, _, total in reports if path == "deep/large.bin"} == {len(LARGE)}


def test_a_cut_connection_is_resumed(server, tmp_path):
    server.bytes_before_cut = [len(SMALL), 100_000, 50_000]
    fetch("sample", tmp_path)
    assert contents(tmp_path / "sample") == WHOLE
    assert server.requests[1:] == [
        ("/large.bin", None),
        ("/large.bin", "bytes=100000-"),
        ("/large.bin", "bytes=150000-"),
    ]


def test_a_server_that_dies_leaves_a_part_that_the_next_call_resumes(server, tmp_path):
    server.bytes_before_cut = [len(SMALL), 100_000, 0]
    with pytest.raises(DataError, match="100000 of 256000 bytes are here"):
        fetch("sample", tmp_path)
    part = tmp_path / "sample" / "deep" / "large.bin.part"
    assert part.read_bytes() == LARGE[:100_000] and not part.with_suffix("").exists()
    server.requests.clear()
    fetch("sample", tmp_path)
    assert contents(tmp_path / "sample") == WHOLE
    assert server.requests == [("/large.bin", "bytes=100000-")]


@pytest.mark.parametrize("quirk", ["gives_ranges", "shifts_ranges"])
def test_a_server_that_ignores_ranges(server, tmp_path, quirk):
    setattr(server, quirk, quirk == "shifts_ranges")
    part = tmp_path / "sample" / "deep" / "large.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE[:1000])
    fetch("sample", tmp_path)
    assert contents(tmp_path / "sample") == WHOLE
    assert len(server.requests) == (2 if quirk == "gives_ranges" else 3)  # a wrong range shows in the SHA-256


@pytest.mark.parametrize("left", [b"another version", LARGE[:-1] + b"?", LARGE + b"?", LARGE])
def test_whatever_an_earlier_call_left(server, tmp_path, left):
    part = tmp_path / "sample" / "deep" / "large.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    fetch("sample", tmp_path)
    assert contents(tmp_path / "sample") == WHOLE
    if left == LARGE:
        assert server.requests == [("/small.txt", None)]


@pytest.mark.parametrize("gives_ranges", [True, False])
@pytest.mark.parametrize("content", [b"ONE\ntwo\n", b"<html>", SMALL + b"three\n" * 100_000])
def test_wrong_content_is_set_aside(server, tmp_path, monkeypatch, content, gives_ranges):
    server.gives_ranges = gives_ranges
    monkeypatch.setattr(download, "_CHUNK", 4)  # so that a piece ends where the file should
    server.contents["/small.txt"] = content
    with pytest.raises(DataError) as caught:
        fetch("sample", tmp_path)
    (bad,) = (tmp_path / "sample").iterdir()
    assert bad.name == "small.txt.bad" and content.startswith(bad.read_bytes()) and 6 <= bad.stat().st_size <= 12
    message = str(caught.value)
    assert f"expected SHA-256 {hashlib.sha256(SMALL).hexdigest()}" in message
    assert f"got {files.sha256(bad)}" in message and str(bad) in message
    server.contents["/small.txt"] = SMALL
    fetch("sample", tmp_path)
    assert (tmp_path / "sample" / "small.txt").read_bytes() == SMALL


def test_a_published_file_that_became_shorter_than_the_part(server, tmp_path):
    server.contents["/small.txt"] = b"one"
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "small.txt.part").write_bytes(SMALL[:5])
    with pytest.raises(DataError, match=r"wrong content: .* \(3 bytes\)"):
        fetch("sample", tmp_path)
    assert contents(tmp_path / "sample") == {"small.txt.bad": b"one"}


def test_a_damaged_file_is_set_aside_not_overwritten(server, tmp_path):
    fetch("sample", tmp_path)
    file = tmp_path / "sample" / "small.txt"
    file.write_bytes(b"edited")
    with pytest.raises(DataError, match="wrong content"):
        fetch("sample", tmp_path)
    assert (tmp_path / "sample" / "small.txt.bad").read_bytes() == b"edited" and not file.exists()
    fetch("sample", tmp_path)
    assert file.read_bytes() == SMALL


def test_a_file_that_is_not_published_any_more(server, tmp_path):
    del server.contents["/large.bin"]
    with pytest.raises(DataError, match=r"large\.bin answered 404 .*data\.root=FOLDER"):
        fetch("sample", tmp_path)


def test_no_network(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as caught:
        fetch("sample", tmp_path)
    message = str(caught.value)
    assert "could not be downloaded" in message and "network" in message
    assert "data.root=FOLDER" in message and "MHAJAX_DATA" in message
    assert contents(tmp_path) == {}


def test_a_root_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .*--root FOLDER"):
        fetch("sample", tmp_path / "file")


def test_unknown_names(tmp_path):
    for function in (lambda: fetch("multi3k", tmp_path), lambda: locate("multi3k", None)):
        with pytest.raises(DataError, match=r"multi3k: no such data set. Did you mean multi30k\? There are: multi30k,"):
            function()


@pytest.fixture
def home(monkeypatch, tmp_path):
    for variable in ("MHAJAX_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def put(folder: Path) -> Path:
    for path, content in WHOLE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_locate_in_a_given_root(server, tmp_path, home):
    inside = put(tmp_path / "data" / "sample")
    assert locate("sample", tmp_path / "data") == inside
    assert locate("sample", str(inside)) == inside
    at_home = put(home / "data" / "sample")
    assert locate("sample", "~/data") == at_home


def test_locate_prefers_root_then_variable_then_cache(server, tmp_path, home, monkeypatch):
    default = put(home / ".cache" / "mhajax" / "sample")
    assert locate("sample", None) == default
    cache = put(tmp_path / "xdg" / "mhajax" / "sample")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert locate("sample", None) == cache
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert locate("sample", None) == default
    variable = put(tmp_path / "shared" / "sample")
    monkeypatch.setenv("MHAJAX_DATA", str(tmp_path / "shared"))
    assert locate("sample", None) == variable
    given = put(tmp_path / "given")
    assert locate("sample", given) == given


def test_locate_says_how_to_get_what_is_missing(server, tmp_path, home):
    with pytest.raises(DataError) as caught:
        locate("sample", None)
    message = str(caught.value)
    assert "2 missing: small.txt, deep/large.bin" in message and str(home / ".cache" / "mhajax" / "sample") in message
    assert "`python -m experiments fetch sample`" in message and "data.root=" in message
    (put(tmp_path / "sample") / "small.txt").unlink()
    for root in (tmp_path, tmp_path / "sample"):
        with pytest.raises(DataError) as caught:
            locate("sample", root)
        assert f"expected 2 files in {tmp_path / 'sample'}, 1 missing: small.txt." in str(caught.value)
        assert f"fetch sample --root {root}`" in str(caught.value)


def test_locate_finds_what_fetch_got(server, tmp_path, home):
    fetched = fetch("sample", tmp_path)
    assert locate("sample", tmp_path) == fetched


def test_command_downloads(server, tmp_path, home, capsys):
    assert command(["sample", "--root", str(tmp_path)]) == 0
    assert contents(tmp_path / "sample") == WHOLE
    assert capsys.readouterr().out == f"sample: {tmp_path / 'sample'}\n"
    assert command(["sample"]) == 0
    assert contents(home / ".cache" / "mhajax" / "sample") == WHOLE


def test_command_shows_how_far_each_file_is(server, tmp_path, capsys):
    assert command(["sample", "--root", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in err.splitlines()]
    assert [(line[0], line[-2:]) for line in lines] == [
        ("small.txt", ["8/8", "bytes"]),
        ("deep/large.bin", ["256.0/256.0", "kB"]),
    ]
    assert "256.0" not in out  # what a program reads has the folder only
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="could not be downloaded"):
        command(["sample", "--root", str(tmp_path / "elsewhere")])
    assert capsys.readouterr().err.strip() == ""  # no bar of which nothing came


def test_a_bar_moves_while_a_file_comes(server, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Progress, "update", lambda self, own, completed: seen.append((self.tasks[own].description, completed))
    )
    fetching._fetch_with_progress("sample", tmp_path)
    large = [done for path, done in seen if path == "deep/large.bin"]
    assert (
        seen[0] == ("small.txt", len(SMALL)) and len(large) > 2 and large == sorted(large) and large[-1] == len(LARGE)
    )


def test_command_checks_all_names_first(server, tmp_path):
    with pytest.raises(DataError, match="sampel: no such data set. Did you mean sample"):
        command(["sample", "sampel", "--root", str(tmp_path)])
    assert server.requests == []


def test_command_lists(server, tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    assert command(["--list", *root]) == 0
    before = capsys.readouterr().out
    assert "sample: 2 files, 0.3 MB, not here" in before and "licence: none" in before and "/home" in before
    fetch("sample", tmp_path)
    command(["--list", *root])
    assert "MB, here (" in capsys.readouterr().out
    (tmp_path / "sample" / "small.txt").unlink()
    command(["--list", *root])
    assert "1 files missing" in capsys.readouterr().out


def test_command_explains_itself(capsys, monkeypatch):
    monkeypatch.setenv("MHAJAX_DATA", "/data/100%s")
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0 and "/data/100%s" in capsys.readouterr().out


def test_command_without_names(capsys):
    with pytest.raises(SystemExit) as caught:
        command([])
    assert caught.value.code == 2 and "name a data set" in capsys.readouterr().err


def test_registry_is_well_formed():
    for data_set in fetching.DATA_SETS.values():
        assert data_set.licence and data_set.home.startswith("https://")
        paths = [file.path for file in data_set.files]
        assert len(set(paths)) == len(paths) > 0
        for file in data_set.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256) and file.size > 0
            assert file.url.startswith("https://") and file.url.endswith("/" + file.path)


@pytest.mark.parametrize("name", sorted(fetching.DATA_SETS))
def test_registry_agrees_with_the_files(name):
    root = os.environ.get("MHAJAX_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs the folder {name} in MHAJAX_DATA, which is {root!r}")
    folder = locate(name, root)
    for file in fetching.DATA_SETS[name].files:
        assert (files.sha256(folder / file.path), (folder / file.path).stat().st_size) == (file.sha256, file.size)


def test_multi30k_can_be_read():
    try:
        folder = locate("multi30k", None)
    except DataError as missing:
        pytest.skip(str(missing))
    sizes = {"train": 29_000, "val": 1_014, "test_2016_flickr": 1_000, "test_2017_flickr": 1_000}
    for split, size in sizes.items():
        assert len(files.read_parallel(folder / f"{split}.en.gz", folder / f"{split}.de.gz")) == size
