"""Words to read: common short English words in the text fonts that matplotlib ships."""

from functools import partial
from random import Random

from PIL import Image

from fulmen.data.pictures.drawing import INKS, PAPERS, ask_background, open_font, other, place, write
from fulmen.data.pictures.picture import Picture, Question

# Of matplotlib's fonts, those that hold the Latin letters and no mathematics.
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)
FONT_SIZES = (24, 44)

LIST = """
able acid air also area arm army art aunt away baby back bad bag ball band bank base bath bean bear bed bell best big
bird blue boat body bone book boot born both bowl box boy bread brick bring brown bus busy cake calm camp car card
care case cat chair child city clay clean clock cloud coal coat cold cook corn cow crowd cup cut dark day deep deer
desk dish dog door down dream dress drive drop drum dry duck dust ear earth east easy edge egg end even eye face fact
fair fall far farm fast fear feet field fine fire fish flag flat floor fly fog food foot fork four fox free fresh frog
fruit full game gate gift girl give glad glass goat gold good grain grass green grow guest hair half hall hand happy
hard hat hay head hear heart help hen high hill hold home hope horn horse hot hour house ice ink iron join joy juice
jump keep key kind king kite knee lake lamp land large last late lead leaf left leg lemon life light line lion list
lock long lost love low luck lunch mail make man map mark meal meat mice milk mine mist moon more moth mouse mouth
much mud music nail name near neck nest net new news night nine noise north nose note oak ocean oil old one open oven
owl page paint pair pan paper park part path pear pen pie pig pink plan plate play poem pond pool poor post pot queen
quick quiet rain read red rest rice rich ride ring river road rock roof room root rope rose round row rule run safe
salt sand sea seat seed seven shade sheep ship shirt shoe shop short silk sing six sky sleep slow small smile snow
soap song soup south spoon star stone storm sun sweet table tail tall tea ten tent tiger time toast tooth top town toy
train tree true two van view voice wagon walk wall warm wave way west wheel white wide wind wing wolf wood word work
yard year young zebra zero
"""
WORDS = tuple(LIST.split())


class WordPictures:
    """A picture of each word in each font, by words first."""

    def __len__(self) -> int:
        return len(WORDS) * len(FONTS)

    def name_of(self, number: int) -> str:
        word, font = divmod(number, len(FONTS))
        return f"words/{WORDS[word]}/{FONTS[font]}"

    def example(self, number: int, variant: int) -> Picture:
        word, font = divmod(number, len(FONTS))
        rng = Random(f"{self.name_of(number)}#{variant}")
        text, ink, paper = WORDS[word], rng.choice(list(INKS)), rng.choice(list(PAPERS))
        read = rng.choice(("Read the word.", "Which word is written here?", "What does it say?"))
        first = rng.choice(("What is its first letter?", "Which letter does the word begin with?"))
        questions = (
            Question(read, text, other(rng, WORDS, text)),
            ask_background(rng, paper),
            Question(first, text[0], other(rng, "abcdefghijklmnopqrstuvwxyz", text[0])),
            Question("How many letters does it have?", str(len(text)), other(rng, "2345", str(len(text)))),
        )
        caption, refined = f"text, word, {text}", f'The word "{text}".'
        draw = partial(_draw, text, FONTS[font], ink, paper, rng.random())
        return Picture(self.name_of(number), caption, refined, questions, draw)


def _draw(text: str, font: str, ink: str, paper: str, seed: float) -> Image.Image:
    rng = Random(seed)
    figure = write(text, open_font(font, rng.randint(*FONT_SIZES)), INKS[ink])
    size = int(figure.width * rng.uniform(1.1, 1.5)), int(figure.height * rng.uniform(1.4, 2.2))
    return place(figure, size, PAPERS[paper], rng, angle=6, smallest=0.8)
