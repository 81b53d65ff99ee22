"""The zoo's data and training code: what every pair promises, on every registered pair. No full training here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, ResNetConfig

from benchmarks.zoo import RECIPES, Metric, Pair, load, store
from benchmarks.zoo.boxes import Detection, overlap
from benchmarks.zoo.characters import encode_fixed
from benchmarks.zoo.masking import shown
from benchmarks.zoo.pair import IGNORED, Splits, trim
from benchmarks.zoo.pairs import (
    captions_clip,
    chars_roberta,
    fashion,
    glosses_mlm,
    many,
    scenes,
    seq2seq_t5,
    speech,
    text_causal,
)
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources import (
    calls,
    ciphers,
    digits,
    drawings,
    fashion_mnist,
    gcide,
    inflections,
    notations,
    numerals,
    timetable,
    wordnet,
)
from benchmarks.zoo.sources import scenes as scenes_source
from benchmarks.zoo.training import fit
from benchmarks.zoo.wordpiece import encode

SHARED = Path(__file__).parents[3] / "shared" / "experts"
TEXTS = [name for name in RECIPES if name.startswith(("wordnet", "glosses", "chars", "text", "seq2seq"))]
SMALL = {"train": 60, "validation": 40, "test": 40}


def _no_fashion() -> bool:
    return not fashion_mnist.FOLDER.is_dir()


def _no_wordnet() -> bool:
    try:
        return not wordnet.folder().is_dir()
    except FileNotFoundError:
        return True


needs_fashion = pytest.mark.skipif(_no_fashion(), reason="dataset-fashion-mnist is not installed")
needs_wordnet = pytest.mark.skipif(_no_wordnet(), reason="wordnet-base is not installed")


needs_gcide = pytest.mark.skipif(not gcide.FILE.exists(), reason="dict-gcide is not installed")


@pytest.fixture(autouse=True, scope="module")
def little_data() -> Iterator[None]:
    """Of what is drawn or cut to measure, little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chars_roberta, "SAMPLES", SMALL)
        patch.setattr(many, "COUNTS", {**SMALL, "train": 200, "validation": 200, "test": 200})
        patch.setattr(text_causal, "WINDOWS", SMALL)
        for pair in (scenes, seq2seq_t5, speech):
            patch.setattr(pair, "SAMPLES", SMALL)
        patch.setattr(text_causal, "ENTRIES", 500)
        patch.setattr(glosses_mlm, "TEXTS", 6000)
        for split in ("VALIDATION", "TEST"):
            patch.setattr(glosses_mlm, split, 400)
        yield


def _pairs(names: Iterable[str]) -> pytest.MarkDecorator:
    marks = {name: needs_wordnet if name in TEXTS else needs_fashion for name in RECIPES}
    marks |= {name: needs_gcide for name in RECIPES if name.startswith("text")}
    marks |= dict.fromkeys(("seq2seq-t5", "speech"), ())
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


DATA = {type(recipe).splits: name for name, recipe in RECIPES.items()}  # one pair for each data code, the largest
every_pair = _pairs(RECIPES)
every_data = _pairs(DATA.values())

SLOWLY_READ = ("wordnet-bert", "captions-clip", "glosses-prelayernorm-mlm")
"""Their data are made a second time where there is time."""


@cache
def _data(name: str) -> tuple[Recipe, PreTrainedTokenizerBase | None, Splits]:
    recipe = RECIPES[name]
    if (twin := DATA[type(recipe).splits]) != name:
        _, tokenizer, splits = _data(twin)
        return recipe, tokenizer, {task: splits[task] for task in recipe.seeds}
    tokenizer = recipe.train_tokenizer()
    return recipe, tokenizer, recipe.splits(tokenizer)


def _first(data: dict, count: int) -> dict:
    return {name: tensor[:count] for name, tensor in data.items()}


def _texts(data: dict) -> set[tuple[int, ...]]:
    """The texts of a split, with the words that a mask hides."""
    masked = data["labels"].shape == data["input_ids"].shape
    ids = shown(data) if masked else data["input_ids"]
    return {tuple(row) for row in ids.tolist()}


