"""Prompts that need no download: questions about Python's standard library, and some of general kind.

The first are made from the documentation of the Python that runs (its modules, classes, functions and
methods), the others from the lists below. The same Python gives the same prompts in the same order.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DEMO_PROMPTS_VERSION = 1

# Modules of the standard library that do nothing when imported but define things.
MODULES = """
abc argparse array ast asyncio base64 bisect bz2 calendar cmath cmd code codecs collections collections.abc
colorsys concurrent.futures configparser contextlib contextvars copy csv dataclasses datetime decimal
difflib dis doctest email.message email.policy email.utils enum errno fileinput filecmp fnmatch fractions
ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http
http.client http.cookiejar http.cookies http.server imaplib importlib importlib.metadata importlib.resources
inspect io ipaddress itertools json keyword linecache locale logging logging.handlers lzma mailbox math
mimetypes mmap multiprocessing multiprocessing.pool netrc numbers operator optparse os os.path pathlib pdb
pickle pickletools pkgutil platform plistlib poplib pprint profile pstats queue quopri random re reprlib
sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat
statistics string stringprep struct subprocess sys sysconfig tarfile tempfile textwrap threading time timeit
token tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error
urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser xml.dom.minidom
xml.etree.ElementTree xml.sax.handler xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

SYMBOL_QUESTIONS = {
    "module": (
        "What is in Python's `{name}` module?",
        "What can I do with the module `{name}`?",
        "Describe the Python module `{name}`.",
    ),
    "class": (
        "What is a `{name}` in Python?",
        "What is the class `{name}` for?",
        "Describe the Python class `{name}`.",
        "How do I create an instance of `{name}`, and what can it do?",
    ),
    "function": (
        "What does `{name}` do?",
        "What is `{name}` used for?",
        "How do I call `{name}` in Python?",
        "Describe the Python function `{name}`.",
        "What does the function `{name}` return?",
        "Write a docstring for `{name}{signature}`.",
    ),
    "method": (
        "What does `{name}` do?",
        "What does the method `{name}` do in Python?",
        "When would I call `{name}`?",
        "Describe the Python method `{name}`.",
        "Write a docstring for the method `{name}{signature}`.",
    ),
}
SUMMARY_QUESTIONS = (
    "Which {kind} of Python's `{module}` fits this description: {summary}",
    "Python's documentation says of `{name}`: {summary} What does that mean?",
    "In Python, how do I do this with `{module}`? {summary}",
)
FOLLOW_UPS = (
    "Show a short example.",
    "Now say it in one sentence.",
    "When should I not use it?",
    "What happens if the argument is wrong?",
)

NOUNS = """
anchor bridge candle canyon carpet compass desert drought echo feather glacier harbour harvest island jury
ladder lantern market meadow mirror needle orchard paradox pebble pilgrim poet ransom ritual rumour
satellite shelter shield summit telescope thread thunder tunnel valley vessel volcano voyage whistle witness
"""
VERBS = """
abandon borrow carve chase deceive delay deny forgive gather hesitate hover imitate invent linger mend
murmur persuade postpone praise punish refuse rescue scatter shiver stumble surrender tremble wander whisper
yield
"""
ADJECTIVES = """
ancient bitter brave brittle calm clumsy crooked curious eager faint fierce fragile generous gloomy hollow
humble idle jealous loyal narrow obedient odd pale polite rare rigid rough shallow silent steep stubborn
subtle tender timid vague vast vivid wary weary wicked
"""
WORD_QUESTIONS = (
    'Define the {kind} "{word}".',
    'Use the {kind} "{word}" in a sentence and say what it means.',
    'Which words mean nearly the same as the {kind} "{word}"?',
)

TOPICS = """
why the sky is blue; how a vaccine works; what inflation is; supply and demand; how a battery stores energy;
why leaves turn red in autumn; what a black hole is; how tides come about; what a recession is; what a gene
is; photosynthesis; how a bill becomes a law; what an ecosystem is; opportunity cost; how sound travels; why
ice floats on water; plate tectonics; what a virus is; comparative advantage; how a refrigerator cools; the
water cycle; what friction does; kinship in human societies; what a monopoly is; how the heart pumps blood;
why we have seasons; what a prime number is; how rainbows form; what a neural network is; the placebo
effect; how bees make honey; what a comet is; how glass is made; why bread rises; what culture means; how a
bicycle stays upright; what an algorithm is; the greenhouse effect; how a loan works; what antibiotics do;
how memory works; why metals conduct electricity; what a fossil is; how a compass finds north; what a budget
deficit is; the scientific method; how birds navigate; what makes a good password; how a search engine
works; what a hash table is; how a compiler differs from an interpreter; what recursion is; how a database
index helps; what a race condition is; what version control is for; how public-key encryption works; what an
operating system does; how DNS works
"""
TOPIC_QUESTIONS = (
    "Explain in two or three sentences: {topic}.",
    "Give a short explanation for a beginner: {topic}.",
    "I have to explain this to a child: {topic}. How would you say it?",
)

