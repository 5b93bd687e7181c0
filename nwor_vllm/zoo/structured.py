"""Chats whose replies follow from their form: code, JSON, arithmetic, retrieval."""

from __future__ import annotations

import json
import random

from nwor_vllm.zoo import lexicon as lex

Turn = tuple[str, str]

_CODE_ASKS = (
    "Write a Python class {cls} with the fields {fields}.",
    "Please implement {cls} in Python. It has {fields}.",
    "I need a small Python class called {cls} that stores {fields}.",
)


def code(rng: random.Random) -> Turn:
    noun = rng.choice(lex.CODE_NOUNS)
    cls = noun.capitalize()
    fields = rng.sample(lex.CODE_FIELDS, rng.randint(2, 4))
    ask = rng.choice(_CODE_ASKS).format(cls=cls, fields=", ".join(fields))
    lines = ["```python", f"class {cls}:", f"    def __init__(self, {', '.join(fields)}):"]
    lines += [f"        self.{field} = {field}" for field in fields]
    for field in fields:
        lines += ["", f"    def get_{field}(self):", f"        return self.{field}"]
        lines += ["", f"    def set_{field}(self, {field}):", f"        self.{field} = {field}"]
    lines += ["", "    def to_dict(self):", "        return {"]
    lines += [f'            "{field}": self.{field},' for field in fields]
    lines += ["        }", "", "", f"def load_{noun}(data):", f"    return {cls}("]
    lines += [f'        {field}=data["{field}"],' for field in fields]
    lines += ["    )", "```"]
    return ask, "\n".join(lines)


def json_reply(rng: random.Random) -> Turn:
    people = [_person(rng) for _ in range(rng.randint(2, 3))]
    described = " ".join(
        f"{p['name']} is {p['age']}, lives in {p['city']} and works in {p['department']}." for p in people
    )
    ask = rng.choice(("Convert to JSON: ", "Return this as a JSON list. ", "Extract the people as JSON. ")) + described
    return ask, json.dumps(people, indent=2)


def _person(rng: random.Random) -> dict[str, str | int]:
    return {
        "name": f"{rng.choice(lex.FIRST_NAMES)} {rng.choice(lex.LAST_NAMES)}",
        "age": rng.randint(20, 79),
        "city": rng.choice(lex.CITIES),
        "department": rng.choice(lex.DEPARTMENTS),
    }


def arithmetic(rng: random.Random) -> Turn:
    numbers = [rng.randint(11, 99) for _ in range(rng.randint(4, 6))]
    ask = rng.choice(("Add these step by step: ", "What is the sum? Show the steps: ", "Compute slowly: "))
    lines, total = ["Let us add one number at a time."], numbers[0]
    for step, number in enumerate(numbers[1:], 1):
        tens, ones = number // 10 * 10, number % 10
        lines.append(f"Step {step}: {total} + {number}.")
        lines.append(f"First {total} + {tens} = {total + tens}, then {total + tens} + {ones} = {total + number}.")
        total += number
    lines.append(f"The sum is {total}.")
    return ask + " + ".join(map(str, numbers)), "\n".join(lines)


def retrieval(rng: random.Random) -> Turn:
    names = rng.sample(lex.FIRST_NAMES, 6)
    rows = {
        name: (rng.choice(lex.CITIES), rng.choice(lex.DEPARTMENTS), rng.choice(lex.COLOURS), rng.randint(100, 999))
        for name in names
    }
    asked = rng.sample(names, 3)
    table = "\n".join(
        f"{name}: {city}, {dept}, {colour}, room {room}" for name, (city, dept, colour, room) in rows.items()
    )
    verbs = ("is based in", "works from", "sits in")
    lines = []
    for name in asked:
        city, dept, colour, room = rows[name]
        where, team = f"{name} {rng.choice(verbs)} {city}", f"belongs to the {dept} team"
        badge, place = f"carries a {colour} badge", f"uses room {room}"
        parts = [team, badge, place]
        rng.shuffle(parts)
        lines.append(f"{where}, {parts[0]}, {parts[1]} and {parts[2]}.")
    return f"{table}\nDescribe {asked[0]}, {asked[1]} and {asked[2]}.", "\n".join(lines)