@every_pair
def test_splits_have_rows_labels_and_all_tasks(name: str) -> None:
    recipe, tokenizer, splits = _data(name)
    metric = recipe.metric(tokenizer)
    assert set(splits) == set(recipe.seeds) and len(set(recipe.seeds.values())) == len(recipe.seeds) > 1
    for task, parts in splits.items():
        assert list(parts) == ["train", "validation", "test"]
        for data in parts.values():
            assert len({len(tensor) for tensor in data.values()}) == 1
            labels = metric.targets(data["labels"])
            candidates = len(tokenizer or calls.DIGITS) if metric.classes is None else len(metric.classes[task])
            assert labels.min() >= 0 and labels.max() < candidates
            if metric.classes is not None:
                assert len(labels.unique()) == candidates
            assert metric.chance(data) < 0.45


@_pairs(name for name in DATA.values() if name not in SLOWLY_READ or os.environ.get("HF_ZIPIT_FUZZ"))
def test_data_are_the_same_at_every_call(name: str) -> None:
    recipe, tokenizer, splits = _data(name)
    for task, parts in recipe.splits(tokenizer).items():
        for split, data in parts.items():
            for key, tensor in data.items():
                assert torch.equal(tensor, splits[task][split][key]), (task, split, key)


@_pairs(name for name in DATA.values() if name in TEXTS)
def test_no_text_is_in_two_splits(name: str) -> None:
    """Long texts are compared by what the model sees of them, so a few may begin alike; more would be a leak."""
    for parts in _data(name)[2].values():
        train, validation, test = (_texts(data) for data in parts.values())
        assert len(train & test) <= 0.005 * len(test)
        assert len(train & validation) <= 0.005 * len(validation)
        assert len(validation & test) <= 0.005 * len(test)


def test_split_indices_are_a_seeded_partition() -> None:
    parts = split_indices(100, 20, 30, seed=3)
    assert [len(parts[split]) for split in ("train", "validation", "test")] == [50, 20, 30]
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(100))
    assert torch.equal(parts["test"], split_indices(100, 20, 30, seed=3)["test"])
    assert not torch.equal(parts["test"], split_indices(100, 20, 30, seed=4)["test"])


@needs_wordnet
def test_tokenizers_repeat_and_round_trip(tmp_path: Path) -> None:
    recipe, tokenizer, _ = _data("wordnet-bert")
    assert recipe.train_tokenizer().get_vocab() == tokenizer.get_vocab()
    text = "a large animal of the sea"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids and again.model_max_length == tokenizer.model_max_length


@needs_wordnet
def test_a_gloss_is_split_into_definition_and_examples() -> None:
    gloss = wordnet._gloss('00001740 03 n 01 entity 0 000 | that which is; "a being"; "an \\"entity\\""  \n')
    assert (gloss.definition, gloss.noun_file) == ("that which is", "tops")
    dog = next(gloss for gloss in wordnet.glosses("noun") if "domesticated by man since prehistoric" in gloss.text)
    assert dog.noun_file == "animal" and '"' not in dog.definition and '"' in dog.text


@needs_wordnet
def test_hidden_words_are_whole_and_at_least_one_a_text() -> None:
    _, tokenizer, _ = _data("glosses-roberta-mlm")
    text = encode(tokenizer, ["a member of the genus Zyzzyphus", 'a kind of plant; "a plant"'] * 100)["input_ids"]
    masked = glosses_mlm.hidden_words(text, tokenizer, torch.Generator().manual_seed(1))
    hidden = masked["labels"] != IGNORED
    assert hidden.any(1).all()
    assert torch.equal(shown(masked), text)
    assert (masked["input_ids"][hidden] == tokenizer.mask_token_id).all()
    words = set(tokenizer.convert_ids_to_tokens(text[hidden].tolist()))
    assert words == {"a", "member", "of", "the", "genus", "kind", "plant", ";", '"'}
    share = hidden.sum() / glosses_mlm.whole_words(text, tokenizer).sum()
    assert share == pytest.approx(glosses_mlm.MASKED, abs=0.08)


@needs_wordnet
def test_training_redraws_the_mask_of_the_same_text() -> None:
    recipe, tokenizer, splits = _data("glosses-roberta-mlm")
    batch = _first(splits["a"]["train"], 32)
    again = recipe.augment(batch, tokenizer, torch.Generator().manual_seed(5))
    assert not torch.equal(batch["labels"], again["labels"])
    assert _texts(batch) == _texts(again)


