"""Words and sentences that tasks over text are made of, all written for this project."""

import numpy as np

ADJECTIVES = (
    "amber ancient arctic autumn bitter blue brave brisk bronze candid careful clever coastal cobalt copper coral "
    "cosmic crimson curious dapper daring dense distant dusty eager early elegant emerald endless fabled faint fancy "
    "fearless fertile fluent formal frosty gentle giant gilded golden grand granite hasty hazel hidden hollow "
    "humble icy idle indigo inland ivory jade jolly keen kind lavish level light lively lofty lonely lucid lunar "
    "magenta mellow merry mild misty modest narrow nimble noble oaken ochre odd olive opal orderly pale patient pearl "
    "placid plain polar polite prompt proud quaint quick quiet rapid rare robust rosy royal rugged russet rustic salty "
    "scarlet serene sharp shy silent silver simple sincere sleek slender solemn southern sparse stark steady stout "
    "subtle sunny swift tame tender thrifty tidy timid tranquil upbeat urban vast velvet vivid warm wary western "
    "wild windy wise witty wooden young zesty"
).split()
NOUNS = (
    "acorn anchor apple arch arrow atlas badge balcony banner barley barn basin basket beacon bell bench berry birch "
    "boat bottle bridge brook broom bucket button cabin cactus candle canyon canvas carpet castle cedar cellar chapel "
    "cherry chisel cider circle clay cliff clock cloud clover coin comet compass cottage cradle crane creek crown "
    "cushion dairy desert dock dome door drum dune eagle easel ember engine fable falcon farm feather fence fern "
    "fiddle field finch flag flask flute forest fossil fountain garden garnet gate geyser glacier glove goose grove "
    "guitar hammer harbor harvest hatch hedge helmet heron hill hinge honey horizon island ivy jacket jar journal "
    "kettle kite ladder lagoon lamp lantern lark lasso lemon lever lily linen lock lodge loom maple marble market "
    "meadow melon mill mirror mitten monsoon moss motor needle nest north nutmeg oar oasis orchard otter oven paddle "
    "parcel path pebble pencil pepper piano pier pillow pilot pine plateau plum pocket pond poppy puddle quarry "
    "quilt rail rain raven reef ribbon ridge river road robin rocket roof root saddle sail sand scarf shed shell shore "
    "sketch sleigh slope smoke snow spade spoon spring square stable stair statue stone stool storm stove straw stream "
    "sugar summit swan table teapot temple thimble thistle thunder ticket timber torch tower trail train tulip tunnel "
    "valley vase village violin wagon walnut water wheat wheel willow window winter wool yard"
).split()
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# An essay: sentences of several shapes, so that a long one does not repeat itself word by word.
PEOPLE = (
    "a carpenter|a good teacher|my grandmother|a young engineer|an old sailor|a careful reader|the gardener|a baker|"
    "a stubborn writer|the new apprentice|a patient clerk|most people|a friend of mine|a town planner|a watchmaker"
).split("|")
THINGS = (
    "a bridge|a letter|a small garden|a fair price|an honest mistake|a long walk|a good question|a wooden chair|"
    "a morning habit|a first draft|a map of the coast|a public library|a simple rule|an unfinished plan|a loaf of bread"
).split("|")
DEEDS = (
    "looks again at|learns something from|takes time over|explains|puts off|repairs|gives away|begins with|fears for|"
    "makes a list for|keeps a record of|returns to|asks a neighbour about|measures|has doubts about"
).split("|")
TIMES = (
    "before breakfast|in a wet spring|after the third attempt|when nobody is looking|on a slow afternoon|"
    "late in the year|at the end of a long week|once the noise has gone|during the holidays|as the evening cools"
).split("|")
LESSONS = (
    "haste costs more than it saves|the plain way is seldom the worst|it helps to write things down|"
    "small repairs keep large ones away|nobody sees the work that went well|a habit is easier to begin than to end|"
    "what can be counted is not all that counts|the second reading finds what the first one hid|"
    "practice is cheaper than talent|tools wear out sooner than ideas"
).split("|")


def pick(rng: np.random.Generator, items: tuple[str, ...] | list[str]) -> str:
    return items[int(rng.integers(len(items)))]


def essay(rng: np.random.Generator, sentences: int) -> list[str]:
    """Sentences of an essay about nothing much."""
    draws = rng.integers(1 << 30, size=(sentences, 5)).tolist()
    return [_sentence(*draw) for draw in draws]


def _sentence(shape: int, a: int, b: int, c: int, d: int) -> str:
    who, deed, what = PEOPLE[a % len(PEOPLE)], DEEDS[b % len(DEEDS)], THINGS[c % len(THINGS)]
    when, lesson = TIMES[d % len(TIMES)], LESSONS[(a + d) % len(LESSONS)]
    match shape % 5:
        case 0:
            text = f"{who} {deed} {what} {when}."
        case 1:
            text = f"{when}, {who} {deed} {what}, and {lesson}."
        case 2:
            text = f"{what} teaches that {lesson}."
        case 3:
            text = f"if {who} {deed} {what}, then {lesson}."
        case _:
            text = f"{lesson}, says {who} who {deed} {what}."
    return text[0].upper() + text[1:]


def compounds(rng: np.random.Generator, count: int) -> list[str]:
    """Different words such as riverstone. Raises ValueError if there are not so many."""
    size = len(NOUNS)
    if count > size * (size - 1):
        raise ValueError(f"there are {size * (size - 1)} words, not {count}")
    firsts, seconds = np.divmod(rng.choice(size * (size - 1), count, replace=False), size - 1)
    return [NOUNS[a] + NOUNS[b + (b >= a)] for a, b in zip(firsts.tolist(), seconds.tolist(), strict=True)]


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names such as quiet-harbor. Raises ValueError if there are not so many."""
    most = len(ADJECTIVES) * len(NOUNS)
    if count > most:
        raise ValueError(f"there are {most} names, not {count}")
    firsts, seconds = np.divmod(rng.choice(most, count, replace=False), len(NOUNS))
    return [f"{ADJECTIVES[a]}-{NOUNS[b]}" for a, b in zip(firsts.tolist(), seconds.tolist(), strict=True)]
