"""Experts of one architecture whose tokenizers have other tokens, or the same ones under other numbers.

A row of an embedding means the token of that number, so that averaging rows of two vocabularies number by number would
average words with other words. With `vocabulary="union"` every expert is brought to one vocabulary first, that of the
first expert and behind it what the others have beyond it; tokens are the same where their texts are, special ones
where their roles are. Each expert keeps its own tokenizer, with the new numbers in it, so it reads every text as it
did. What it has no row for it never reads: there it takes the others' rows, once units are aligned (`combine.tokens`).

Invariants: a renumbered expert computes of every text what it computed before; a model that was passed stays as it is.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.processors import files_of
from hf_zipit.hub.processors import Files, load_processor, same, write_files
from hf_zipit.modeling.empty_model import add_output_bias

TOKENIZER = "tokenizer.json"

OLDER = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")
"""Files that say the same as `tokenizer.json`, with the numbers of before."""

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")

NEVER = -1e4
"""The logit of a token that an expert does not have, and the score of a piece that its tokenizer must not choose."""

UNUSED = "\U000f0000"
"""What pieces begin with that only fill a place: a character for private use, which texts do not have."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of an expert's tokenizer.

    Attributes:
        numbers: by text, in order.
        roles: the texts of the special tokens, by role.
    """

    numbers: Mapping[str, int]
    roles: Mapping[str, str]

    @classmethod
    def of(cls, files: Files) -> Vocabulary | None:
        """That of the tokenizer among a model's processor files; None if there is none."""
        if not files:
            return None
        with tempfile.TemporaryDirectory() as room:
            write_files(room, files)
            found = load_processor(room)
        tokenizer = getattr(found, "tokenizer", found)
        if not hasattr(tokenizer, "get_vocab"):
            return None
        roles = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
        numbers = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])  # its own order is any
        return cls(dict(numbers), {role: token for role, token in roles.items() if token})

    def difference(self, other: Vocabulary) -> tuple[int, str, str] | None:
        """The first number that means another token in the other vocabulary, and both tokens; None if none does."""
        theirs = {number: token for token, number in other.numbers.items()}
        for token, number in self.numbers.items():
            if theirs.get(number, token) != token:
                return number, token, theirs[number]
        return None


def reads_tokens(model: nn.Module) -> bool:
    """Whether a model has an embedding of token numbers."""
    if not isinstance(model, PreTrainedModel):
        return False
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (NotImplementedError, AttributeError):
        return False


def check_vocabularies(experts: Mapping[str, nn.Module]) -> None:
    """Raises ExpertError if tokenizers that lie with the experts mean other tokens by the same numbers."""
    known = {task: files for task, model in experts.items() if reads_tokens(model) and (files := files_of(model))}
    if len(known) < 2:
        return
    (first, files), *others = known.items()
    other = [(task, theirs) for task, theirs in others if not same(files, theirs)]
    mine = Vocabulary.of(files) if other else None
    for task, theirs in other:
        vocabulary = Vocabulary.of(theirs)
        if mine and vocabulary and (found := mine.difference(vocabulary)):
            number, left, right = found
            raise ExpertError(
                f"the tokenizers of the experts differ: token {number} is {left!r} for {first!r} and {right!r} for "
                f"{task!r}; pass vocabulary='union' to match tokens by their text"
            )


def one_vocabulary(experts: Mapping[str, nn.Module]) -> bool:
    """Whether the same token numbers mean the same to all experts, as far as that is known."""
    sizes = {getattr(getattr(model, "config", None), "vocab_size", None) for model in experts.values()}
    try:
        check_vocabularies(experts)
    except ExpertError:
        return False
    return len(sizes) == 1


