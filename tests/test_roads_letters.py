"""Words with odd letters, prompts that are empty or missing, and places that are counted in what a call was given."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace

import pytest
import torch
import zoo
import zoo_pipelines as pipes
from test_roads_words import bpe

import attnctl
from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.hosts.reading import folded, locate
from attnctl.core.hosts.words import Concept, find_words, row_texts
from attnctl.errors import AttnctlError, ConfigError, UnsupportedModelError
from attnctl.processors import Capture


def test_composed_and_decomposed_letters_are_the_same() -> None:
    composed, decomposed = (unicodedata.normalize(form, "a cát and a dog") for form in ("NFC", "NFD"))
    pipe = SimpleNamespace(transformer=zoo.build("wan", 1)[0], tokenizer=bpe(start=False))
    for prompt in (composed, decomposed):
        found = [find_words(pipe, prompt, [unicodedata.normalize(form, "cát")]) for form in ("NFC", "NFD")]
        assert found[0][0].positions == found[1][0].positions
        ids = pipe.tokenizer(prompt)["input_ids"]
        assert (
            unicodedata.normalize("NFC", pipe.tokenizer.decode([ids[p] for p in found[0][0].positions])).strip()
            == "cát"
        )


def test_words_of_scripts_without_blanks() -> None:
    pipe = SimpleNamespace(transformer=zoo.build("wan", 1)[0], tokenizer=bpe(start=False))
    prompt = "黒い猫と犬, a 猫"
    ids = pipe.tokenizer(prompt)["input_ids"]
    (dog,) = find_words(pipe, prompt, ["犬"])
    assert "犬" in pipe.tokenizer.decode([ids[p] for p in dog.positions])
    (second,) = find_words(pipe, prompt, ["猫#2"])
    assert min(second.positions) > max(dog.positions)


def test_texts_are_folded_with_their_characters() -> None:
    text, spans = folded("A  Cafe\u0301\nX")
    assert text == "a caf\u00e9 x"
    assert spans[5] == (6, 8)
    assert locate("CAF\u00c9 x", "say: A Cafe\u0301   X.") == (7, 16)
    assert locate("dog", "a cat") is None


def test_bytes_of_one_letter_do_not_shift_replaced_words() -> None:
    from attnctl.processors.editing.align import word_tokens

    tokenizer = bpe()
    prompt = "a 猫 and a cat"
    ids = tokenizer(prompt)["input_ids"]
    tokens = word_tokens(tokenizer, prompt)
    assert len(tokens) == 5
    assert tokenizer.decode([ids[i] for i in tokens[1]]).strip() == "猫"
    assert tokenizer.decode([ids[i] for i in tokens[4]]).strip() == "cat"


# Counts and prompts that are empty or missing -------------------------------------------------------------------


def test_places_count_in_the_embeddings_that_the_call_was_given() -> None:
    pipe, kwargs = pipes.build("sd")
    embeds = {f"{sign}prompt_embeds": torch.randn(1, 154, 32) for sign in ("", "negative_")}
    call = {k: v for k, v in kwargs.items() if "prompt" not in k} | embeds
    with attnctl.control(pipe, Capture(words=(120,), prompt="a cat")) as handle:
        pipes.run(pipe, call, num_inference_steps=1)
        assert handle.maps.tokens == (((120,),),)
    with (
        attnctl.control(pipe, Capture(words=(160,), prompt="a cat")),
        pytest.raises(ConfigError, match="attention sees 154 text tokens"),
    ):
        pipes.run(pipe, call, num_inference_steps=1)
    with (
        attnctl.control(pipe, Capture(words=("cat",), prompt="a cat")),
        pytest.raises(ConfigError, match="given 154 text tokens, where StableDiffusionPipeline makes 77"),
    ):
        pipes.run(pipe, call, num_inference_steps=1)


def test_an_empty_prompt_has_marks() -> None:
    pipe, kwargs = pipes.build("sd")
    for changes in ({"prompt": ""}, {"negative_prompt": ""}):
        rows = "uncond" if "negative_prompt" in changes else "cond"
        with attnctl.control(pipe, Capture(words=("<start>", "<end>"), rows=rows)) as handle:
            pipes.run(pipe, {**kwargs, **changes}, num_inference_steps=1)
            assert handle.maps.tokens == (((0,), (1,)),)
    with attnctl.control(pipe, Capture()), pytest.raises(ConfigError, match="the prompt '' has no word"):
        pipes.run(pipe, {**kwargs, "prompt": ""}, num_inference_steps=1)


def test_what_cannot_be_told_is_refused_in_words() -> None:
    pipe = SimpleNamespace(transformer=zoo.build("qwen", 1)[0], tokenizer=bpe())
    with pytest.raises(UnsupportedModelError, match="whole numbers"):
        row_texts(None, 1, "Capture", prompt="a cat")[0].find(pipe, ["cat"], 7, "Capture")
    assert row_texts(None, 2, "Capture")[1].find(pipe, [3], 7, "Capture") == (Concept("3", (3,)),)
    with pytest.raises(ConfigError, match="the prompt is not known"):
        row_texts(None, 1, "Capture")[0].find(pipe, ["cat"], 7, "Capture")


def test_one_prompt_that_is_said_for_several_frames_is_one() -> None:
    """FreeNoise encodes a prompt for the first and for the last frame."""
    call = PromptCall(prompts=("a cat", "a cat"))
    assert [r.prompt for r in row_texts(call, 1, "x")] == ["a cat"]
    with pytest.raises(AttnctlError, match="1 rows for 2 prompts"):
        row_texts(PromptCall(prompts=("a cat", "a dog")), 1, "x")