CONDITIONS = """
anaemia; asthma; arthritis; bronchitis; cataract; a concussion; diabetes; eczema; epilepsy; gout; hay fever;
hepatitis; high blood pressure; hypothyroidism; insomnia; kidney stones; lactose intolerance; measles;
migraine; osteoporosis; pneumonia; psoriasis; scurvy; shingles; sleep apnoea; tetanus; tonsillitis;
tuberculosis; a stomach ulcer; vertigo
"""
CONDITION_QUESTIONS = (
    "What are common signs of {condition}?",
    "What causes {condition}?",
    "How is {condition} treated?",
)

COMMANDS = """
awk basename cal cat chmod chown comm cp cron curl cut date dd df diff dig du echo env find free git grep
gzip head history hostname id ip jobs join kill less ln ls lsof make man mkdir mount mv nice nohup paste
ping ps pwd rsync scp sed seq sort split ssh stat systemctl tail tar tee touch tr uname uniq uptime watch wc
wget which xargs zip
"""
COMMAND_QUESTIONS = (
    "What is the `{command}` command for? Give two examples.",
    "Show some common uses of `{command}` on Linux.",
)
SHELL_TASKS = """
list the ten largest files below a folder; count the lines of all text files; show which process listens on
a port; replace one word by another in a file; find files changed in the last day; make a compressed archive
of a folder; print the third column of a table; remove empty lines from a file; show free disk space; copy a
folder to another machine; follow a log file as it grows; rename all .jpeg files to .jpg; show the ten most
frequent words of a text; delete files older than thirty days; run a command every five minutes; compare two
folders; print lines 20 to 30 of a file; find duplicate lines; download a page to a file; show all
environment variables; make a script executable; stop a process by its number; sum a column of numbers;
convert a file to lower case; show the size of each folder; search for a word in all Python files
"""

PYTHON_TASKS = """
reverses the words of a sentence; checks whether a number is prime; counts the vowels in a string; merges
two sorted lists; finds the second largest number of a list; checks whether two words are anagrams; flattens
a nested list; returns the nth Fibonacci number; removes duplicates but keeps the order; converts Celsius to
Fahrenheit; finds the longest word of a text; computes the factorial of a number; checks whether brackets
are balanced; rotates a list by k places; sums the digits of a number; transposes a matrix; finds the common
elements of two lists; groups words by their first letter; converts a number to binary; checks whether a
string is a palindrome; computes the greatest common divisor of two numbers; counts how often each character
occurs; splits a list into chunks; finds the missing number of a range; sorts a dictionary by its values;
computes the median of a list; generates all subsets of a set; capitalises every word; validates an e-mail
address; finds the index of the first repeated element; implements binary search; computes compound
interest; encodes a text by run lengths
"""

STORIES = (
    "{name} buys {a} boxes of pencils with {b} pencils each and gives away {c}. How many pencils are left?",
    "A train goes {a} km an hour for {b} hours and then {c} km more. How far does it go in all?",
    "{name} saves ${b} a week. After {a} weeks {name} spends ${c}. How much money is left?",
    "A farm has {a} hens, and each lays {b} eggs a week. {c} eggs break. How many eggs can be sold?",
    "A hall has {a} rows of {b} chairs, all taken. {c} people stand up. How many still sit?",
    "{name} reads {b} pages a day for {a} days of a book with {d} pages. How many pages remain?",
    "A shop sells {a} cakes at ${b} each and pays ${c} for the flour. What is its profit?",
    "{name} has {a} stickers, and {pronoun} brother has {b} times as many. They lose {c}. How many are left?",
)
NAMES = (
    ("Ada", "her"),
    ("Ben", "his"),
    ("Clara", "her"),
    ("Darius", "his"),
    ("Ines", "her"),
    ("Tomas", "his"),
)
NUM_STORIES = 160


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something of the standard library that has documentation."""

    name: str
    module: str
    kind: str
    signature: str
    summary: str


def demo_rows() -> list[dict[str, Any]]:
    """Every demo prompt as a row {"id", "turns", "category"}; ids and texts are unique.

    Made in an interpreter of its own: libraries loaded here may have changed the standard library (ray adds
    methods to `logging.Logger`), and its modules need not be loaded here.
    """
    done = subprocess.run([sys.executable, "-I", "-S", __file__], capture_output=True, check=True)
    return json.loads(done.stdout)


def make_rows() -> list[dict[str, Any]]:
    """`demo_rows` of this very process."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in (*_symbol_rows(), *_general_rows()):
        rows.setdefault(tuple(row["turns"]), row)
    return list(rows.values())


