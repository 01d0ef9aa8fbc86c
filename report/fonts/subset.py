"""How NotoSerifTC.otf.xz was made: the characters of Chinese names, out of Noto Serif CJK TC.

It holds Big5 without its 430 characters of most strokes, the first level of GB2312 for names
in simplified characters, kana, punctuation, and further characters of names. Hinting,
OpenType features and subroutines are left out: print needs none, and without subroutines the file
packs better.

    apt-get install fonts-noto-cjk
    python report/fonts/subset.py /usr/share/fonts/opentype/noto/NotoSerifCJK-Regular.ttc
"""

import io
import lzma
import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection

OUTPUT = Path(__file__).with_name("NotoSerifTC.otf.xz")
FAMILY = "Noto Serif CJK TC"
BIG5_ROWS = range(0xA1, 0xF7)  # first bytes; the rows F7 to F9 have the most strokes
GB2312_ROWS = range(0xB0, 0xD8)
KANA = range(0x3041, 0x30FF)
FULL_WIDTH = range(0xFF01, 0xFF5F)
OF_NAMES = "凃堃喆峯綉羣煊邨寗彣琁啓娍栢碁銹裏墻恒粧嫺瑈濶犇皥瀞珺喦頴昻暎旼鑫灝瓛纘驤纕龢驊欒"

OF_SIMPLIFIED_NAMES = (  # beyond the first level of GB2312
    "钰韬炜烨祎晗晔纾绮绾缇缦萦诩谌谡赟轶郦铄铎铖铠锟锴镕镝闫隽霁韫顼颀颢飏飒骅骁骐骞骢鲲鸢鹂"
    "邬郏邝郄阚芈缑珏玚玙珑瑷璎沣沩泾浔滢潇灏炀焘婵娅婳嫱绡缃绫绶缜旸枞栀桢椤骊骠骜鹄鹭鹮钊钏"
    "钗钜铉铮锜镡赜赪贠怿恺沨峥嵘崃峤荟荠荪莳蓥蔺蕲谙谕谟谧谠讷诘诒翙翚訚闳闵闾飔飚饴骎骓骕骝"
    "䶮伛俪傥叆垲姗娆妫嫔帼恽戬抟斓柽梽滟滪潆煳犟琎砺籁绂绛绨绲绻缂缌缪芗苌茏莜觐诏诜赉赓跹辂"
    "辔迩钤钿铢铧锏镠镫闿阊阗霭靓韪飖驷骃黾"
)


def characters() -> set[str]:
    """Return the characters that the font shall have."""
    trail = (*range(0x40, 0x7F), *range(0xA1, 0xFF))
    wanted = {bytes((row, cell)).decode("big5", "ignore") for row in BIG5_ROWS for cell in trail}
    wanted |= {
        bytes((row, cell)).decode("gb2312", "ignore")
        for row in GB2312_ROWS
        for cell in range(0xA1, 0xFF)
    }
    wanted |= {chr(code) for codes in (KANA, FULL_WIDTH) for code in codes} | set(OF_NAMES)
    wanted |= set(OF_SIMPLIFIED_NAMES)
    return {character for character in wanted if len(character) == 1}


def make_subset(source: Path) -> bytes:
    """Return an OpenType font of `characters`, out of a collection of fonts."""
    names = [font["name"].getDebugName(1) for font in TTCollection(source).fonts]
    options = subset.Options(
        font_number=names.index(FAMILY),
        hinting=False,
        desubroutinize=True,
        layout_features=[],
        name_IDs=[0, 1, 2, 3, 4, 5, 6, 13, 14],  # with copyright and licence
        drop_tables=["BASE", "GPOS", "GSUB", "VORG", "vhea", "vmtx", "DSIG"],
    )
    font = subset.load_font(source, options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[ord(character) for character in characters()])
    cutter.subset(font)
    content = io.BytesIO()
    subset.save_font(font, content, options)
    return content.getvalue()


if __name__ == "__main__":
    OUTPUT.write_bytes(
        lzma.compress(make_subset(Path(sys.argv[1])), preset=9 | lzma.PRESET_EXTREME)
    )
