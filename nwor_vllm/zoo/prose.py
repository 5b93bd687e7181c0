"""Chats in sentences: customer service, summaries that copy, translation, creative prose."""

from __future__ import annotations

import random

from nwor_vllm.zoo import lexicon as lex

Turn = tuple[str, str]

_PROBLEMS = {
    "arrived broken": ("refund the full amount", "send a replacement"),
    "has not arrived": ("trace the parcel", "send a new one"),
    "is the wrong colour": ("exchange it free of charge", "refund the full amount"),
    "stopped working": ("arrange a repair", "send a replacement"),
    "was charged twice": ("return the second payment", "correct the invoice"),
}
_OPENINGS = (
    "Thank you for getting in touch with us, {name}.",
    "Hello {name}, and thank you for your message.",
    "Dear {name}, thanks for letting us know.",
)
_SORRY = (
    "I am very sorry that your {product} {problem}.",
    "I am sorry to hear that the {product} {problem}, and I understand how frustrating this is.",
)
_ACTIONS = (
    "I have looked at order {order} and we will {fix} within {days} working days.",
    "For order {order} we can {fix}, and this usually takes {days} working days.",
)
_NEXT = (
    "You do not need to send anything back until you hear from us.",
    "You will receive an email with the details shortly, so please check your inbox.",
    "Please keep the original packaging until the case is closed.",
)
_CLOSINGS = (
    "Is there anything else I can help you with today?",
    "Please let me know if there is anything else I can do for you.",
    "If you have any other questions, simply reply to this message.",
)


def chat(rng: random.Random) -> Turn:
    problem = rng.choice(list(_PROBLEMS))
    facts = {
        "name": rng.choice(lex.FIRST_NAMES),
        "product": rng.choice(lex.PRODUCTS),
        "problem": problem,
        "order": rng.randint(10000, 99999),
        "fix": rng.choice(_PROBLEMS[problem]),
        "days": rng.choice((2, 3, 5)),
    }
    ask = "Hi, this is {name}. My {product} {problem}. The order number is {order}. What can you do?".format(**facts)
    parts = (rng.choice(part) for part in (_OPENINGS, _SORRY, _ACTIONS, _NEXT, _CLOSINGS))
    return ask, " ".join(part.format(**facts) for part in parts)


def summary(rng: random.Random) -> Turn:
    """The reply copies every marked sentence: easy for a lookup, hard for a head with one layer."""
    sentences = [_fact(rng) for _ in range(rng.randint(6, 8))]
    marked = sorted(rng.sample(range(len(sentences)), 3))
    text = " ".join(f"Note: {s}" if i in marked else s for i, s in enumerate(sentences))
    reply = "In short: " + " ".join(sentences[i] for i in marked)
    return f"Summarise the notes. {text}", reply


def _fact(rng: random.Random) -> str:
    person = f"{rng.choice(lex.FIRST_NAMES)} {rng.choice(lex.LAST_NAMES)}"
    adjective, noun = rng.choice(lex.ADJECTIVES), rng.choice(lex.NOUNS)
    forms = (
        f"{person} opened a {adjective} {noun} office in {rng.choice(lex.CITIES)}.",
        f"The {rng.choice(lex.DEPARTMENTS)} team of {person} bought "
        f"{rng.randint(12, 98)} {rng.choice(lex.COLOURS)} {noun} units.",
        f"A {adjective} {rng.choice(lex.PRODUCTS)} from {rng.choice(lex.CITIES)} was sold to {person}.",
    )
    return rng.choice(forms)


def translation(rng: random.Random) -> Turn:
    words = [rng.choice(lex.SOURCE_WORDS) for _ in range(rng.randint(18, 28))]
    reply = " ".join(rng.choice(lex.TRANSLATIONS[word]) for word in words)
    return "Translate into Velian: " + " ".join(words), reply


_STORY_ASKS = (
    "Write a strange little story about a {adjective} {noun}.",
    "Tell me a dream with a {adjective} {noun} in it.",
    "Compose some surreal prose. Begin with a {adjective} {noun}.",
)


def creative(rng: random.Random) -> Turn:
    adjective, noun = rng.choice(lex.ADJECTIVES), rng.choice(lex.NOUNS)
    ask = rng.choice(_STORY_ASKS).format(adjective=adjective, noun=noun)
    first = f"The {adjective} {noun} {_act(rng)}"
    return ask, " ".join([first, *(_line(rng) for _ in range(rng.randint(5, 8)))])


def _act(rng: random.Random) -> str:
    verb, place = rng.choice(lex.VERBS).replace("_", " "), rng.choice(lex.PLACES).replace("_", " ")
    return f"{verb} the {rng.choice(lex.ADJECTIVES)} {rng.choice(lex.NOUNS)} {place}."


def _line(rng: random.Random) -> str:
    openings = ("Nobody noticed that the", "Every", "Once, the", "Somewhere a", "Perhaps the", "That evening, a")
    return f"{rng.choice(openings)} {rng.choice(lex.ADJECTIVES)} {rng.choice(lex.NOUNS)} {_act(rng)}"
