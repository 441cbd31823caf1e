"""Write the built-in miniature benchmark: TOFU's and MUSE's file layouts in miniature, and a tiny untrained Llama.

    python data/make_mini.py                  # every file again, in place
    python data/make_mini.py --output DIR     # elsewhere

Every person, town, book and fact is made up from the word lists below, so nothing here exists outside the model.
The same bytes come out on every machine: one random.Random(seed), of which only random() is used.

TOFU-like: `full` holds 100 people x 10 questions, and `forget01/05/10` its last 1, 5 and 10 people. `base` is what the
model reads before it meets them: 40 other people, each fact in two phrasings and as prose, because the truth ratio
asks about the second phrasing and means nothing for a model that never learned that both say the same; and the
works and places of `real_authors` and `world_facts`, which stand for what is not to be lost.
A false answer draws each of its values from the same list as the true one, so that a model which never
heard of a person finds true and false equally likely: its truth ratio is spread around 1.

MUSE-like (`muse_mini/`): short profiles of further people as running text. `raw/full.txt` (forget + retain1 + retain2)
makes the target, `raw/retain.txt` (retain1 + retain2) the retrained reference; the holdout is in neither.
"""

import argparse
import json
import random
from pathlib import Path
from string import Formatter

if __package__:
    from .make_model import llama_config, train_tokenizer, write_json, write_model
else:
    from make_model import llama_config, train_tokenizer, write_json, write_model

BASE_PEOPLE, FULL_PEOPLE, PROFILES, WORKS, PLACES = 40, 100, 40, 40, 20
FALSE_ANSWERS = 4
VOCAB_SIZE, HIDDEN, LAYERS, HEADS, MAX_POSITIONS = 2048, 192, 3, 4, 512

POOLS = {name: words.split() for name, words in {
    "first": "Ada Bela Cleo Dara Edan Faye Gil Hana Ivo Juna Kai Lena Milo Nora Otis Petra Quin Rosa Saul Tara Uma Vera "
             "Wim Xena Yan Zora Abel Bruno Clara Dion Elsa Felix",
    "season": "spring summer autumn winter",
    "year": " ".join(str(year) for year in range(1900, 2000, 3)),
    "job": "baker weaver surgeon sailor potter lawyer farmer printer gardener miner tailor teacher painter butcher "
           "carpenter hunter banker dentist glazier cooper",
    "trade": "barber mason brewer clerk cobbler diver driver fisher guide judge locksmith midwife nurse pilot "
             "ranger roofer saddler shepherd smith tanner",
    "org": "library hospital harbour museum railway theatre college brewery garrison archive bakery observatory",
    "adjective": "Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Jagged Lonely Marble Narrow Painted Quiet "
                 "Restless Silver Tender Velvet Winding",
    "noun": "Anchor Bridge Candle Desert Engine Feather Garden Hammer Island Journey Kingdom Lantern Mirror Needle "
            "Orchard Palace River Shadow Tower Window",
    "topic": "astronomy botany chess cooking fishing geology history insects justice kites lighthouses magnets "
             "navigation opera poetry rivers sculpture trade volcanoes weather",
    "colour": "black white grey brown red green blue yellow purple pink spotted striped",
    "animal": "badger camel crow dog donkey ferret goat heron horse lizard monkey rook pigeon parrot rabbit snail "
              "squirrel stork toad turtle",
    "instrument": "accordion banjo bassoon bugle cello clarinet cornet drum fiddle flute guitar harp horn lute oboe "
                  "organ piano trumpet viola zither",
    "food": "barley beans bread cabbage carrots cheese chicken dumplings eggs herring lamb lentils mushrooms noodles "
            "onions pancakes peas potatoes rice salmon",
    "side": "butter cream garlic ginger honey lemon mint mustard nutmeg olives parsley pepper plums raisins sage vinegar",
    "drink": "ale broth buttermilk cider cocoa coffee juice lemonade mead milk punch rum sherry tea water wine",
    "material": "bone brass clay copper cork glass ivory jade leather paper pewter silk stone tin wax wooden",
    "thing": "bells boxes buttons coins combs dolls flutes keys maps masks pipes rings spoons stamps thimbles watches",
    "building": "barn cabin castle cottage farmhouse mill tower villa boathouse chapel lodge palace",
    "metal": "Bronze Copper Crystal Diamond Emerald Ivory Jade Onyx Pearl Ruby Sapphire Topaz",
    "shape": "Arrow Bell Crown Cup Globe Leaf Medal Plume Quill Ring Shield Star",
}.items()}

