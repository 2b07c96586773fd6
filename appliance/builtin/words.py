"""Word lists of the task generators: plain ASCII, so that the tokenizer can learn each word as one token."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# 64 × 96 pairs are the keys of the recall task.
ADJECTIVES: tuple[str, ...] = _words("""
amber ancient azure bitter bold brave bright brisk calm clever coral cosmic crimson curly dusty eager early electric
emerald faint fancy fierce frosty gentle giant golden grand happy hidden hollow humble icy ivory jolly keen little
lively lucky lunar marble mellow misty modest noble olive patient polar proud purple quick quiet rapid royal rusty
scarlet secret silent silver smooth solar stormy swift velvet wild
""")

NOUNS: tuple[str, ...] = _words("""
anchor badger bamboo barrel beacon beetle bishop blossom bottle bridge bucket camel candle canyon castle cedar
cherry cloud comet copper cricket crystal dagger desert dolphin dragon eagle engine falcon feather fiddle forest
fossil fountain galaxy garden glacier goose granite guitar hammer harbor hawk helmet hornet island jacket jaguar
jungle kettle kitten ladder lantern lemon lizard lobster magnet maple meadow mirror monkey mountain needle orchid
otter oyster panda parrot pebble pencil pepper pigeon pirate planet pocket prairie puzzle rabbit raven ribbon river
rocket saddle salmon shadow spider sparrow statue sunset temple thunder tiger tunnel turtle violin walnut
""")

# Further words of the copying task; the values of the recall task.
OTHERS: tuple[str, ...] = _words("""
above across again almost along always answer apple around arrive basket become before begin behind below between
beyond bread bring build butter carry center chair change child circle clean climb close coffee color corner cotton
cover cream cross dance decide deep deliver dinner doctor double dream drive earth
""")

GIVEN_NAMES: tuple[str, ...] = _words("""
Ada Alan Alice Amina Boris Carla Chen Clara Daniel Diego Edgar Elena Emma Felix Fiona Grace Hana Hugo Igor Ines Ivan
Jonas Julia Karl Kofi Lena Leo Linus Lucia Maria Martin Maya Milan Nadia Nina Noah Olga Omar Oscar Paula Peter Priya
Rosa Ruth Samir Sofia Tara Tomas Vera Victor Yuki Zoe
""")

FAMILY_NAMES: tuple[str, ...] = _words("""
Adler Baker Berg Castro Costa Dubois Fischer Garcia Hansen Hopper Ito Jensen Keller Kim Kovacs Lang Lopez Meyer
Moreau Nakamura Novak Okafor Olsen Patel Petrov Reyes Rossi Sato Silva Singh Tanaka Torres Turing Vogel Wagner Weber
Wong Young
""")

CITIES: tuple[str, ...] = _words("""
Accra Athens Berlin Bogota Boston Cairo Chicago Dublin Geneva Hamburg Hanoi Helsinki Istanbul Jakarta Kyoto Lagos
Lima Lisbon London Madrid Manila Mumbai Munich Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney
Tokyo Toronto Vienna Warsaw Zagreb Zurich
""")

COUNTRIES: tuple[str, ...] = _words("""
Brazil Canada Chile Denmark Egypt Finland France Germany Ghana Greece India Ireland Italy Japan Kenya Mexico Nigeria
Norway Peru Poland Portugal Spain Sweden Turkey Vietnam
""")

COLORS: tuple[str, ...] = ("black", "blue", "brown", "gray", "green", "orange", "pink", "red", "white", "yellow")

COPY_WORDS: tuple[str, ...] = ADJECTIVES + NOUNS + OTHERS
