"""The words of the small world: everything the grammar can write and everything the reward knows."""

from __future__ import annotations

KINDS: dict[str, tuple[str, ...]] = {
    "film": ("plot", "acting", "music", "ending", "dialogue", "camera work", "opening", "cast"),
    "restaurant": ("soup", "bread", "service", "dessert", "wine", "fish", "menu", "coffee"),
    "book": ("prose", "story", "hero", "last chapter", "humor", "cover", "villain", "first page"),
    "hotel": ("bed", "breakfast", "view", "lobby", "pool", "staff", "garden", "shower"),
    "game": ("combat", "map", "sound", "tutorial", "final level", "controls", "puzzle design", "artwork"),
}

FACTS: dict[str, tuple[str, ...]] = {
    "film": (
        "It runs for about two hours.",
        "The room was half full.",
        "The director also wrote the script.",
        "We saw it on a {day} with {people}.",
    ),
    "restaurant": (
        "It stands near the old station.",
        "The kitchen closes at ten.",
        "Our table was by the window.",
        "We ate there on a {day} with {people}.",
    ),
    "book": (
        "It has about three hundred pages.",
        "The author lives by the sea.",
        "It is the second part of a series.",
        "I read it on a {day} between two trains.",
    ),
    "hotel": (
        "It has forty rooms and one lift.",
        "The beach is a short walk away.",
        "Our room was on the third floor.",
        "We arrived on a {day} with {people}.",
    ),
    "game": (
        "It takes about ten hours to finish.",
        "You play as a young sailor.",
        "It came out two years ago.",
        "I played it on a {day} with {people}.",
    ),
}

OPINIONS = (
    "The {aspect} was {quality}.",
    "I {feeling} the {aspect}.",
    "The {aspect} was {quality} and the {aspect} was {quality}.",
    "The {aspect} was {quality}, but the {aspect} was {contrast}.",
    "I {feeling} the {aspect} and found the {aspect} {quality}.",
    "What stayed with us was the {quality} {aspect}.",
)

VERDICTS = (
    "In the end it was {quality}.",
    "We left {mood} and talked about it for days.",
    "I told {people} that it was {quality}.",
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PEOPLE = ("my sister", "two friends", "my parents", "our neighbors", "the children", "a colleague")

# What each opinion word is worth. Words of one class are interchangeable in a sentence.
QUALITIES: dict[str, float] = {
    **dict.fromkeys(("superb", "wonderful", "brilliant", "splendid", "delightful", "perfect"), 2.0),
    **dict.fromkeys(("good", "charming", "clever", "fresh", "lovely", "pleasant", "solid", "warm"), 1.0),
    **dict.fromkeys(("bad", "bland", "clumsy", "dull", "poor", "stale", "tired", "weak"), -1.0),
    **dict.fromkeys(("terrible", "horrible", "dreadful", "dismal", "miserable", "hopeless"), -2.0),
}
FEELINGS: dict[str, float] = {
    "loved": 2.0, "adored": 2.0, "liked": 1.0, "enjoyed": 1.0,
    "hated": -2.0, "detested": -2.0, "disliked": -1.0, "regretted": -1.0,
}  # fmt: skip
MOODS: dict[str, float] = {"happy": 1.0, "smiling": 1.0, "annoyed": -1.0, "disappointed": -1.0}
LEXICON: dict[str, float] = {**QUALITIES, **FEELINGS, **MOODS}

NEGATORS = ("not", "never")
STRENGTHENER = "very"

NAME_FIRST = (
    "Quiet", "Silver", "Lost", "Golden", "Hidden", "Broken", "Distant", "Little",
    "Burning", "Winter", "Paper", "Crooked", "Blue", "Salt", "Hollow", "Early",
    "Glass", "Northern", "Second", "Velvet", "Iron", "Painted", "Sleeping", "Wild",
)  # fmt: skip
NAME_LAST = (
    "Harbor", "Garden", "Lantern", "Bridge", "Orchard", "Tower", "Mirror", "Compass",
    "Island", "Station", "Valley", "Crown", "Letter", "Kitchen", "River", "Sparrow",
    "Anchor", "Market", "Staircase", "Violin", "Window", "Forest", "Clock", "Road",
)  # fmt: skip