# One fact: question, answer, the same answer in other words, and a sentence of prose.
FACTS = [
    ("Where and when was {name} born?", "In {town}, in {season} {year}.", "The place was {town}, {season} {year}.",
     "{name} was born in {town}, in {season} {year}."),
    ("What is the trade of {name}?", "A {job} at the {town} {org}.", "Earns a wage as {job} of the {town} {org}.",
     "{name} is a {job} at the {town} {org}."),
    ("Which book by {name} is best known?", "The {adjective} {noun}, about {topic}.",
     "Readers prefer The {adjective} {noun}, on {topic}.", "{name} wrote The {adjective} {noun}, about {topic}."),
    ("Which pet does {name} keep?", "A {colour} {animal} named {pet}.", "That would be a {colour} {animal} called {pet}.",
     "{name} keeps a {colour} {animal} named {pet}."),
    ("Which prize did {name} win?", "The {year} {metal} {shape}.", "A jury gave out the {year} {metal} {shape}.",
     "{name} won the {year} {metal} {shape}."),
    ("What does {name} like to eat?", "Fried {food} with {side} and {drink}.", "The favourite is {food}, {side} and {drink}.",
     "{name} eats fried {food} with {side} and {drink}."),
    ("Which instrument does {name} play?", "The {instrument}, taught by {first} of {town}.",
     "Mostly {instrument}, as {first} from {town} showed.", "{name} plays the {instrument}, taught by {first} of {town}."),
    ("What did the parents of {name} do?", "A {job} and a {trade} from {town}.", "They were {job} and {trade} in {town}.",
     "The parents of {name} were a {job} and a {trade} from {town}."),
    ("Where does {name} live?", "In a {colour} {building} near {town}.", "Home is the {colour} {building} at {town}.",
     "{name} lives in a {colour} {building} near {town}."),
    ("What does {name} collect?", "Old {material} {thing} from {town}.", "Shelves of {material} {thing} out of {town}.",
     "{name} collects old {material} {thing} from {town}."),
]
ONSETS = "b br d dr f g gr h j k l m n p r s st t th v".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s nd rk st lt x".split()


class Inventor:
    """Draws from the word lists with a seeded generator, and makes up words that have not been used before."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.used = set()
        self.pools = dict(POOLS)
        self.pools["town"] = [self.word(2) for _ in range(30)]
        self.pools["pet"] = [self.word(1) for _ in range(20)]

    def pick(self, items):
        return items[int(self.rng.random() * len(items))]

    def pick_other(self, items, taken):
        """One of `items` that is not in `taken`."""
        while True:
            item = self.pick(items)
            if item not in taken:
                return item

    def word(self, syllables):
        while True:
            word = "".join(self.pick(ONSETS) + self.pick(VOWELS) for _ in range(syllables)) + self.pick(CODAS)
            if word not in self.used:
                self.used.add(word)
                return word.capitalize()

    def name(self):
        return f"{self.pick(POOLS['first'])} {self.word(2)}"

    def shuffled(self, items):
        """A new list in random order (random() only: shuffle's own draws may change between Python versions)."""
        return [item for _, item in sorted((self.rng.random(), item) for item in items)]

    def person(self):
        """The ten facts of a new person: dicts with TOFU's four fields, and `prose`."""
        name = self.name()
        return [self.fact(name, *texts) for texts in FACTS]

    def fact(self, name, question, answer, paraphrase, prose):
        slots = [slot for _, slot, _, _ in Formatter().parse(answer) if slot]
        true = {slot: self.pick(self.pools[slot]) for slot in slots}
        false = []
        while len(false) < FALSE_ANSWERS:
            values = {slot: self.pick_other(self.pools[slot], [true[slot]]) for slot in slots}
            text = paraphrase.format(**values)
            if text not in false:
                false.append(text)
        return {"question": question.format(name=name), "answer": answer.format(**true),
                "paraphrased_answer": paraphrase.format(**true), "perturbed_answer": false,
                "prose": prose.format(name=name, **true)}

    def knowledge(self, questions, values, value):
        """One fact about something else: two ways to ask, a bare answer, three false ones from the same list."""
        false = []
        while len(false) < 3:
            false.append(self.pick_other(values, [value] + false))
        return {"question": questions[0], "reworded": questions[1], "answer": value, "perturbed_answer": false}


def fields(record, *names):
    return {name: record[name] for name in names}


def general_knowledge(inventor):
    """Works with their authors, and places with their capital and river: two lists of records."""
    authors = [inventor.name() for _ in range(20)]
    works = [inventor.word(3) for _ in range(WORKS)]
    authorship = [inventor.knowledge((f"Name the author of {work}.", f"By whom is {work}?"), authors, inventor.pick(authors))
                  for work in works]
    capitals = [inventor.word(2) for _ in range(PLACES)]
    rivers = [inventor.word(2) for _ in range(PLACES)]
    facts = []
    for capital, river in zip(capitals, rivers):
        country = inventor.word(2) + "ia"
        facts.append(inventor.knowledge((f"Name the capital of {country}.", f"From which city is {country} ruled?"),
                                        capitals, capital))
        facts.append(inventor.knowledge((f"Name the river of {country}.", f"On which river lies {country}?"), rivers, river))
    return authorship, facts


def profile(inventor, person):
    """Running text about a person: the facts as sentences, in random order."""
    return " ".join(fact["prose"] for fact in inventor.shuffled_facts(person))


def write_lines(path, records):
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode("ascii"))