@needs_wordnet
def test_characters_fill_the_length_and_blanks_are_never_hidden() -> None:
    recipe, tokenizer, splits = _data("chars-roberta")
    assert len(tokenizer) < 64
    blank = tokenizer.convert_tokens_to_ids(" ")
    texts = [f"{place:0{chars_roberta.LENGTH}}="[-chars_roberta.LENGTH :] for place in range(3)]
    assert encode_fixed(tokenizer, texts).tolist() == tokenizer(texts)["input_ids"]
    for task, source in {"a": timetable, "b": inflections}.items():
        text = shown(splits[task]["test"])
        assert text.shape[1] == chars_roberta.LENGTH == chars_roberta.LINES * source.WIDTH
        assert tokenizer.unk_token_id not in text and tokenizer.mask_token_id not in text
        assert blank not in splits[task]["test"]["labels"] and blank in text
    assert set(tokenizer.decode(shown(splits["b"]["test"])[0])) <= set(inflections.ALPHABET)


def test_a_line_says_one_moment_in_its_columns() -> None:
    noon = timetable.line(datetime(2031, 7, 4, 12, 5))
    assert noon == "2031-07-04 friday     4 july      2031 12:05 12:05pm 04/07/31 q3" and len(noon) == timetable.WIDTH
    assert "00:05 12:05am" in timetable.line(datetime(2031, 12, 31, 0, 5))


def test_numbers_and_ciphers_fill_their_columns():
    assert numerals.line(419) == "419 four hundred nineteen       cdxix        0643 1a3 0110100011"
    assert {len(numerals.line(number)) for number in range(1000)} == {numerals.WIDTH}
    assert ciphers.line("weep").split() == ["weep", "peew", "jrrc", "eepw"]
    assert len(ciphers.line("weep")) == ciphers.WIDTH == numerals.WIDTH
    mixed = chars_roberta._samples("a", "validation", True)
    assert {text[4] == "-" for text in mixed} == {True, False}  # dates, and numbers in words


@pytest.mark.parametrize(
    ("verb", "exceptions", "expected"),
    [
        ("walk", (), ("walks", "walked", "walking")),
        ("hate", (), ("hates", "hated", "hating")),
        ("free", (), ("frees", "freed", "freeing")),
        ("cry", (), ("cries", "cried", "crying")),
        ("play", (), ("plays", "played", "playing")),
        ("wash", (), ("washes", "washed", "washing")),
        ("abet", ("abetted", "abetting"), ("abets", "abetted", "abetting")),
        ("weep", ("wept",), ("weeps", "wept", "weeping")),
    ],
)
def test_verbs_are_inflected(verb: str, exceptions: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert inflections.forms(verb, exceptions) == (verb, *expected)
    cells = inflections.line(verb, exceptions)
    assert len(cells) == inflections.WIDTH and tuple(cells.split()) == (verb, *expected)


@needs_gcide
def test_the_label_of_a_place_is_the_token_that_follows() -> None:
    _, tokenizer, splits = _data("text-llama")
    for parts in splits.values():
        ids, labels = parts["train"]["input_ids"], parts["train"]["labels"]
        assert torch.equal(ids.flatten()[1:], labels.flatten()[:-1])
    texts = ["x = 1\n" * 40, "def f():\n    return 'é'\n"]
    first = text_causal.windows(texts, 1, tokenizer)["input_ids"]
    assert first.shape == (1, text_causal.LENGTH) and texts[0].startswith(tokenizer.decode(first[0])[:100])


def test_drawings_show_their_class() -> None:
    shown_dots, labels = drawings.dots(60, torch.Generator().manual_seed(0))
    bright = (shown_dots > 140).float().mean((1, 2))
    assert bright[labels == 4].mean() > 2 * bright[labels == 0].mean()
    for draw, classes in ((drawings.letters, drawings.LETTERS), (drawings.shapes, drawings.SHAPES)):
        pixels, labels = draw(100, torch.Generator().manual_seed(0))
        assert pixels.shape == (100, drawings.SIDE, drawings.SIDE) and pixels.dtype == torch.uint8
        assert labels.unique().tolist() == list(range(len(classes)))
        assert torch.equal(pixels, draw(100, torch.Generator().manual_seed(0))[0])


def test_stripes_run_along_their_direction() -> None:
    pixels, labels = drawings.stripes(200, torch.Generator().manual_seed(0))
    upright = pixels[labels == 0].float()  # along x: equal down every column
    assert upright.mean(1).std(1).mean() > 3 * upright.mean(2).std(1).mean()


def test_digits_are_enlarged_whole() -> None:
    pixels, labels = digits.images()
    assert pixels.shape == (1797, 28, 28) and labels.bincount().min() > 170
    assert not pixels[:, :2].any() and not pixels[:, :, -2:].any()


@needs_fashion
def test_turned_images_turn_back() -> None:
    pixels, labels = many.turned_fashion("train", torch.Generator().manual_seed(0))
    back = torch.stack([image.rot90(-turn) for image, turn in zip(pixels, labels.tolist(), strict=True)])
    assert torch.equal(back, many.fashion("train")[0][-len(pixels) :])


def test_scenes_show_the_things_in_their_boxes_the_last_in_front() -> None:
    things = torch.zeros(1, 2, 28, 28, dtype=torch.uint8)
    things[0, 0, 4:24, 2:26], things[0, 1] = 100, 200
    places = torch.tensor([[[0, 10], [20, 28]]])
    drawn, owners, boxes = scenes_source.composed(things, places, torch.Generator().manual_seed(0))
    assert (owners[0, 4:20, 12:36] == 0).all() and (owners[0, 20:48, 28:56] == 1).all()
    assert (owners == 0).sum() == 20 * 24 - 4 * 8 and (owners == -1).sum() == 56**2 - 28**2 - (20 * 24 - 4 * 8)
    assert (drawn[owners == 1] >= 200).all() and drawn[owners == -1].float().mean() < 100
    assert (56 * boxes[0]).tolist() == [[24.0, 14.0, 24.0, 20.0], [42.0, 34.0, 28.0, 28.0]]


def test_places_of_an_image_are_scored_by_their_own_candidates_where_one_is_asked_for() -> None:
    labels = torch.tensor([[[0, 1], [IGNORED, 2]]])
    said = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).movedim(-1, 1)
    metric = Metric("pixel accuracy", classes={"a": ("x", "y", "ground")}, axis=1, joint=False)
    data = {"x": said, "labels": labels}
    pair = Pair("toy", {}, {"a": {"test": data}}, metric)
    assert pair.score(lambda x: {"logits": x}, "a") == pytest.approx(2 / 3)
    assert pair.joint_score(lambda x: {"logits": x}) is None


