"""Words, numbers and sentences of generated text."""

from .draws import Draws, different

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


def made_up_words(draws: Draws, count: int) -> list[str]:
    """Return `count` different words that can be spoken, of three syllables, or of more if those are too few.

    There are at least twice as many words of that number of syllables, so that new ones are drawn soon.
    """
    consonants, vowels, syllables = "bdfgklmnprstvz", "aeiou", 3
    while (len(consonants) * len(vowels)) ** syllables < 2 * count:
        syllables += 1
    return different(lambda: "".join(draws.choice(consonants) + draws.choice(vowels) for _ in range(syllables)), count)


def sentence(draws: Draws) -> str:
    """Return a sentence about things."""
    first, second = (f"the {draws.choice(ADJECTIVES)} {draws.choice(NOUNS)}" for _ in range(2))
    return f"{first.capitalize()} {draws.choice(VERBS)} {second}.\n"
