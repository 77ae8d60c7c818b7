"""Text -> token ids, BOS first. No code of a checkpoint runs: a tokenizer.json is read as data."""

import re
from pathlib import Path

from tokenizers import Tokenizer

from runtime import Fault, one_line

# The objects of both asset packs, and the words of the prompts
_WORDS = """7up action baguette ball banana bar bbq bear black block blue bottle bowtie bread
brown can capsule carrot champagne cross cube cup cyan cylinder disc domino dumbbell fast food
glass golf green hamburger hammer house in is ketchup kitchen l light lime mushroom navy nonstop
on onion orange pepper pink pipe plant plastic plate potato puck purple put pyramid red robot
sauce should shovel snowman spoon stick striped t take teal the to toy traffic travel watering
what where yellow zuchinni"""
WORD_VOCAB = ["<pad>", "<s>", "<unk>", "<out>", *_WORDS.split()]
WORD_PROMPT = "{instruction} <out>"
_FLAT_WORDS = "red green blue yellow purple cube ball cross l bar put on plate where is the"
FLAT_VOCAB = ["<pad>", "<s>", "<unk>", "<out>", *_FLAT_WORDS.split()]


class WordTokenizer:
    """One id per word of a small vocabulary. A prompt ends in <out>, as Llama's in token 29871."""

    def __init__(self, words):
        self.ids = {word: i for i, word in enumerate(words)}

    def __call__(self, text):
        words = re.findall(r"<out>|\w+", text.lower().replace("out:", "<out>"))
        for word in words:
            if word not in self.ids:
                raise Fault(
                    f"the word {word!r} is not in this policy's vocabulary: add it to "
                    "backbones/tokenizers.py and make another start"
                )
        return [self.ids[word] for word in ["<s>", *words]]


def open_tokenizer(file):
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise Fault(
            f"{file} is no tokenizer.json that the installed tokenizers library reads "
            f"({one_line(error)}); a SentencePiece model is none, either"
        ) from None


class LlamaTokenizer:
    """Llama 2's, for OpenVLA."""

    source = "Llama 2's"

    def __init__(self, file):
        self.tokenizer = open_tokenizer(file)

    def __call__(self, text):
        ids = self.tokenizer.encode(text).ids
        if ids[:1] != [1] or (text.endswith("Out: ") and ids[-1] != 29871):
            raise Fault(
                f"tokenizer.json is not Llama-2's: a prompt became {ids}, not BOS 1 ... 29871"
            )
        return ids


class PaliGemmaTokenizer:
    """PaliGemma's, for pi0; BOS (2) goes before the text."""

    source = "PaliGemma's (of google/paligemma-3b-pt-224, whose licence has to be accepted first)"

    def __init__(self, file):
        self.tokenizer = open_tokenizer(file)
        if self("\n") != [2, 108]:
            raise Fault(
                f"{file} is not PaliGemma's tokenizer: a line feed becomes {self(chr(10))}, "
                "not BOS 2 and 108"
            )

    def __call__(self, text):
        return [2, *self.tokenizer.encode(text, add_special_tokens=False).ids]


def check_tokenizer(tokenizer, tokenizer_class, name):
    if tokenizer is None:
        raise Fault(
            f"{name} has no tokenizer.json, so it cannot read instructions: put "
            f"{tokenizer_class.source} there, or name it with --tokenizer FILE"
        )


def read_tokenizer(tokenizer_class, file, config, folders):
    """-> tokenizer, its file; both are None where there is none. file: the user's choice, before
    the tokenizer.json of the first folder that has one."""
    if file and not Path(file).is_file():
        raise Fault(f"--tokenizer {file}: there is no such file; give a tokenizer.json")
    if "_word_vocab" in config:
        return WordTokenizer(config["_word_vocab"]), None
    places = [file] if file else [folder / "tokenizer.json" for folder in folders if folder]
    for place in places:
        if Path(place).is_file():
            return tokenizer_class(place), Path(place)
    return None, None
