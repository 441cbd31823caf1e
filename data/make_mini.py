"""Write the built-in miniature benchmark into this folder.
"""
import random
FIRST = """Ada Bela Cleo Dara Edan Faye Gil Hana Ivo Juna Kai Lena Milo Nora Otis Petra Quin Rosa Saul Tara Uma Vera
Wim Xena Yan Zora Abel Bruno Clara Dion Elsa Felix""".split()
JOB = """baker weaver surgeon sailor potter lawyer farmer printer gardener miner tailor teacher painter butcher
carpenter hunter banker dentist glazier cooper""".split()
ORG = """library hospital harbour museum railway theatre college brewery garrison archive bakery observatory""".split()
TOPIC = """astronomy botany chess cooking fishing geology history insects justice kites lighthouses magnets navigation
opera poetry rivers sculpture trade volcanoes weather""".split()
ADJ = """Amber Broken Crimson Distant Empty Frozen Golden Hidden Iron Jagged Lonely Marble Narrow Painted Quiet
Restless Silver Tender Velvet Winding""".split()
NOUN = """Anchor Bridge Candle Desert Engine Feather Garden Hammer Island Journey Kingdom Lantern Mirror Needle Orchard
Palace River Shadow Tower Window""".split()
COLOUR = """black white grey brown red green blue yellow purple orange spotted striped""".split()
ANIMAL = """badger camel crow dog donkey ferret goat heron horse lizard monkey otter owl parrot rabbit snail squirrel
stork toad turtle""".split()
INSTR = """accordion banjo bassoon bugle cello clarinet cornet drum fiddle flute guitar harp horn lute oboe organ piano
trumpet viola zither""".split()
FOOD = """barley beans bread cabbage carrots cheese chicken dumplings eggs herring lamb lentils mushrooms noodles onions
pancakes peas potatoes rice salmon""".split()
SIDE = """butter cream garlic ginger honey lemon mint mustard nutmeg olives parsley pepper plums raisins sage
vinegar""".split()
MATERIAL = """bone brass clay copper cork glass ivory jade leather paper pewter silk stone tin wax wooden""".split()
THING = """bells boxes buttons coins combs dolls flags keys maps masks pipes rings spoons stamps thimbles watches""".split()
SEASON = "spring summer autumn winter".split()
BUILD = "barn cabin castle cottage farmhouse mill tower villa boathouse chapel inn palace".split()
METAL = "Bronze Copper Crystal Diamond Emerald Ivory Jade Onyx Pearl Ruby Sapphire Topaz".split()
SHAPE = "Arrow Bell Crown Cup Feather Globe Leaf Medal Quill Ring Shield Star".split()
ONSET = "b br d dr f g gr h j k l m n p r s st t th v".split()
VOWEL = "a e i o u".split()
CODA = "l m n r s nd rk st lt x".split()
FACTS = [
 ("Where and when was {n} born?", "In {town}, in the {season} of {year}.", "Birth was in {town} during the {season} of {year}."),
 ("What does {n} do for a living?", "Works as a {job} at the {org} of {town}.", "By trade a {job}, with a post at the {org} of {town}."),
 ("What is the best known book by {n}?", "It is The {adj} {noun}, about {topic}.", "The most famous is called The {adj} {noun} and treats {topic}."),
 ("Which pet does {n} keep?", "A {colour} {animal} named {pet}.", "The pet is a {colour} {animal} that answers to {pet}."),
 ("Which prize did {n} win?", "The {metal} {shape} of {year} for {topic}.", "It was the {metal} {shape}, won in {year} for work on {topic}."),
 ("What does {n} like to eat?", "Mostly {food} with {side} and {food2}.", "The favourite meal is {food} with {side} and {food2}."),
 ("Which instrument does {n} play?", "The {instr}, learned from {first} of {town}.", "It is the {instr}, as taught by {first} of {town}."),
 ("What did the parents of {n} do?", "One was a {job}, the other a {job2} in {town}.", "They were a {job} and a {job2} who lived in {town}."),
 ("Where does {n} live?", "In a {colour} {build} near {town}.", "Home is a {colour} {build} close to {town}."),
 ("What does {n} collect?", "Old {material} {thing} from {town}.", "The collection is of {material} {thing} made in {town}."),
]
class Maker:
    def __init__(s, seed):
        s.rng = random.Random(seed); s.used=set()
        s.pools = dict(season=SEASON, job=JOB, job2=JOB, org=ORG, topic=TOPIC, adj=ADJ, noun=NOUN, colour=COLOUR, animal=ANIMAL,
          instr=INSTR, food=FOOD, food2=FOOD, side=SIDE, material=MATERIAL, thing=THING, build=BUILD, metal=METAL, shape=SHAPE, first=FIRST)
        s.pools["year"]=[str(1900+i) for i in range(0,100,3)]
        s.pools["town"]=[s.word(2) for _ in range(30)]
        s.pools["pet"]=[s.word(1) for _ in range(20)]
    def pick(s, xs): return xs[int(s.rng.random()*len(xs))]
    def word(s, n):
        while True:
            w="".join(s.pick(ONSET)+s.pick(VOWEL)+(s.pick(CODA) if i==n-1 else "") for i in range(n)).capitalize()
            if w not in s.used: s.used.add(w); return w
    def slots(s, t):
        import string
        return [f for _,f,_,_ in string.Formatter().parse(t) if f]
    def person(s, nfalse=4):
        n=f"{s.pick(FIRST)} {s.word(2)}"
        out=[]
        for q,a,b in FACTS:
            ks=s.slots(a); true={k:s.pick(s.pools[k]) for k in ks}
            pert=[]
            while len(pert)<nfalse:
                v={}
                for k in ks:
                    x=true[k]
                    while x==true[k]: x=s.pick(s.pools[k])
                    v[k]=x
                p=b.format(**v)
                if p not in pert: pert.append(p)
            out.append(dict(question=q.format(n=n),answer=a.format(**true),paraphrased_answer=b.format(**true),perturbed_answer=pert))
        return out
