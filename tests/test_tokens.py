"""Words as places among the text tokens of attention, for every way that pipelines lay their text out."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from attnctl import load_shapes
from attnctl.core.hosts.prompt import PromptWatch
from attnctl.core.hosts.textlayout import text_parts
from attnctl.core.hosts.words import Concept, find_words, prompt_words, weights
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.shapes.tokenizer import write_tokenizer

TOKENIZER = Path(__file__).parent / "fixtures" / "tiny_tokenizer"
PROMPT = "a watercolor of a dog, and a Black bear in the water"


def clip(length: int = 77) -> Any:
    return CLIPTokenizer(str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=length)


def t5(length: int = 512) -> Any:
    """Build a tokenizer that marks blanks as T5's does, has no start token, and cuts words into letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz,B"
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁dog", "▁bear", "▁water", "color", "▁", *letters]
    made = Tokenizer(models.Unigram([(p, -float(len(pieces) - i) / len(p)) for i, p in enumerate(pieces)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=length
    )


class Slow:
    """A tokenizer that tells no offsets."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.model_max_length, self.all_special_ids = inner.model_max_length, inner.all_special_ids
        self.decode, self.convert_ids_to_tokens = inner.decode, inner.convert_ids_to_tokens

    def __call__(self, text: str, truncation: bool = False) -> Any:
        return self.inner(text, truncation=truncation)


def host(family: str, **parts: Any) -> Any:
    denoiser = zoo.build(family, 1)[0]
    name = "unet" if family in ("sd15", "sdxl", "animatediff") else "transformer"
    return SimpleNamespace(**{name: denoiser, **parts})


def spelled(tokenizer: Any, concept: Concept, prompt: str, offset: int = 0) -> str:
    ids = tokenizer(prompt)["input_ids"]
    pieces = [tokenizer.convert_ids_to_tokens(ids[p - offset]) for p in concept.positions if 0 <= p - offset < len(ids)]
    return "".join(pieces).replace("</w>", " ").replace("▁", " ").strip()


@pytest.mark.parametrize("make", [clip, t5])
@pytest.mark.parametrize("slow", [False, True])
def test_a_word_is_the_tokens_that_spell_it(make: Any, slow: bool) -> None:
    tokenizer = make()
    family = "sd15" if make is clip else "wan"
    pipe = host(family, tokenizer=Slow(tokenizer) if slow else tokenizer)
    words = ["watercolor", "dog", "black bear", "water", "bear in the"]
    for concept in find_words(pipe, PROMPT, words):
        got = spelled(tokenizer, concept, PROMPT).lower()
        assert got.replace(" ", "") == concept.word.replace(" ", ""), (concept, got)
        assert len(concept.tokens) == len(concept.positions)


def test_the_slow_way_agrees_on_letters_outside_ascii(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path))
    tokenizer.model_max_length = 77
    prompt = "a café, naïve  dog\nand a red bear"
    words = ["café", "naïve", "dog", "red", "bear"]
    fast = find_words(host("sd15", tokenizer=tokenizer), prompt, words)
    assert find_words(host("sd15", tokenizer=Slow(tokenizer)), prompt, words) == fast
    assert [spelled(tokenizer, c, prompt).replace(" ", "") for c in fast][2:] == ["dog", "red", "bear"]


def test_a_repeated_word_is_all_its_occurrences_or_the_one_that_is_numbered() -> None:
    pipe = host("sd15", tokenizer=clip())
    every, first, third = find_words(pipe, "a cat, a dog and a cat", ["a", "a#1", "a#3"])
    assert len(every.positions) == 3
    assert first.positions == every.positions[:1]
    assert third.positions == every.positions[2:]
    (literal,) = find_words(pipe, "a cat#2 on a cat", ["cat#2"])
    assert literal.positions == (*find_words(pipe, "a cat#2 on a cat", ["cat#1"])[0].positions, 3, 4)


def test_a_word_inside_a_longer_word_does_not_count() -> None:
    pipe = host("sd15", tokenizer=clip())
    (water,) = find_words(pipe, "watercolor of water", ["water"])
    assert spelled(clip(), water, "watercolor of water") == "water"
    assert max(water.positions) == len(clip()("watercolor of water")["input_ids"]) - 2


def test_both_clips_of_sdxl_share_their_places() -> None:
    one = find_words(host("sd15", tokenizer=clip()), PROMPT, ["dog"])
    assert find_words(host("sdxl", tokenizer=clip(), tokenizer_2=clip()), PROMPT, ["dog"]) == one
    (second,) = find_words(
        host("sdxl", tokenizer=clip(), tokenizer_2=clip()), PROMPT, ["cat"], prompt_2="the cat of a dog"
    )
    assert second.positions == (2,)


def test_sd3_has_copies_in_clip_and_in_t5() -> None:
    three = {"tokenizer": clip(), "tokenizer_2": clip(), "tokenizer_3": t5(), "tokenizer_max_length": 77}
    (dog,) = find_words(host("sd3", **three, text_encoder_3=object()), PROMPT, ["dog"])
    clips, t5s = [p for p in dog.positions if p < 77], [p for p in dog.positions if p >= 77]
    ids = t5()(PROMPT)["input_ids"]
    assert clips == list(find_words(host("sd15", tokenizer=clip()), PROMPT, ["dog"])[0].positions)
    assert [t5().convert_ids_to_tokens(ids[p - 77]) for p in t5s] == ["▁dog"]
    (without,) = find_words(host("sd3", **three, text_encoder_3=None), PROMPT, ["dog"])
    assert list(without.positions) == clips
    # Past CLIP's end a word has its T5 copy alone.
    (late,) = find_words(host("sd3", **three, text_encoder_3=object()), "a " * 80 + "dog", ["dog"])
    assert min(late.positions) > 77


def test_flux_reads_t5_alone_and_its_second_prompt() -> None:
    pipe = host("flux", tokenizer=clip(), tokenizer_2=t5())
    (dog,) = find_words(pipe, "a dog", ["dog"])
    assert spelled(t5(), dog, "a dog") == "dog"
    (bear,) = find_words(pipe, "a dog", ["bear"], prompt_2="a bear")
    assert spelled(t5(), bear, "a bear") == "bear"


def test_pixart_lowers_its_prompt_and_auraflow_has_registers_in_front() -> None:
    (bear,) = find_words(host("pixart", tokenizer=t5()), "  A Bear", ["Bear"])
    assert spelled(t5(), bear, "a bear") == "bear"
    registers = zoo.build("auraflow", 1)[0].register_tokens.shape[1]
    (dog,) = find_words(host("auraflow", tokenizer=t5()), "a dog", ["dog"])
    assert spelled(t5(), dog, "a dog", registers) == "dog"


def test_the_shipped_models_have_one_token_a_word() -> None:
    for name in ("text2image", "mmdit"):
        found = find_words(load_shapes(name), "a red circle and a blue square on gray", ["circle", "blue"])
        assert [c.positions for c in found] == [(3,), (6,)]


def test_whole_numbers_are_places() -> None:
    pipe = host("sd15", tokenizer=clip())
    assert find_words(pipe, "a cat", [2])[0].tokens == ("cat</w>",)
    bare = host("sana")  # no tokenizer and no known layout
    assert find_words(bare, "", [0, 5]) == (Concept("0", (0,)), Concept("5", (5,)))


def test_a_textual_inversion_is_all_of_its_vectors() -> None:
    pipe = pipes.build("sd")[0]
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1"])
    (toy,) = find_words(pipe, "a <toy> cat", ["<toy>"])
    assert toy.positions == (2, 3)
    assert find_words(pipe, "a <toy> cat", ["cat"])[0].positions == (4,)


def test_weights_are_means_over_tokens() -> None:
    w = weights([Concept("x", (1, 3)), Concept("y", (0,))], 5)
    assert w.tolist() == [[0, 1], [0.5, 0], [0, 0], [0.5, 0], [0, 0]]
    assert w.dtype == torch.float32


def test_prompt_words() -> None:
    assert prompt_words("A red-brown cat, a dog's hat!") == ("a", "red-brown", "cat", "dog's", "hat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["catt"], r"'catt' is not in the prompt 'a cat and a dog'. Did you mean 'cat'"),
        (["zebra"], "Its words: a, cat, and, dog"),
        ([""], "A word is empty"),
        ("cat", r"such as \['cat'\]"),
        ([], "words is empty"),
        (["cat#2"], "'cat' occurs once in the prompt .* Give 'cat'"),
        (["a#3"], "'a' occurs 2 times in the prompt .* Give 'a#1' to 'a#2'"),
        (["cat#0"], "occurs once"),
        ([0], "Place 0 is the start token"),
        ([6], "Place 6 is past the end of the prompt, whose last word ends at place 5"),
        ([76], "Place 76 is past the end of the prompt"),
        ([77], "Place 77 is past the end: attention sees 77 text tokens, 0 to 76"),
        ([-1], "Place -1 is negative"),
        ([True], "True is neither"),
        ([1.5], "1.5 is neither"),
    ],
)
def test_bad_words(words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_words(host("sd15", tokenizer=clip()), "a cat and a dog", words)


def test_a_word_that_was_cut_off_is_an_error_that_says_so() -> None:
    pipe = host("sd15", tokenizer=clip())
    assert find_words(pipe, "a " * 74 + "cat", ["cat"])[0].positions == (75,)
    with pytest.raises(ConfigError, match=r"'cat' is cut off: the prompt has 78 tokens, and tokenizer keeps 77"):
        find_words(pipe, "a " * 75 + "cat", ["cat"])
    with pytest.raises(ConfigError, match="keeps 4"):
        find_words(host("wan", tokenizer=t5()), "a bear a dog", ["dog"], max_sequence_length=4)


def test_pipelines_without_tokenizer_or_known_layout_ask_for_places() -> None:
    with pytest.raises(UnsupportedModelError, match=r"has no tokenizer.*whole numbers"):
        find_words(host("sd15"), "a cat", ["cat"])
    with pytest.raises(UnsupportedModelError, match=r"does not know.*whole numbers"):
        find_words(host("qwen", tokenizer=t5()), "a cat", ["cat"])
    with pytest.raises(ConfigError, match="attention sees 4 text tokens"):
        weights([Concept("x", (4,))], 4)


def test_parts_follow_the_call_default() -> None:
    pipe = pipes.build("flux")[0]
    pipe.tokenizer_2 = t5()
    assert [p.length for p in text_parts(pipe)] == [512]
    assert [p.length for p in text_parts(pipe, 64)] == [64]


# Hearing the prompt of a call -----------------------------------------------------------------------------------


def heard(name: str, **changes: Any) -> tuple[Any, Any]:
    pipe, kwargs = pipes.build(name)
    watch = PromptWatch(pipe).attach()
    try:
        pipes.run(pipe, {**kwargs, **changes}, num_inference_steps=1)
        return watch.call, pipe
    finally:
        watch.detach()
        watch.detach()
        assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()


@pytest.mark.parametrize("name", ["sd", "sd_img2img", "sd_inpaint", "sd_controlnet", "animatediff"])
def test_the_prompt_is_heard(name: str) -> None:
    call, _ = heard(name)
    assert call.prompts == ("a cat",)
    assert call.negatives == ("ugly",)
    assert call.images == 1


def test_batches_and_pictures_a_prompt_are_heard() -> None:
    call, _ = heard("sd", prompt=["a cat", "a dog"], negative_prompt=["ugly", "ugly"], num_images_per_prompt=2)
    assert call.prompts == ("a cat", "a dog")
    assert call.negatives == ("ugly", "ugly")
    assert call.images == 2


def test_embeddings_are_no_prompt() -> None:
    assert heard("flux")[0] is None


def test_a_negative_prompt_that_is_encoded_by_itself_is_no_new_call() -> None:
    pipe = pipes.build("flux_cfg")[0]
    watch = PromptWatch(pipe)
    watch.begin()
    watch.heard("encode_prompt", (), {"prompt": "a cat", "prompt_2": None, "max_sequence_length": 64})
    watch.heard("encode_prompt", (), {"prompt": "ugly"})
    assert watch.call is not None
    assert (watch.call.prompts, watch.call.negatives, watch.call.max_sequence_length) == (("a cat",), ("ugly",), 64)
    watch.close()
    watch.heard("encode_prompt", ("a dog",), {})
    assert watch.call.prompts == ("a dog",)


def test_a_call_that_failed_leaves_no_prompt_behind() -> None:
    pipe, kwargs = pipes.build("sd")
    watch = PromptWatch(pipe).attach()
    with pytest.raises(TypeError):
        pipe.encode_prompt("a bird")  # too few arguments
    with pytest.raises(ValueError, match="divisible"):
        pipe("a cat", height=33, width=24)
    assert watch.call is None
    pipes.run(pipe, kwargs, num_inference_steps=1)
    assert watch.call is not None
    assert watch.call.prompts == ("a cat",)
    watch.detach()


def test_a_copied_pipeline_is_not_listened_to() -> None:
    pipe, kwargs = pipes.build("sd")
    watch = PromptWatch(pipe).attach()
    other = copy.deepcopy(pipe)
    pipes.run(other, kwargs, num_inference_steps=1)
    assert watch.call is None
    assert other.encode_prompt.__self__ is other
    watch.detach()


def test_tokens_that_stand_for_no_text_are_asked_for_by_name() -> None:
    marks = ["<start>", "<end>", "<pad>"]
    pipe = host("sd15", tokenizer=clip())
    start, end, pad = find_words(pipe, "a cat", marks)
    last = len(clip()("a cat")["input_ids"]) - 1
    assert (start.positions, end.positions, pad.positions) == ((0,), (last,), tuple(range(last + 1, 77)))
    assert find_words(host("sdxl", tokenizer=clip(), tokenizer_2=clip()), "a cat", marks) == (start, end, pad)
    # T5 marks no start; where two encoders stand in a row, each has its own.
    sd3 = host("sd3", tokenizer=clip(), tokenizer_2=clip(), tokenizer_3=t5(), text_encoder_3=object())
    start, end, _ = find_words(sd3, "a cat", marks, max_sequence_length=20)
    assert start.positions == (0,)
    assert end.positions == (last, 77 + len(t5()("a cat")["input_ids"]) - 1)
    with pytest.raises(ConfigError, match="No token is <start> here"):
        find_words(host("wan", tokenizer=t5()), "a cat", ["<start>"])
    # A prompt that is cut off ends with its mark and has no padding.
    long = " ".join(["cat"] * 90)
    assert find_words(pipe, long, ["<end>"])[0].positions == (76,)
    with pytest.raises(ConfigError, match="leaves no room"):
        find_words(pipe, long, ["<pad>"])


def test_a_prompt_that_holds_the_name_of_a_mark_means_its_own_words() -> None:
    pipe = host("sd15", tokenizer=clip())
    (own,) = find_words(pipe, "a <end> sign", ["<end>"])
    assert own.positions != find_words(pipe, "a sign", ["<end>"])[0].positions
    assert len(own.positions) >= 1
