"""Word lists: common single words, few enough that each becomes one token of the tiny tokenizer."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Adam Alice Anna Ben Bella Carl Clara Daniel Diana Emma Eric Fiona Frank George Grace Helen Henry Ida "
    "Jack Julia Karl Laura Leo Linda Lucy Maria Martin Nina Noah Olga Oscar Paul Peter Rosa Ruth Sam Sara "
    "Simon Tina Victor"
)
OBJECTS = _words(
    "apples balls beads books bottles boxes buttons cards coins cups flags hats keys leaves marbles nuts "
    "pears pens plates shells stamps stickers stones tickets"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Chicago Dallas Delhi Dublin Lisbon London Madrid Milan Moscow Oslo Paris "
    "Prague Rome Seoul Sydney Tokyo Toronto Vienna"
)
JOBS = _words(
    "baker banker barber cook dentist doctor driver farmer guard judge lawyer nurse painter pilot sailor "
    "singer tailor teacher waiter writer"
)
PETS = _words(
    "bird cat cow dog donkey duck fish fox goat horse lizard monkey mouse parrot pig rabbit sheep snake turtle"
)
COLORS = _words("black blue brown gold gray green orange pink purple red silver white yellow")
FOODS = _words("beans bread butter cake cheese corn fruit honey meat pasta pie pizza rice salad sausage soup")
SPORTS = _words(
    "boxing chess cricket football golf hockey judo polo rugby running sailing skiing soccer swimming tennis"
)
THINGS = _words(
    "bag basket bell bike bowl camera chair clock coat desk guitar jacket knife lamp map mirror phone piano "
    "ring shirt table umbrella"
)
ROOMS = _words(
    "attic barn bathroom bedroom cellar chapel garage garden hall kitchen library lobby office shed studio tower"
)
LABELS = _words("alpha beta delta gamma kappa lambda omega sigma theta zeta")
TAGS = _words("boring clever funny happy lovely sad scary strange useful warm")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WEATHER = _words("bright calm cloudy cold dry foggy hot mild rainy stormy sunny windy")
TOPICS = (CITIES, JOBS, PETS, COLORS, FOODS, SPORTS, THINGS, ROOMS)  # what an input of a task can be about

# Frequent English words that no generator uses: they fill the rest of the tokenizer for other text.
COMMON_WORDS = _words(
    "the of and to in for that this with on are was by from or be as at not but they his her you we she he it "
    "its all one two three which will would there their when who can more if no out up so what about into "
    "than them first time each per day week hour money cost price total many much left step answer number "
    "problem solve"
)

LOOKUP_VALUES = (CITIES, JOBS, PETS, COLORS, FOODS, SPORTS, ROOMS)
ALL_WORDS = (*NAMES, *OBJECTS, *CITIES, *JOBS, *PETS, *COLORS, *FOODS, *SPORTS, *THINGS, *ROOMS, *LABELS, *TAGS)