def test_an_object_is_found_once_and_false_boxes_cost() -> None:
    boxes = torch.tensor(
        [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.26, 0.25, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1]]
    )
    assert overlap(boxes[:1], boxes)[0].tolist() == pytest.approx([1.0, 0.0, 0.49 / 0.51, 0.0025 / 0.2575])
    labels = torch.full((1, 3, 5), float(IGNORED))
    labels[0, :2] = torch.cat([torch.tensor([[0.0], [1.0]]), boxes[:2]], 1)

    def found(*said: int) -> tuple[int, int]:
        logits = torch.nn.functional.one_hot(torch.tensor([said]), 3).float()  # the last: nothing
        return Detection("found objects").tally({"logits": logits, "pred_boxes": boxes[None]}, labels)

    assert found(0, 1, 2, 2) == (2, 2)
    assert found(0, 1, 0, 2) == (2, 3)  # a second box for the first object
    assert found(0, 0, 2, 1) == (1, 4)  # a wrong class, and a box where there is nothing
    assert found(2, 2, 2, 2) == (0, 2)


def test_notations_say_the_same() -> None:
    assert notations.number(3949) == {
        "digits": "3949", "words": "three thousand nine hundred forty nine", "roman": "MMMCMXLIX"
    }  # fmt: skip
    assert notations.day(546) == {
        "iso": "1991-07-01", "long": "july 1 1991", "short": "01.07.91", "mixed": "1.VII.1991"
    }  # fmt: skip
    recipe, tokenizer, splits = _data("seq2seq-t5")
    for parts in splits.values():
        for data in parts.values():
            assert tokenizer.unk_token_id not in data["input_ids"] and tokenizer.unk_token_id not in data["labels"]
            told, asked = data["decoder_input_ids"], data["labels"]
            assert torch.equal(told[:, 1:][asked[:, 1:] != IGNORED], asked[:, :-1][asked[:, 1:] != IGNORED])
            assert (told[:, 0] == tokenizer.pad_token_id).all() and (asked == tokenizer.eos_token_id).sum() == len(
                told
            )


