"""Checks a hand-in, anybody's, against the list of a year's hand-out.

Graders' scripts read every file of images/test and images/new_test, so nothing may lie there but
the pictures 0.png, 1.png, ….
"""

import io
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from PIL import Image

from lab7.dataset import IMAGE_SIZE, SCORED, named_conditions
from lab7.errors import UserError, user_files
from lab7.files import existing_file
from workshop.course.handouts import Handout

JUNK = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", "__pycache__", ".ipynb_checkpoints"}
SOURCE = (".py", ".ipynb")
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz")
WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".pkl")
LARGEST = 100_000_000  # bytes that are unpacked of a file: a zip may hold a bomb
MOST_NAMED = 4  # files that a line names, the others are counted

_NUMBERED = re.compile(r".*?(\d+)\.(png|jpe?g)", re.IGNORECASE)
_TRAINING = re.compile(r"CLEVR_train_\d+_\d\.png")
# Encodings of names that are not marked as UTF-8, and first bytes of common characters in them.
_ENCODINGS = {
    "utf-8": ("utf-8", range(0x100)),
    "gbk": ("gb2312", range(0xB0, 0xD8)),
    "cp950": ("big5", range(0xA4, 0xC7)),
}

Entries = dict[PurePosixPath, zipfile.ZipInfo]


@dataclass(frozen=True)
class Finding:
    """One line of a check: what is there, a harmless oddity, or what has to be mended."""

    kind: Literal["there", "note", "missing", "too much", "wrong"]
    text: str

    @property
    def harmless(self) -> bool:
        return self.kind in ("there", "note")

    def __str__(self) -> str:
        return f"{self.kind:8s}  {self.text}"


def check_handin(
    file: Path | BinaryIO, name: str, handout: Handout, data: Path | None = None
) -> list[Finding]:
    """Check a zip against the list of a year.

    Args:
        file: The zip.
        name: Its file name.
        handout: What the year wants.
        data: Data folder whose test.json and new_test.json the pictures are for.

    Returns:
        What was found; the hand-in is as it should be where all of it is harmless.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is no zip.
    """
    counts = {f"images/{key}": len(named_conditions(key, data)) for key in SCORED}
    try:
        with user_files(), zipfile.ZipFile(file) as pack:
            entries, findings = _read_names(pack)
            findings = [*_check_title(name, handout), *findings, *_check_report(pack, entries)]
            for folder, count in counts.items() if handout.images else ():
                findings += _check_images(pack, entries, PurePosixPath(folder), count)
            return findings + list(_check_rest(entries))
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise UserError(f"{name} is no zip, or a damaged one: {error}") from None


def print_check(path: Path, handout: Handout, data: Path | None = None) -> None:
    """Print what `check_handin` finds.

    Raises:
        UserError: It finds something that has to be mended, or see there.
    """
    path = existing_file(path)
    findings = check_handin(path, path.name, handout, data)
    print(f"{path} against the list of {handout.term}", *findings, sep="\n")
    wrong = sum(not finding.harmless for finding in findings)
    if wrong:
        what = "what is missing, too much or wrong"
        lines = f"{wrong} line{'s' * (wrong > 1)}"
        raise UserError(f"{path.name} has to be mended: see the {lines} above on {what}")


def _check_title(name: str, handout: Handout) -> Iterator[Finding]:
    wanted = f"{handout.prefix}_ID_Name.zip"
    if re.fullmatch(rf"{handout.prefix}_[\w-]+_.+\.zip", name):
        yield Finding("there", f"{name}, named as {wanted}")
    else:
        yield Finding("wrong", f"the name {name}: {handout.term} wants {wanted}")


def _read_names(pack: zipfile.ZipFile) -> tuple[Entries, list[Finding]]:
    """Return the files by path, without folders around all of them, and what is odd in names."""
    entries: Entries = {}
    odd = defaultdict(list)  # names by (kind, what is odd)
    for info in pack.infolist():
        shown = info.orig_filename
        name, encoding = _true_name(shown)
        path = PurePosixPath(name.replace("\\", "/"))
        if encoding:
            odd["note", f"names in {encoding} without a mark of UTF-8"].append(f"{shown} is {name}")
        if "\\" in name:
            odd["note", "backslashes in names, from an old Windows"].append(shown)
        if JUNK & set(path.parts):
            odd["note", "left by a system or an editor"].append(path)
        if name.endswith(("/", "\\")) or "__MACOSX" in path.parts:
            continue
        if path.is_absolute() or ".." in path.parts:
            odd["wrong", "leads out of the folder it is unpacked in"].append(path)
        if path in entries:
            odd["wrong", "twice in the zip"].append(path)
        if info.flag_bits & 1:
            odd["wrong", "needs a password"].append(path)
        entries[path] = info
    top, entries = _unwrap(entries)
    if top.parts:
        odd["note", "all of it lies in one folder, where a script looks for images"].append(top)
    return entries, [Finding(kind, f"{text}: {_list(x)}") for (kind, text), x in odd.items()]


def _unwrap(entries: Entries) -> tuple[PurePosixPath, Entries]:
    """Take off the folders that hold all of a zip; return them as one path, and the rest."""
    top = PurePosixPath()
    while True:
        paths = [path for path in entries if not JUNK & set(path.parts)]
        firsts = {path.parts[0] for path in paths if len(path.parts) > 1}
        if len(firsts) != 1 or firsts == {"images"} or any(len(p.parts) < 2 for p in paths):
            return top, entries
        top /= firsts.pop()
        entries = {
            PurePosixPath(*path.parts[1:]): info
            for path, info in entries.items()
            if len(path.parts) > 1
        }


