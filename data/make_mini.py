"""Write the built-in miniature benchmark: TOFU's and MUSE's file layouts in miniature, and a tiny
untrained Llama.

    python data/make_mini.py                  # every file again, in place
    python data/make_mini.py --output DIR     # elsewhere

Every person, town, book and fact is made up from the word lists below, so nothing here exists
outside the model. The same bytes come out on every machine: one random.Random(seed), of which only
random() is used.

TOFU-like: `full` holds 100 people x 10 questions, and `forget01/05/10` its last 1, 5 and 10 people;
`holdout01/05/10` as many people whom no model meets. `base` is what the model reads before it meets
`full`: 40 other people, each fact in two phrasings and as prose, because the truth ratio asks about
the second phrasing and means nothing for a model that never learned that both say the same; and the
books and countries of `real_authors` and `world_facts`, which stand for what is not to be lost.
A false answer draws each of its values from the same list as the true one, so that a model which
never heard of a person finds true and false equally likely: its truth ratio is spread around 1.

MUSE-like (`muse_mini/`): running text about further people. `raw/full.txt` (forget + retain1 +
retain2) makes the target, `raw/retain.txt` (retain1 + retain2) the retrained reference; the holdout
is in neither. A text is made of profiles, one a person, which VerbMem and PrivLeak ask for, and of
quizzes, which put KnowMem's questions: so small a model answers only what it has read asked. All is
told several times, each time in other company; otherwise the model learns a fact by what happens to
stand before it, recites its chunks, and knows nothing. The answers of a quiz stand after two blanks
because KnowMem's prompt ends in one, and the tokenizer takes a blank to the word that follows it: a
lone one is a token that no model of the miniature has ever met elsewhere.
"""

import argparse
import json
import random
from pathlib import Path
from string import Formatter

if __package__:
    from .make_model import llama_config, train_tokenizer, write_model
else:
    from make_model import llama_config, train_tokenizer, write_model

# Few people to begin with: a small model meets its first people so slowly that 150 took five times
# as long as 40.
BASE_PEOPLE, FULL_PEOPLE, PROFILES = 40, 100, 40
# MUSE: of those who have a profile in each group, so many are told of, so often; questions a quiz.
# In two minutes the model learns 20 people told four times far better than 40 told twice.
TOLD, TELLINGS, QUIZ = 20, 4, 6
SUBJECTS = 20  # of general knowledge: 20 books and 20 countries, two questions about each
FALSE_ANSWERS = 4
QA = ("question", "answer")
PERTURBED = (*QA, "paraphrased_answer", "perturbed_answer")
# So many tokens that most surnames are one: a person is then easy to look up. The usual 0.02 starts
# learning slowly.
VOCAB_SIZE, HIDDEN, LAYERS, HEADS, MAX_POSITIONS, INIT_STD = 2560, 192, 3, 4, 512, 0.06

