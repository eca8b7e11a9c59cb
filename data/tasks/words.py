"""Words, numbers and sentences of generated text."""

from .draws import Draws

_ADJECTIVES = """
amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow open pale quiet rapid silent tidy
upper vivid warm young zealous bitter clever distant early fierce golden humble idle jagged kind lonely misty noble odd
plain quick rough sharp tender urban vast wild bold crisp deep even fresh grand high jade large mild neat oval proud
rare slow thin wide
"""
_NOUNS = """
anchor bridge candle desert engine forest garden harbor island jacket kettle ladder meadow needle orchard pencil quarry
river saddle tunnel umbrella valley window yard basket canyon drum falcon glacier hammer insect journal kitten lantern
mirror nest ocean palace quilt rocket shadow temple uncle violin whistle acorn bottle castle dolphin eagle feather gate
helmet ivory jungle kingdom lemon marble nut onion pepper ribbon spoon turtle
"""
_VERBS = "carries finds follows greets hides keeps leaves meets needs paints sees turns watches"
ADJECTIVES, NOUNS, VERBS = (words.split() for words in (_ADJECTIVES, _NOUNS, _VERBS))

NOISE = "Rain falls on the hills. Wind moves the tall grass. A boat waits at the pier. It comes and it goes.\n"
"""The paragraph that is repeated as noise."""


def two_words(draws: Draws) -> str:
    """Return an adjective and a noun, as the keys of needles are."""
    return f"{draws.choice(ADJECTIVES)}-{draws.choice(NOUNS)}"


def made_up_word(draws: Draws) -> str:
    """Return a word of three syllables that can be spoken."""
    return "".join(draws.choice("bdfgklmnprstvz") + draws.choice("aeiou") for _ in range(3))


def sentence(draws: Draws) -> str:
    """Return a sentence about things."""
    first, second = (f"the {draws.choice(ADJECTIVES)} {draws.choice(NOUNS)}" for _ in range(2))
    return f"{first.capitalize()} {draws.choice(VERBS)} {second}.\n"