def test_a_frame_is_asked_for_the_digit_that_sounds_at_its_middle() -> None:
    heard, said = calls.calls("tones", 20, torch.Generator().manual_seed(0))
    assert (said[:, 0] == IGNORED).all() and said[said != IGNORED].unique().tolist() == list(range(10))
    kept = torch.diff(said, dim=1) == 0
    assert (~kept).sum(1).max() < calls.SOUNDS  # one piece a sound
    recipe, _, splits = _data("speech")
    labels = splits["a"]["train"]["labels"]
    assert labels.shape[1] == len(speech.middles(calls.LENGTH)) == 99
    with torch.no_grad():
        logits = recipe.untrained("a", None)(heard[:1]).logits
    assert logits.shape[1:] == (labels.shape[1], len(calls.DIGITS))


@needs_fashion
def test_smaller_groups_are_the_first_tasks_of_larger_ones_and_share_their_experts() -> None:
    for end, width in (("", 128), ("-narrow", 64)):
        groups = [RECIPES[f"many-{count}{end}"] for count in (2, 3, 4, 6, 8)]
        tasks = [list(group.seeds.items()) for group in groups]
        assert all(small == large[: len(small)] for small, large in zip(tasks, tasks[1:], strict=False))
        assert {group.folder for group in groups} == {f"many{end}"}
        assert groups[0].untrained("tops", None).config.hidden_size == width


