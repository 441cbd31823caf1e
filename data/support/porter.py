"""The Porter stemmer, in the variant that TOFU's ROUGE scores are computed with.

Source: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with the changes
that NLTK's `PorterStemmer` makes by default and that rouge-score therefore inherits: a table of
irregular words, words of one or two letters left alone, `-ies`/`-ied` of four-letter words kept as
`-ie`, and the rules marked "NLTK" below.
"""

from functools import lru_cache

IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie",
             "innings": "inning", "outings": "outing", "cannings": "canning"}
IRREGULAR |= {word: word for word in
              "sky news inning outing canning howe proceed exceed succeed".split()}

# suffix -> replacement. The first suffix that matches decides, so a suffix stands before its own
# endings (ational, tional; ement, ment, ent).
STEP1 = {"sses": "ss", "ies": "i", "ied": "i", "ss": "ss", "s": ""}
STEP2 = {"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize",
         "bli": "ble", "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize",
         "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful",
         "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
         "logi": "log"}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
         "ness": ""}
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive "
                      "ize".split(), "")


def shape(word):
    """The word as c (consonant) and v (vowel); y is a vowel exactly when it follows a consonant."""
    letters = ""
    for letter in word:
        letters += "v" if letter in "aeiou" or (letter == "y" and letters[-1:] == "c") else "c"
    return letters


def measure(word):
    """Porter's m: how many times a run of vowels is followed by a run of consonants."""
    return shape(word).count("vc")


def ends_short(word):
    """Porter's *o: ends consonant-vowel-consonant, the last not w, x or y.
    NLTK: or is just vowel-consonant."""
    return shape(word)[-3:] == "cvc" and word[-1] not in "wxy" or shape(word) == "vc"


def step1(word):
    """Plurals, -ed and -ing, and a final y."""
    if word.endswith(("ies", "ied")) and len(word) == 4:  # NLTK
        word = word[:-1]
    else:
        word = replace(word, STEP1, 0)
    if word.endswith("eed"):
        word = replace(word, {"eed": "ee"}, 1)
    else:
        stems = [word[:-len(suffix)] for suffix in ("ed", "ing") if word.endswith(suffix)]
        if stems and "v" in shape(stems[0]):
            word = restore(stems[0])
    # NLTK: Porter asks for any vowel
    if word.endswith("y") and len(word) > 2 and shape(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    return word


def restore(stem):
    """Repair a stem that lost -ed or -ing: conflat(ed) -> conflate, hopp(ing) -> hop,
    fil(ing) -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1] == stem[-2:-1] and shape(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if measure(stem) == 1 and ends_short(stem) else stem


def replace(word, rules, least):
    """The word with its suffix replaced by a step's rules if its rest measures at least `least`."""
    suffix = next((suffix for suffix in rules if word.endswith(suffix)), "")
    stem = word.removesuffix(suffix)
    # NLTK counts the l of -logi as well: geology and theology lose the y like archaeology.
    enough = measure(stem + "l" if suffix == "logi" else stem) >= least
    if not suffix or not enough or suffix == "ion" and stem[-1] not in "st":
        return word
    # NLTK runs what -alli leaves through the step again: -ationalli -> -ational -> -ate.
    replaced = stem + rules[suffix]
    return replace(replaced, rules, least) if suffix == "alli" else replaced


def step5(word):
    """A final -e and a double l."""
    if word.endswith("e") and measure(word[:-1]) > (1 if ends_short(word[:-1]) else 0):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word


@lru_cache(maxsize=None)
def stem(word):
    """The stem of one English word, in lower case. stem("relational") -> "relat"."""
    word = word.lower()
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = replace(step1(word), STEP2, 1)
    word = replace(word, STEP3, 1)
    return step5(replace(word, STEP4, 2))