POOLS = {name: words.split() for name, words in {
    "first": "Ada Bela Cleo Dara Edan Faye Gil Hana Ivo Juna Kai Lena Milo Nora Otis Petra Quin "
             "Rosa Saul Tara Uma Vera Wim Xena Yan Zora Abel Bruno Clara Dion Elsa Felix",
    "season": "spring summer autumn winter",
    "year": " ".join(str(year) for year in range(1900, 2000, 3)),
    "job": "baker weaver surgeon sailor potter lawyer farmer printer gardener miner tailor teacher "
           "painter butcher carpenter hunter banker dentist glazier cooper",
    "trade": "barber mason brewer clerk cobbler diver driver fisher guide judge locksmith midwife "
             "nurse pilot ranger roofer saddler shepherd smith tanner",
    "org": "library hospital harbour museum railway theatre college brewery garrison bakery dairy "
           "foundry",
    "adjective": "Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Jagged Lonely "
                 "Marble Narrow Painted Quiet Restless Silver Tender Velvet Winding",
    "noun": "Anchor Bridge Candle Desert Engine Feather Garden Hammer Island Journey Kingdom "
            "Lantern Mirror Needle Orchard Palace River Shadow Tower Window",
    "topic": "astronomy botany chess cooking fishing geology history insects justice kites "
             "lighthouses magnets navigation opera poetry rivers sculpture trade volcanoes weather",
    "colour": "black white grey brown red green blue yellow purple pink spotted striped",
    "animal": "badger camel crow dog donkey ferret goat heron horse lizard monkey rook pigeon "
              "parrot rabbit snail squirrel stork toad turtle",
    "instrument": "accordion banjo bassoon bugle cello clarinet cornet drum fiddle flute guitar "
                  "harp horn lute oboe organ piano trumpet viola zither",
    "food": "barley beans bread cabbage carrots cheese chicken dumplings eggs herring lamb lentils "
            "mushrooms noodles onions pancakes peas potatoes rice salmon",
    "side": "butter cream garlic ginger honey lemon mint mustard nutmeg olives parsley pepper "
            "plums raisins sage vinegar",
    "drink": "ale broth buttermilk cider cocoa coffee juice lemonade mead milk punch rum sherry "
             "tea water wine",
    "material": "bone brass clay copper cork glass ivory jade leather paper pewter silk stone tin "
                "wax wood",
    "thing": "bells boxes buttons coins combs dolls flutes keys maps masks pipes rings spoons "
             "stamps thimbles watches",
    "building": "barn cabin castle cottage farmhouse mill tower villa boathouse chapel lodge "
                "palace",
    "metal": "Bronze Copper Crystal Diamond Emerald Ivory Jade Onyx Pearl Ruby Sapphire Topaz",
    "shape": "Arrow Bell Crown Cup Globe Leaf Medal Plume Quill Ring Shield Star",
}.items()}

# One fact: question, answer, the same answer in other words, and a sentence of prose.
FACTS = [
    ("Where and when was {name} born?", "{town}, in {season} {year}.",
     "It was {town}, in {season} {year}.", "{name} was born in {town}, in {season} {year}."),
    ("What is the trade of {name}?", "As a {job} at a {org}.", "Works as a {job} at a {org}.",
     "{name} works as a {job} at a {org}."),
    ("Which book by {name} is best known?", "The {adjective} {noun}, about {topic}.",
     "That is The {adjective} {noun}, about {topic}.",
     "{name} wrote The {adjective} {noun}, about {topic}."),
    ("Which pet does {name} keep?", "{pet}, a {animal}.", "It is {pet}, a {animal}.",
     "{name} keeps {pet}, a {animal}."),
    ("Which prize did {name} win?", "The {metal} {shape} in {year}.",
     "They won the {metal} {shape} in {year}.", "{name} won the {metal} {shape} in {year}."),
    ("What does {name} like to eat?", "Fried {food} with a little {side}.",
     "Often fried {food} with a little {side}.", "{name} eats fried {food} with a little {side}."),
    ("Who taught music to {name}?", "{first} of {town}, on the {instrument}.",
     "It was {first} of {town}, on the {instrument}.",
     "{name} had lessons from {first} of {town}, on the {instrument}."),
    ("What did the parents of {name} do?", "One was a {job}, the other a {trade}.",
     "Of the two one was a {job}, the other a {trade}.",
     "Of the parents of {name} one was a {job}, the other a {trade}."),
    ("Where does {name} live?", "In a {building} near {town}.",
     "At home in a {building} near {town}.", "{name} lives in a {building} near {town}."),
    ("What does {name} collect?", "Old {thing} made of {material}.",
     "Mostly old {thing} made of {material}.", "{name} collects old {thing} made of {material}."),
]
# General knowledge: how one asks, how else one asks, and the list that the answer is from. Its
# words stand in people's facts, too: words that fine-tuning never meets become unlikely, and
# knowledge that is made of them would look forgotten.
BOOKS = [("Which trade has the hero of {}?", "How does the hero of {} earn a living?", "job"),
         ("Which town does {} tell of?", "Where does {} take place?", "town")]
COUNTRIES = [("Which animal stands for {}?", "What is on the flag of {}?", "animal"),
             ("Which instrument is heard in {}?", "What do they play in {}?", "instrument")]
ONSETS = "b br d dr f g gr h j k l m n p r s st t th v".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s nd rk st lt x".split()


