"""Typesetting, with fonts that are known beforehand.

Those are the ones that come with typst, and for Chinese a subset of Noto Serif CJK TC. Fonts of the
machine are looked at for rarer characters of a name only.
"""

import base64
import io
import lzma
import tempfile
from pathlib import Path

import typst
from fontTools import subset

from lab7.errors import UserError

FONT = Path(__file__).with_name("fonts") / "NotoSerifTC.otf.xz"  # made by fonts/subset.py
FONT_FILE, FAMILY = "NotoSerifTC.otf", "Noto Serif CJK TC"
_IN_NO_FONT = "\U0010fffd"


def unpack_font(folder: Path) -> None:
    """Write the font of Chinese characters into a folder for typst."""
    folder.mkdir(exist_ok=True)
    (folder / FONT_FILE).write_bytes(lzma.decompress(FONT.read_bytes()))


def embed_font(text: str, folder: Path) -> None:
    """Write chinese.css, which brings a page the Chinese characters of a text, into a folder.

    Args:
        text: Other characters in it are left to the reader's own fonts.
        folder: Holds the font, see `unpack_font`.
    """
    options = subset.Options(layout_features=[], hinting=False)
    font = subset.load_font(str(folder / FONT_FILE), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[ord(character) for character in text if ord(character) > 0x2E7F])
    cutter.subset(font)
    content = io.BytesIO()
    font.save(content)
    data = base64.b64encode(content.getvalue()).decode()
    source = f"url(data:font/otf;base64,{data})"
    rule = f"@font-face {{ font-family: '{FAMILY}'; src: {source}; unicode-range: U+2E80-FFFF; }}"
    (folder / "chinese.css").write_text(rule + "\n", encoding="utf-8")


def needs_system_fonts(text: str) -> bool:
    """Return whether a text has characters that the fonts of this project lack.

    Raises:
        UserError: The fonts of this machine lack one as well; the message names it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack_font(folder)
        if not missing_characters(text, folder, system_fonts=False):
            return False
        missing = missing_characters(text, folder, system_fonts=True)
    if missing:
        named = ", ".join(f"{character} (U+{ord(character):04X})" for character in missing)
        raise UserError(
            f"no font has {named} of {text!r}: install one that does, such as the package "
            "fonts-noto-cjk, or write the name without"
        )
    return True


def missing_characters(text: str, folder: Path, system_fonts: bool) -> list[str]:
    """Return the characters of a text that typst would print as an empty box.

    It gives no warning of that. So each is drawn on a page of its own, and compared with the page
    of a character that no font has.

    Args:
        text: Without control characters.
        folder: Holds fonts, which are used beside those that come with typst.
        system_fonts: Whether those of this machine may be used, too.
    """
    characters = sorted(set(text))
    pages = "".join(f"#page(str.from-unicode({ord(c)}))" for c in [_IN_NO_FONT, *characters])
    box, *drawn = typst.compile(
        f"#set page(width: 2em, height: 2em, margin: 0pt)\n{pages}".encode(),
        format="svg",
        font_paths=[folder],
        ignore_system_fonts=not system_fonts,
    )
    return [c for c, page in zip(characters, drawn, strict=True) if page == box]


def typeset(work: Path, kind: str, system_fonts: bool = False) -> bytes:
    """Compile report.typ to "pdf" or "html"."""
    try:
        return typst.compile(
            work / "report.typ",
            root=work,
            font_paths=[work / "fonts"],
            format=kind,
            ignore_system_fonts=not system_fonts,
            timestamp=0,
        )
    except typst.TypstError as error:
        raise UserError(f"the report cannot be built: {error.message}") from None