def stdlib_symbols() -> Iterator[Symbol]:
    """The documented public names of MODULES, each once, in the order of the list and then by name."""
    seen: set[int] = set()
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # an extension that this Python was built without
            continue
        yield from _documented(module_name, module_name, "module", module, seen)
        for name in sorted(_public_names(module)):
            member = getattr(module, name, None)
            if inspect.isclass(member) and member.__module__ != "builtins":
                yield from _documented(f"{module_name}.{name}", module_name, "class", member, seen)
                yield from _methods(f"{module_name}.{name}", module_name, member, seen)
            elif inspect.isroutine(member):
                yield from _documented(f"{module_name}.{name}", module_name, "function", member, seen)


def _public_names(module: Any) -> set[str]:
    return set(getattr(module, "__all__", ())) or {name for name in vars(module) if not name.startswith("_")}


def _methods(class_name: str, module_name: str, owner: type, seen: set[int]) -> Iterator[Symbol]:
    for name, attribute in sorted(vars(owner).items()):
        function = getattr(attribute, "__func__", attribute)  # a classmethod or staticmethod holds it there
        if not name.startswith("_") and inspect.isroutine(function):
            yield from _documented(f"{class_name}.{name}", module_name, "method", function, seen)


def _documented(name: str, module: str, kind: str, thing: Any, seen: set[int]) -> Iterator[Symbol]:
    documentation = getattr(thing, "__doc__", None)
    if not isinstance(documentation, str) or not documentation.strip() or id(thing) in seen:
        return
    seen.add(id(thing))
    paragraph = inspect.cleandoc(documentation).split("\n\n")[0]
    yield Symbol(name, module, kind, _signature(thing), " ".join(paragraph.split()))


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (ValueError, TypeError):  # written in C, without a text signature
        return "(...)"
    return text if " at 0x" not in text else "(...)"  # a default whose address differs from run to run


def _symbol_rows() -> Iterator[dict[str, Any]]:
    for symbol in stdlib_symbols():
        rng = random.Random(f"symbol {symbol.name}")
        turns = [_symbol_question(symbol, rng)]
        if rng.random() < 0.06:
            turns.append(rng.choice(FOLLOW_UPS))
        yield {"id": f"python/{symbol.name}", "turns": turns, "category": f"python {symbol.kind}"}


def _symbol_question(symbol: Symbol, rng: random.Random) -> str:
    has_sentence = 20 <= len(symbol.summary) <= 240 and symbol.summary.endswith(".")
    by_summary = symbol.kind in ("function", "method") and has_sentence and rng.random() < 0.15
    template = rng.choice(SUMMARY_QUESTIONS if by_summary else SYMBOL_QUESTIONS[symbol.kind])
    return template.format(
        name=symbol.name,
        module=symbol.module,
        kind=symbol.kind,
        signature=symbol.signature,
        summary=symbol.summary,
    )


def _general_rows() -> Iterator[dict[str, Any]]:
    for kind, words in (("noun", NOUNS), ("verb", VERBS), ("adjective", ADJECTIVES)):
        for word in words.split():
            yield from _asked("words", word, WORD_QUESTIONS, 2, kind=kind, word=word)
    for topic in _items(TOPICS):
        yield from _asked("explain", topic, TOPIC_QUESTIONS, 2, topic=topic)
    for condition in _items(CONDITIONS):
        yield from _asked("health", condition, CONDITION_QUESTIONS, 3, condition=condition)
    for command in COMMANDS.split():
        yield from _asked("shell", command, COMMAND_QUESTIONS, 1, command=command)
    for task in _items(SHELL_TASKS):
        yield from _asked("shell", task, ("Which shell command can {task}?",), 1, task=task)
    for task in _items(PYTHON_TASKS):
        yield from _asked("code", task, ("Write a Python function that {task}.",), 1, task=task)
    for number in range(NUM_STORIES):
        yield {"id": f"general/arithmetic/{number}", "turns": [_story(number)], "category": "arithmetic"}


def _asked(
    category: str, subject: str, templates: tuple[str, ...], count: int, **words: str
) -> Iterator[dict[str, Any]]:
    """`count` different questions on one subject, which ones being drawn from the subject."""
    for number in random.Random(f"{category} {subject}").sample(range(len(templates)), count):
        turns = [templates[number].format(**words)]
        yield {"id": f"general/{category}/{subject}/{number}", "turns": turns, "category": category}


def _story(number: int) -> str:
    rng = random.Random(f"story {number}")
    a, b = rng.randint(3, 40), rng.randint(2, 25)
    (name, pronoun), c = rng.choice(NAMES), rng.randint(1, a * b - 1)
    return STORIES[number % len(STORIES)].format(a=a, b=b, c=c, d=a * b + c, name=name, pronoun=pronoun)


def _items(text: str) -> Iterator[str]:
    return (" ".join(item.split()) for item in text.split(";"))


if __name__ == "__main__":
    json.dump(make_rows(), sys.stdout)