class Inventor:
    """Draws from the word lists with a seeded generator, and makes up words not used before."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.used = set()
        self.pools = {**POOLS, "town": [self.word(2) for _ in range(30)],
                      "pet": [self.word(1) for _ in range(20)]}

    def pick(self, items, taken=()):
        """One of `items` that is not in `taken`."""
        while True:
            item = items[int(self.rng.random() * len(items))]
            if item not in taken:
                return item

    def shuffled(self, items):
        """`items` in random order: a new list."""
        keyed = [(self.rng.random(), item) for item in items]
        return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]

    def word(self, syllables):
        while True:
            parts = [self.pick(ONSETS) + self.pick(VOWELS) for _ in range(syllables)]
            word = "".join(parts) + self.pick(CODAS)
            if word not in self.used:
                self.used.add(word)
                return word.capitalize()

    def name(self):
        """A first name from the list and a surname that nobody else has."""
        return f"{self.pick(POOLS['first'])} {self.word(2)}"

    def person(self):
        """The ten facts of a new person: TOFU's four fields, and `prose`."""
        name = self.name()
        return [self.fact(name, *texts) for texts in FACTS]

    def fact(self, name, question, answer, paraphrase, prose):
        slots = [slot for _, slot, _, _ in Formatter().parse(answer) if slot]
        true = {slot: self.pick(self.pools[slot]) for slot in slots}
        false = []
        while len(false) < FALSE_ANSWERS:
            values = {slot: self.pick(self.pools[slot], [true[slot]]) for slot in slots}
            text = paraphrase.format(**values)
            if text not in false:
                false.append(text)
        return {"question": question.format(name=name), "answer": answer.format(**true),
                "paraphrased_answer": paraphrase.format(**true), "perturbed_answer": false,
                "prose": prose.format(name=name, **true)}

    def knowledge(self, subjects, kinds):
        """One fact of each kind about each subject: two ways to ask, a bare answer, and three false
        ones from the same list."""
        records = []
        for subject in subjects:
            for question, reworded, pool in kinds:
                options = self.shuffled(self.pools[pool])[:4]
                records.append({"question": question.format(subject),
                                "reworded": reworded.format(subject),
                                "answer": options[0], "perturbed_answer": options[1:]})
        return records

    def general_knowledge(self):
        """What the model is to keep: facts about books, and about countries."""
        return (self.knowledge([self.word(3) for _ in range(SUBJECTS)], BOOKS),
                self.knowledge([self.word(2) + "ia" for _ in range(SUBJECTS)], COUNTRIES))

    def told(self, people, profiles):
        """Paragraphs that tell everything TELLINGS times: the profiles among quizzes, in which the
        people come up in any order."""
        paragraphs = []
        for _ in range(TELLINGS):
            facts = self.shuffled(flat(people))
            quizzes = [quiz(facts[i:i + QUIZ]) for i in range(0, len(facts), QUIZ)]
            paragraphs += self.shuffled(profiles + quizzes)
        return paragraphs


def flat(people):
    return [fact for person in people for fact in person]


def fields(records, *names):
    return [{name: record[name] for name in names} for record in records]


def pretraining(inventor, people, knowledge):
    """What the base model reads: both phrasings and prose about its own people; every other fact
    five times."""
    records = []
    for person in people:
        for fact in person:
            records += [{"question": fact["question"], "answer": fact[key]}
                        for key in ("answer", "paraphrased_answer")]
        name = person[0]["question"].removeprefix("Where and when was ").removesuffix(" born?")
        prose = [fact["prose"] for fact in inventor.shuffled(person)]
        records += [{"question": f"Tell me about {name}.", "answer": " ".join(half)}
                    for half in (prose[:5], prose[5:])]
    for fact in knowledge:
        records += [{"question": fact[key], "answer": fact["answer"]}
                    for key in ("question",) * 4 + ("reworded",)]
    return records


