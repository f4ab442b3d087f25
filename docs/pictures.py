"""Draw the README's picture of `goldfish show`: python docs/pictures.py TOKENIZER_DIR"""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from transformers import AutoTokenizer

from goldfish import Goldfish
from goldfish.text.show import show

TEXT = (
    "An assignment statement evaluates the expression list and assigns the single resulting "
    "object to each of the target lists, from left to right. Assignment is defined recursively "
    "depending on the form of the target list."
)


def main(tokenizer_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    console = Console(record=True, width=84, file=io.StringIO())
    console.print(show(Goldfish(k=4, h=13), tokenizer, TEXT))
    picture = console.export_svg(title="goldfish show", theme=MONOKAI)
    # rich links its font from a CDN; the picture is to need nothing from elsewhere
    start, end = picture.index("@font-face"), picture.rindex("@font-face")
    end = picture.index("}", end) + 1
    picture = (picture[:start] + picture[end:]).replace("Fira Code", "DejaVu Sans Mono")
    Path(__file__).with_name("show.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
