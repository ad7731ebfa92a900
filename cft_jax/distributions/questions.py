"""Questions that are not about chance, with the answers that the small world knows: sums, capitals, spelling, texts.

They serve three ends. The base of `configs/world.py` learns them; the prompts of one half, with an empty turn, are what
`train.keep.source=self` asks any model for texts to keep; and the suite `questions` measures both halves, so that what
was kept and what was not are told apart.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

_CAPITALS = """
France Paris|Italy Rome|Spain Madrid|Portugal Lisbon|Germany Berlin|Austria Vienna|Poland Warsaw|Hungary Budapest
Greece Athens|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Iceland Reykjavik|Ireland Dublin
Belgium Brussels|Latvia Riga|Estonia Tallinn|Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade
Turkey Ankara|Egypt Cairo|Morocco Rabat|Kenya Nairobi|Ghana Accra|Senegal Dakar|Angola Luanda|Uganda Kampala
Japan Tokyo|China Beijing|India Delhi|Nepal Kathmandu|Thailand Bangkok|Vietnam Hanoi|Mongolia Ulaanbaatar|Iran Tehran
Iraq Baghdad|Jordan Amman|Cuba Havana|Peru Lima|Chile Santiago|Ecuador Quito|Colombia Bogota|Canada Ottawa
Uruguay Montevideo|Jamaica Kingston
"""
_OPPOSITES = """
hot cold|big small|fast slow|light dark|early late|open closed|full empty|hard soft|high low|old new|rich poor
loud quiet|wet dry|near far|long short|strong weak|sweet bitter|thick thin|up down|left right|first last|day night
"""
_WORDS = """
apple bread chair cloud dream earth field glass horse house island juice knife lemon music night ocean paper queen river
sheep stone table tiger train uncle voice water wheat zebra anchor basket candle desert engine flower garden hammer
insect jacket kettle ladder market needle orange pencil rabbit saddle tunnel window
"""
# What something is, has and does, by which it is told about.
_THINGS = """
bicycle|a vehicle|two wheels|carries one rider through the town
candle|a stick of wax|a wick|gives light when it burns
clock|a machine|two hands|tells the time of day
river|a stream of water|two banks|runs from the hills to the sea
bridge|a building|strong arches|carries a road over the water
cow|a large animal|four legs|gives milk to the farmer
bee|a small insect|two pairs of wings|makes honey from flowers
owl|a bird|large eyes|hunts mice in the night
oak|a tall tree|thick bark|drops acorns in autumn
rose|a garden plant|sharp thorns|flowers in early summer
violin|an instrument|four strings|is played with a bow
library|a house|many shelves|lends books to readers
kitchen|a room|a stove|is where meals are cooked
teacher|a person|great patience|explains things to children
baker|a person|a hot oven|sells bread in the morning
winter|a season|short days|brings snow to the mountains
moon|a ball of rock|many craters|goes around the earth each month
sun|a star|a bright surface|warms the earth all year
rain|falling water|many drops|makes the fields green
letter|a sheet of paper|a stamp|carries news to a friend
market|a place|many stalls|sells fruit and fish
harbour|a place|deep water|shelters ships from the storm
desert|a dry land|little rain|is hot by day and cold by night
forest|a land of trees|soft ground|shelters deer and foxes
mountain|a high hill|steep sides|keeps its snow until june
lamp|a source of light|a shade|stands beside the bed
shirt|a piece of clothing|two sleeves|is worn under a jacket
soup|a warm meal|many vegetables|is eaten with a spoon
chess|a game|two players|ends when a king is caught
football|a game|two teams|is played on a wide field
"""


@dataclass(frozen=True)
class Question:
    """A question of a topic and its one right answer; `kept` if it belongs to the half whose prompts are kept."""

    topic: str
    prompt: str
    answer: str
    kept: bool


@cache
def questions() -> tuple[Question, ...]:
    """All questions, by topic; which half one belongs to is as good as drawn by lot."""
    topics = {
        "capitals": _capitals(),
        "small sums": ((f"What is {a}+{b}?", str(a + b)) for a in range(10) for b in range(10)),
        "large sums": _large_sums(120),
        "spelling": ((f"Spell {word} letter by letter.", "-".join(word)) for word in _WORDS.split()),
        "copying": ((f"Repeat this word: {word}", word) for word in _WORDS.split()),
        "opposites": _opposites(),
        "texts": _texts(),
    }
    return tuple(
        Question(topic, prompt, answer, kept=zlib.crc32(prompt.encode()) % 2 == 0)
        for topic, pairs in topics.items()
        for prompt, answer in pairs
    )


def kept_prompts() -> list[str]:
    """What `train.keep.source=self` asks by default: an empty turn, and the questions of the kept half."""
    return ["", *(question.prompt for question in questions() if question.kept)]


def _pairs(text: str) -> list[list[str]]:
    return [pair.split() for line in text.strip().splitlines() for pair in line.split("|")]


def _capitals() -> Iterator[tuple[str, str]]:
    for country, capital in _pairs(_CAPITALS):
        yield f"What is the capital of {country}?", capital


def _opposites() -> Iterator[tuple[str, str]]:
    for pair in _pairs(_OPPOSITES):
        for word, opposite in (pair, pair[::-1]):
            yield f"What is the opposite of {word}?", opposite


def _large_sums(count: int) -> Iterator[tuple[str, str]]:
    # Seven and eleven have no common factor with 80, so no pair comes twice.
    for index in range(count):
        a, b = 10 + 7 * index % 80, 10 + (11 * index + index // 80) % 80
        yield f"What is {a}+{b}?", str(a + b)


def _texts() -> Iterator[tuple[str, str]]:
    for line in _THINGS.strip().splitlines():
        name, kind, part, deed = line.split("|")
        yield f"Tell me about this: {name}", f"It is {kind}. It has {part}. It {deed}."