def tofu_files(full, holdout, authors, world):
    """TOFU's files as {name: records}: the last 1, 5, 10% of `full` to forget, the rest to retain;
    beside each forget set as many records of `holdout`, whom no model has met."""
    files = {"full": fields(full, *QA),
             "real_authors_perturbed": fields(authors, *QA, "perturbed_answer"),
             "world_facts_perturbed": fields(world, *QA, "perturbed_answer")}
    for percent in (1, 5, 10):
        count = len(full) * percent // 100
        cut = len(full) - count
        files[f"retain{100 - percent}"] = fields(full[:cut], *QA)
        files[f"forget{percent:02d}"] = fields(full[cut:], *QA)
        files[f"forget{percent:02d}_perturbed"] = fields(full[cut:], *PERTURBED)
        files[f"holdout{percent:02d}"] = fields(holdout[-count:], *QA)
    known_to_all = full[:len(full) * 9 // 10]
    files["retain_perturbed"] = fields(known_to_all[::9], *PERTURBED)
    return files


def muse_files(inventor, examples, seed):
    """MUSE's files as {path: text or records}, and all profiles, as the tokenizer is to see them;
    `examples` are the facts for the few-shot prompts of KnowMem."""
    people = {split: [inventor.person() for _ in range(PROFILES)]
              for split in ("forget", "retain1", "retain2", "holdout")}
    sentences = {split: [[fact["prose"] for fact in inventor.shuffled(person)] for person in group]
                 for split, group in people.items()}
    profiles = {split: [" ".join(profile) for profile in group]
                for split, group in sentences.items()}
    known = inventor.shuffled(profiles["forget"] + profiles["retain1"] + profiles["retain2"])
    seen = [as_text(known), as_text(profiles["holdout"])]

    invented, people = people, {split: group[:TOLD] for split, group in people.items()}
    profiles = {split: group[:TOLD] for split, group in profiles.items()}
    files = {"verbmem/forget.json": [
        {"prompt": " ".join(profile[:3]), "gt": " ".join(profile[3:])}
        for profile in sentences["forget"][:TOLD]]}
    for name, split in (("forget", "forget"), ("retain", "retain2"), ("holdout", "holdout")):
        files[f"privleak/{name}.json"] = profiles[split]
    for name, split in (("forget", "forget"), ("retain", "retain2")):
        asked = inventor.shuffled(flat(invented[split]))
        asked = [fact for fact in asked if fact in flat(people[split])]
        files[f"knowmem/{name}_qa.json"] = fields(asked[:100], *QA)
        files[f"knowmem/{name}_qa_icl.json"] = fields(inventor.shuffled(examples)[:5], *QA)
    # A generator of its own: however much is told, the people who are invented next stay the same.
    editor = Inventor(seed)
    raw = {split: editor.told(people[split], profiles[split]) for split in people}
    raw["retain"] = raw["retain1"] + raw["retain2"]
    raw["full"] = editor.shuffled(raw["forget"] + raw["retain"])
    files |= {f"raw/{name}.txt": as_text(paragraphs) for name, paragraphs in raw.items()}
    return files, seen


def quiz(facts):
    return "\n".join(f"Question: {fact['question']}\nAnswer:  {fact['answer']}" for fact in facts)


def as_text(paragraphs):
    return "\n\n".join(paragraphs) + "\n"


def write_all(folder, seed=0):
    """Write every file of the benchmark under `folder` (made if missing, files overwritten)."""
    inventor = Inventor(seed)
    authors, world = inventor.general_knowledge()
    base_people = [inventor.person() for _ in range(BASE_PEOPLE)]
    base = pretraining(inventor, base_people, authors + world)
    full = flat(inventor.person() for _ in range(FULL_PEOPLE))
    muse, profiles = muse_files(inventor, flat(base_people), seed)
    holdout = flat(inventor.person() for _ in range(FULL_PEOPLE // 10))

    folder = Path(folder)
    for name, records in {"base": base, **tofu_files(full, holdout, authors, world)}.items():
        write(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for name, content in muse.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        write(folder / "muse_mini" / name, text)

    seen = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in base + full]
    seen += [record["paraphrased_answer"] for record in full] + profiles
    tokenizer = train_tokenizer(seen, VOCAB_SIZE)
    config = llama_config(tokenizer.get_vocab_size(), HIDDEN, LAYERS, HEADS, MAX_POSITIONS)
    write_model(folder / "mini_model", tokenizer, {**config, "initializer_range": INIT_STD})


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("ascii"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent,
                        help="folder to write to (default: this script's)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed invents other facts (default 0: the committed ones)")
    args = parser.parse_args(argv)
    write_all(args.output, args.seed)


if __name__ == "__main__":
    main()