def united(experts: Mapping[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """The experts with one vocabulary: copies, but for those to which nothing has to be done.

    Models that write end at the token that ends a text of any expert. Raises ExpertError if an expert has no
    tokenizer, one that cannot be renumbered, or tables of tokens that are not tied.
    """
    if all(hasattr(model, "held_rows") for model in experts.values()):  # they were brought to one before
        return dict(experts)
    vocabularies = {task: Vocabulary.of(files_of(model)) for task, model in experts.items()}
    for task, found in vocabularies.items():
        if found is None or not reads_tokens(experts[task]):
            raise ExpertError(
                f"the expert {task!r} has no tokenizer beside its weights, which vocabulary='union' goes by; save it "
                "there, or leave the option out"
            )
    first = next(iter(experts))
    union = dict(vocabularies[first].numbers)
    length = max(rows(experts[first]), *(number + 1 for number in union.values()))
    places: dict[str, dict[int, int]] = {}
    for task, vocabulary in vocabularies.items():
        places[task] = {}
        roles = {token: vocabularies[first].roles.get(role) for role, token in vocabulary.roles.items()}
        for token, number in vocabulary.numbers.items():
            role = roles.get(token)
            name = role if token not in union and role is not None and role not in vocabulary.numbers else token
            if name not in union:
                union[name], length = length, length + 1
            places[task][number] = union[name]
    if all(length == rows(experts[task]) and all(a == b for a, b in places[task].items()) for task in experts):
        return dict(experts)
    roles = ((task, vocabulary, vocabulary.roles.get("eos")) for task, vocabulary in vocabularies.items())
    ends = list(dict.fromkeys(places[task][own.numbers[token]] for task, own, token in roles if token))
    found = {task: renumbered(task, model, places[task], length) for task, model in experts.items()}
    for model in found.values():
        if ends and model.can_generate():
            for config in configs_of(model):
                config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return found


def configs_of(model: PreTrainedModel) -> list[Any]:
    """What holds numbers of special tokens: the model's configuration, that of its text, and that of writing."""
    found = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    return list({id(config): config for config in found if config is not None}.values())


def rows(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)


@torch.no_grad()
def renumbered(task: str, model: PreTrainedModel, places: Mapping[int, int], length: int) -> PreTrainedModel:
    """A copy of an expert whose tokens have the numbers `places[number]` among `length`, as has its tokenizer.

    `held_rows` of it is which tokens it has: bool `[length]`. Raises ExpertError as `united` does.
    """
    old = model.get_input_embeddings().weight
    here = {number: place for number, place in places.items() if number < len(old)}
    source, target = torch.tensor(list(here)), torch.tensor(list(here.values()))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == len(old) and module.weight is not old:
            raise ExpertError(
                f"the expert {task!r} reads tokens through a second table, {name}, which is not tied to the first; "
                "vocabulary='union' renumbers one; tie them, or leave the option out"
            )
    head = model.get_output_embeddings()
    sha256 = getattr(model, "known_sha256", None) or fingerprint_experts({task: model})[task]
    files = renumbered_files(task, files_of(model), places, length)
    last = getattr(model, "final_logits_bias", None)  # of BART and its kin, beside the head
    model = copy.deepcopy(model)  # the model that was passed keeps its own
    model.resize_token_embeddings(length, mean_resizing=False)
    inputs, new = model.get_input_embeddings(), model.get_output_embeddings()
    moved = [(inputs.weight, old, 0.0)]
    if new is not None:
        if new.bias is None:
            add_output_bias(model)
        moved += [(new.weight, head.weight, 0.0), (new.bias, head.bias, NEVER)]
    if last is not None:
        moved.append((model.final_logits_bias[0], last[0], 0.0))
    for tensor, own, lacking in moved:
        tensor.fill_(lacking)
        tensor[target] = 0.0 if own is None else own[source]
    inputs.padding_idx = here.get(inputs.padding_idx, inputs.padding_idx)
    for config in configs_of(model):
        for name, value in list(vars(config).items()):
            if name.endswith("token_id") and value is not None:
                many = isinstance(value, (list, tuple))
                moved = [places.get(number, number) for number in (value if many else [value])]
                setattr(config, name, moved if many else moved[0])
    model.held_rows = torch.zeros(length, dtype=torch.bool).index_fill(0, target, True)
    model.known_sha256, model.known_processor_files = sha256, files
    return model.eval()


def renumbered_files(task: str, files: Files, places: Mapping[int, int], length: int) -> Files:
    """The files of a tokenizer with new numbers for its tokens. Raises ExpertError without a `tokenizer.json`."""
    if TOKENIZER not in files:
        raise ExpertError(
            f"the tokenizer of the expert {task!r} has no {TOKENIZER}; save it as a fast tokenizer, so that its "
            "tokens can be renumbered"
        )
    content = json.loads(files[TOKENIZER])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: places[number] for token, number in model["vocab"].items()}
    else:  # Unigram: pieces and their scores in order
        pieces = [[f"{UNUSED}{number}", NEVER] for number in range(length)]
        for number, piece in enumerate(model["vocab"]):
            pieces[places[number]] = piece
        model["vocab"] = pieces
        model["unk_id"] = places.get(model.get("unk_id"), model.get("unk_id"))
    for token in content.get("added_tokens") or ():
        token["id"] = places[token["id"]]
    _renumber(content.get("post_processor"), lambda number: places.get(number, number))
    if content.get("padding"):
        content["padding"]["pad_id"] = places.get(content["padding"]["pad_id"], 0)
    found = {n: c for n, c in files.items() if n not in OLDER and not n.endswith(".model")}
    found[TOKENIZER] = json.dumps(content, ensure_ascii=False).encode()
    settings = "tokenizer_config.json"
    if settings in found:
        config = json.loads(found[settings])
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(places[int(number)]): token for number, token in config["added_tokens_decoder"].items()
            }
        found[settings] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return found


def _renumber(part: Any, place: Callable[[int], int]) -> None:
    """New numbers for the special tokens that a post-processor puts around a text."""
    if isinstance(part, list):
        for item in part:
            _renumber(item, place)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "ids":
                part[key] = [place(number) for number in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                part[key] = [value[0], place(value[1])]
            else:
                _renumber(value, place)