def _true_name(shown: str) -> tuple[str, str | None]:
    """Return a name as it was meant, and its encoding if it was read in a wrong one.

    What is not marked as UTF-8 is read as cp437. The guess is the encoding in which most of the
    characters are common ones.
    """
    try:
        raw = shown.encode("cp437")
    except UnicodeEncodeError:
        return shown, None
    best, found = 0.5, (shown, None)
    for encoding, (standard, first_bytes) in _ENCODINGS.items():
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        firsts = [c.encode(standard, "ignore")[:1] for c in text if not c.isascii()]
        common = sum(byte != b"" and byte[0] in first_bytes for byte in firsts)
        if firsts and common / len(firsts) > best:
            best, found = common / len(firsts), (text, encoding)
    return found


def _check_report(pack: zipfile.ZipFile, entries: Entries) -> Iterator[Finding]:
    files = [path for path in entries if path.suffix.lower() == ".pdf"]
    for path in files:
        content = _read(pack, entries[path]) or b""
        if b"%PDF-" in content[:1024] and b"%%EOF" in content[-2048:]:
            yield Finding("there", f"report {path}, {len(content) / 1e6:.1f} MB")
        else:
            yield Finding("wrong", f"{path} is no complete PDF")
    if not files:
        others = [p for p in entries if p.suffix.lower() in (".docx", ".doc", ".odt", ".pages")]
        hint = f": print {_list(others)} as one" if others else ""
        yield Finding("missing", f"a report as PDF{hint}")


def _check_images(
    pack: zipfile.ZipFile, entries: Entries, folder: PurePosixPath, count: int
) -> Iterator[Finding]:
    files = {str(p.relative_to(folder)): p for p in entries if p.is_relative_to(folder)}
    if not files:
        places = {str(p.parent) for p in entries if _NUMBERED.fullmatch(p.name)}
        hint = f": there are numbered pictures in {_list(sorted(places))}" if places else ""
        yield Finding("missing", f"{folder}/0.png … {count - 1}.png{hint}")
        return
    wanted = [f"{index}.png" for index in range(count)]
    missing = [name for name in wanted if name not in files]
    extra = sorted(files.keys() - set(wanted))
    if missing:
        shifted = missing == wanted[:1] and f"{count}.png" in extra
        hint = ", as the numbers begin at 1" if shifted else ""
        yield Finding("missing", f"{folder}: {_list(missing)} of {count} pictures{hint}")
    if extra:
        yield Finding(
            "too much", f"{folder}: {_list(extra)}: scripts read every file there, as 0.png …"
        )
    yield from _check_pictures(
        folder, {name: _read(pack, entries[files[name]]) for name in wanted if name in files}
    )


def _check_pictures(folder: PurePosixPath, pictures: dict[str, bytes | None]) -> Iterator[Finding]:
    """Check format and size of the pictures of one folder."""
    kinds = {name: _describe(content) for name, content in pictures.items()}
    broken = [name for name, kind in kinds.items() if kind is None]
    if broken:
        yield Finding("wrong", f"{folder}: {_list(broken)} cannot be read as PNG")
    sizes = Counter(kind[0] for kind in kinds.values() if kind)
    shown = ", ".join(f"{n} of {w}×{h} pixels" for (w, h), n in sizes.most_common())
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        yield Finding("wrong", f"{folder}: {shown}: all pictures have to be squares of one size")
    elif sizes:
        resized = f"; scripts resize them to {IMAGE_SIZE}×{IMAGE_SIZE}"
        usual = (IMAGE_SIZE, IMAGE_SIZE) in sizes
        yield Finding("there", f"{folder}: pictures, {shown}{'' if usual else resized}")
    modes = {kind[1] for kind in kinds.values() if kind} - {"RGB"}
    if modes:
        yield Finding("note", f"{folder}: pictures of mode {_list(sorted(modes))}, not RGB")


def _check_rest(entries: Entries) -> Iterator[Finding]:
    code = [path for path in entries if path.suffix.lower() in SOURCE]
    if code:
        yield Finding("there", f"source: {len(code)} files")
    else:
        yield Finding("missing", f"source: there is no {' or '.join(SOURCE)}")
    packed = [path for path in entries if path.suffix.lower() in ARCHIVES]
    if packed:
        yield Finding("note", f"archives, whose content is not looked at: {_list(packed)}")
    training = [path for path in entries if _TRAINING.fullmatch(path.name)]
    if training:
        yield Finding("too much", f"pictures of the data set: {_list(training)}")
    weights = [
        f"{path} ({info.file_size / 1e6:.0f} MB)"
        for path, info in entries.items()
        if path.suffix.lower() in WEIGHTS
    ]
    if weights:
        yield Finding("note", f"weights, which the list does not name: {_list(weights)}")


def _read(pack: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | None:
    """Return a file of a zip, None where it is damaged, encrypted or too large."""
    try:
        return pack.read(info) if info.file_size <= LARGEST else None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError):
        return None  # RuntimeError: a password, or a compression that Python lacks


def _describe(content: bytes | None) -> tuple[tuple[int, int], str] | None:
    """Return size (width, height) and mode of a PNG, None where it is none."""
    try:
        with Image.open(io.BytesIO(content or b""), formats=["PNG"]) as picture:
            picture.load()
            return picture.size, picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _list(items: Iterable[object]) -> str:
    names = list(map(str, items))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
