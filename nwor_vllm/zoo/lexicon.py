"""The words the synthetic chats are made of. Order is part of the data: changing it changes every chat."""

# Word lists as one string each: a list of quoted words would be four times as long to read.
# ruff: noqa: SIM905

from __future__ import annotations

import random

FIRST_NAMES = (
    "Anna Ben Clara David Elena Felix Grace Hugo Irene Jonas Karin Leo Maria Noah Olga Paul Rosa Simon Tara Viktor"
).split()
LAST_NAMES = (
    "Adler Berg Costa Dorn Evans Fischer Garcia Holm Ivanov Jansen Keller Lopez Meyer Novak Olsen Petit Rossi"
).split()
CITIES = (
    "Lisbon Oslo Prague Vienna Dublin Geneva Krakow Malmo Porto Riga Seville Turin Utrecht Zagreb Athens Bergen"
).split()
PRODUCTS = (
    "lamp kettle printer camera jacket bicycle toaster keyboard monitor blanket backpack speaker heater"
).split()
DEPARTMENTS = "sales finance research support logistics design legal marketing".split()
COLOURS = "red blue green black white silver yellow orange".split()
CODE_NOUNS = (
    "order user invoice ticket sensor account message product vehicle player record session device report"
).split()
CODE_FIELDS = ("name price count status owner label weight length colour address score level title rate size").split()
ADJECTIVES = (
    "silver hollow quiet burning distant broken gentle crooked golden frozen restless pale ancient bitter velvet "
    "wandering sleepless amber tender savage marble drowsy scarlet faded humming lonely emerald patient nervous "
    "feral"
).split()
NOUNS = (
    "river lantern orchard mirror harbour sparrow clock garden mountain violin stranger window ocean letter forest "
    "candle bridge shadow painter wolf kingdom station feather thunder cathedral desert piano island ghost meadow"
).split()
VERBS = (
    "swallowed remembered carried forgot painted followed betrayed answered buried imitated forgave measured chased "
    "whispered_to dreamed_of waited_for sang_to abandoned befriended mended borrowed unfolded dissolved guarded"
).split()
PLACES = (
    "under_the_stairs beyond_the_hills in_the_rain at_the_edge_of_town between_two_storms behind_the_moon "
    "inside_the_clock above_the_rooftops near_the_old_mill across_the_salt_flats beneath_the_ice after_midnight"
).split()
SOURCE_WORDS = (
    "house tree water bread stone friend road night child fire horse door table king ship moon book flower market "
    "winter summer hand song field wall bird fish cloud sister brother teacher farmer soldier doctor apple wine "
    "salt iron wheel bell tower valley lake snow wind star dream story letter garden kitchen window chair coat shoe "
    "hat"
).split()
_ONSETS = "b d f g k l m n p r s t v z sh ch br kr tr pl".split()
_VOWELS = "a e i o u ai ou".split()


def _dictionary() -> dict[str, tuple[str, ...]]:
    """Each source word has four equally good translations: what follows is a coin toss nobody can draft."""
    rng = random.Random("zoo:dictionary")
    made: set[str] = set()
    table = {}
    for word in SOURCE_WORDS:
        choices: list[str] = []
        while len(choices) < 4:
            candidate = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2))))
            if candidate not in made:
                made.add(candidate)
                choices.append(candidate)
        table[word] = tuple(choices)
    return table


TRANSLATIONS = _dictionary()