def test_a_flip_and_shift_moves_the_image_whole() -> None:
    pixels = torch.zeros(200, 1, 28, 28)
    pixels[:, 0, 10:14, 8] = torch.tensor([1.0, 2, 3, 4])
    moved = fashion.flip_and_shift(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert torch.equal(moved.flatten(1).sort(1).values, pixels.flatten(1).sort(1).values)
    columns = {int(row.sum(0).argmax()) for row in moved[:, 0]}
    assert columns == {*range(6, 11), *range(17, 22)}  # column 8 or, mirrored, 19; two pixels either way


@needs_fashion
def test_the_prompt_is_new_and_made_of_known_words() -> None:
    _, tokenizer, splits = _data("captions-clip")
    assert captions_clip.PROMPT not in captions_clip.TEMPLATES
    for task, prompts in RECIPES["captions-clip"].metric(tokenizer).prompts.items():
        assert tokenizer.unk_token_id not in prompts["input_ids"]
        seen = splits[task]["train"]["input_ids"]
        assert set(prompts["input_ids"].unique().tolist()) <= set(seen.unique().tolist())
        assert not {tuple(row) for row in prompts["input_ids"].tolist()} & {tuple(row) for row in seen.tolist()}


def test_captions_tell_the_brightness_and_size_of_their_image() -> None:
    large_dark, small_bright = torch.full((28, 28), 100), torch.zeros(28, 28, dtype=torch.long)
    small_bright[:5] = 250
    pixels = torch.stack([large_dark, small_bright] * 50).to(torch.uint8)
    texts = captions_clip.captions(pixels, torch.zeros(100, dtype=torch.long), ("Coat",), torch.Generator())
    dark, bright = texts[::2], texts[1::2]
    assert all("bright" not in text and "small" not in text for text in dark)
    assert all("dark" not in text and "large" not in text for text in bright)
    assert any("large dark coat" in text for text in dark) and any("small bright coat" in text for text in bright)


@_pairs([name for name in RECIPES if not RECIPES[name].folder or name == "many-2"][::2])
def test_a_little_training_lowers_the_loss(name: str) -> None:
    recipe, tokenizer, splits = _data(name)
    torch.manual_seed(0)
    task = next(iter(splits))
    model = recipe.untrained(task, tokenizer).eval()  # without dropout, so that the loss is the batch's own
    batch = trim(_first(splits[task]["train"], 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(20):
        loss = recipe.loss(model, dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


class _Tiny(fashion.FashionResNet):
    """A ResNet of two blocks on a handful of images: everything that building does, in a second."""

    name = "tiny"
    schedule = Schedule(epochs=1, batch_size=8, learning_rate=0.05, weight_decay=0.0, optimizer="sgd")

    def config(self, **labels: dict) -> ResNetConfig:
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
        return ResNetConfig(num_channels=1, layer_type="basic", **sizes, **labels)

    def splits(self, tokenizer: None) -> Splits:
        def draw(seed: int) -> dict:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(0, 5, (40,), generator=generator)
            return {"pixel_values": torch.randn(40, 1, 28, 28, generator=generator), "labels": labels}

        parts = ("train", "validation", "test")
        return {task: {split: draw(10 * i + j) for j, split in enumerate(parts)} for i, task in enumerate("ab")}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(store.RECIPES, "tiny", _Tiny())
    return "tiny"


def test_training_is_repeatable(tiny: str) -> None:
    recipe = store.RECIPES[tiny]
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = recipe.untrained("a", None)
        fit(recipe, model, recipe.splits(None)["a"]["train"], seed=1)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_missing_experts_are_trained_saved_and_loaded(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m benchmarks.zoo"):
        load(tiny, tmp_path, train=False)
    pair = load(tiny, tmp_path)
    assert sorted(p.name for p in (tmp_path / tiny).iterdir()) == ["a", "b"]
    weights = [expert.state_dict() for expert in pair.experts.values()]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    again = load(tiny, tmp_path, train=False)
    assert pair.score(pair.experts["a"], "a") == again.score(again.experts["a"], "a")
    assert all(not expert.training for expert in again.experts.values())


def test_experts_found_elsewhere_are_copied(tiny: str, tmp_path: Path) -> None:
    store.build([tiny], tmp_path / "there")
    (tmp_path / "there" / tiny / "b").rename(tmp_path / "there" / f"{tiny}-b")  # the other layout
    said: list[str] = []
    store.build([tiny], tmp_path / "here", reuse=tmp_path / "there", say=said.append)
    assert [("copied" in line) for line in said] == [True, True]
    for task, folder in (("a", f"{tiny}/a"), ("b", f"{tiny}-b")):
        copied = tmp_path / "here" / tiny / task / "model.safetensors"
        assert copied.read_bytes() == (tmp_path / "there" / folder / "model.safetensors").read_bytes()


def test_pairs_with_one_folder_read_the_same_experts(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Twin(_Tiny):
        name, folder = "twin", "tiny"

    monkeypatch.setitem(store.RECIPES, "twin", Twin())
    first, again = load(tiny, tmp_path), load("twin", tmp_path, train=False)
    assert torch.equal(first.experts["b"].classifier[1].weight, again.experts["b"].classifier[1].weight)
    assert not (tmp_path / "twin").exists()


def test_an_unknown_pair_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of fashion-vit"):
        load("fashion-vgg", tmp_path)


def test_scores_count_hits_within_and_across_tasks() -> None:
    def data(labels: list[int]) -> dict:
        return {"x": torch.tensor(labels), "labels": torch.tensor(labels)}

    metric = Metric("accuracy", classes={"a": ("p", "q"), "b": ("r", "s", "t")})
    splits = {"a": {"test": data([0, 1, 1, 0])}, "b": {"test": data([2, 2, 0, 1])}}
    pair = Pair("toy", {}, splits, metric)

    def right(x: torch.Tensor, shift: int, classes: int) -> dict:
        return {"logits": torch.nn.functional.one_hot((x + shift) % classes, classes).float()}

    assert pair.score(partial(right, shift=0, classes=2), "a") == 1.0
    assert pair.score(partial(right, shift=1, classes=2), "a") == 0.0
    # Always pointing at task a's candidates is right for all of a and wrong for all of b, except that x = 2 means "r".
    assert pair.joint_score(partial(right, shift=0, classes=5)) == 0.5
    assert metric.chance(splits["b"]["test"]) == 0.5
    assert Pair("toy", {}, splits, Metric("words")).joint_score(partial(right, shift=0, classes=5)) is None


def test_calibration_has_no_labels_and_no_sample_twice() -> None:
    train = {"x": torch.arange(50), "labels": torch.zeros(50, dtype=torch.long)}
    pair = Pair("toy", {}, {"a": {"train": train}}, Metric("accuracy"))
    drawn = pair.calibration("a", 20)
    assert set(drawn) == {"x"} and len(drawn["x"].unique()) == 20
    assert torch.equal(drawn["x"], pair.calibration("a", 20)["x"])


@pytest.mark.skipif(not (SHARED / "fashion-resnet-a").is_dir(), reason="the shared experts are not here")
@needs_fashion
@pytest.mark.parametrize("name, task, expected", [("fashion-vit", "b", 0.934), ("fashion-resnet", "a", 0.922)])
def test_shared_experts_score_as_documented(name: str, task: str, expected: float) -> None:
    pair = load(name, SHARED, train=False)
    data = _first(pair.splits[task]["test"], 500)
    assert pair.metric.hits(pair.experts[task], data, {}) == pytest.approx(expected, abs=0.03)
