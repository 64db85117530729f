"""Words where users' pipelines really put them: templates, cleaning, padding sides, several encoders, odd letters.

Each pipeline encodes with its own code, with a tiny random encoder and a tokenizer of its kind. Where the encoder is
causal, the place of a word is known without any layout: exchanged for another word of one token, it changes the
embeddings from its own place on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from attnctl.core.hosts.prompt import PromptCall, PromptWatch
from attnctl.core.hosts.words import find_words, row_texts, words_in
from attnctl.errors import ConfigError

PROMPT = "a photo of a cat on a mat"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]


def bpe(side: str = "right", start: bool = True, length: int = 2048) -> Any:
    """Train a byte-level tokenizer, in which every word of the prompt is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = ["a photo of a cat on a mat", " a photo of a dog on a mat", "the cat and the dog", " user assistant system"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(words * 20, trainer)
    if start:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=side,
        model_max_length=length,
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny(kind: str, vocab: int = 512, width: int = 16) -> nn.Module:
    """Build a tiny text encoder with random weights."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(vocab_size=vocab, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        return T5EncoderModel(config).eval()
    return (Gemma2Model(Gemma2Config(**shape)) if kind == "gemma" else Qwen3Model(Qwen3Config(**shape))).eval()


class TokensFirst(nn.Module):
    """ChatGLM's order of axes: its hidden states have the tokens before the rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.dtype, self.config = torch.float32, inner.config

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, output_hidden_states: bool) -> Any:
        made = self.inner(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return SimpleNamespace(hidden_states=tuple(x.transpose(0, 1) for x in made.hidden_states))


class Positioned(PreTrainedTokenizerFast):
    """A tokenizer that gives positions, as ChatGLM's does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made["position_ids"] = (made["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return made


def qwen() -> Any:
    pipe = pipes.build("qwen")[0]
    pipe.tokenizer, pipe.text_encoder = bpe(start=False), tiny("qwen")
    return pipe


def zimage() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=tiny("qwen"),
        tokenizer=bpe(start=False),
        transformer=zoo.build("zimage", 1)[0],
    )


def klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=tiny("qwen"),
        tokenizer=bpe(start=False),
        transformer=zoo.build("flux2", 1)[0],
    )


def lumina() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=zoo.build("lumina2", 1)[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=tiny("gemma"),
        tokenizer=bpe(),
    )


def sana() -> Any:
    pipe = pipes.build("sana")[0]
    pipe.tokenizer, pipe.text_encoder = bpe(), tiny("gemma")
    return pipe


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        tokenizer=bpe("left"),
        text_encoder=tiny("qwen"),
        vae=None,
        transformer=zoo.build("cogview4", 1)[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=tiny("qwen"),
        tokenizer=bpe(),
        transformer=zoo.build("hunyuanvideo", 1)[0],
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def kolors() -> Any:
    tokenizer = bpe("left")
    tokenizer.__class__ = Positioned
    return diffusers.KolorsPipeline(
        vae=None,
        text_encoder=TokensFirst(tiny("qwen")),
        tokenizer=tokenizer,
        unet=zoo.build("sdxl", 1)[0],
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


INSTRUCTION = ["Improve the prompt.", "It is a cat: "]
CAUSAL: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "qwen-image": (qwen, {}),
    "z-image": (zimage, {"do_classifier_free_guidance": False}),
    "flux2-klein": (klein, {"text_encoder_out_layers": (1, 2, 3)}),
    "lumina2": (lumina, {"do_classifier_free_guidance": False}),
    "sana": (
        sana,
        {"do_classifier_free_guidance": False, "complex_human_instruction": INSTRUCTION},
    ),
    "sana without instruction": (sana, {"do_classifier_free_guidance": False}),
    "hunyuan-video": (
        hunyuan_video,
        {
            "prompt_template": {"template": "on a mat of a cat: {} and", "crop_start": 3},
            "pooled_prompt_embeds": torch.zeros(1, 8),
        },
    ),
    "cogview4": (cogview4, {"do_classifier_free_guidance": False}),
    "kolors": (kolors, {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "device": "cpu"}),
}


def encoded(pipe: Any, prompt: Any, **options: Any) -> tuple[PromptCall, Any]:
    """Encode a prompt as a call does, and return what was heard and the embeddings."""
    watch = PromptWatch(pipe).attach()
    try:
        watch.begin()
        with torch.no_grad():
            out = pipe.encode_prompt(prompt=prompt, **options)
        assert watch.call is not None
        return watch.call, out[0] if isinstance(out, tuple) else out
    finally:
        watch.detach()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_word_is_where_the_embeddings_begin_to_change(name: str) -> None:
    make, options = CAUSAL[name]
    pipe = make()
    tokenizer, cls = pipe.tokenizer, type(pipe.tokenizer)
    call, embeddings = encoded(pipe, [PROMPT], **options)
    _, other = encoded(pipe, [PROMPT.replace("cat", "dog")], **options)
    assert call.readings is not None
    (cat,) = words_in(call.readings[0], ["cat"])
    changed = (embeddings[0] != other[0]).any(-1).nonzero()[:, 0]
    assert cat.positions == (int(changed[0]),)
    assert [t.strip("Ġ") for t in cat.tokens] == ["cat"]
    # Nothing is left behind on the tokenizer or the encoder.
    assert type(tokenizer) is cls
    assert "_attnctl_heard" not in vars(tokenizer)
    assert not pipe.text_encoder._forward_hooks


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "sana", "kolors"])
def test_words_of_a_template_are_no_words_of_the_prompt(name: str) -> None:
    make, options = CAUSAL[name]
    call, _ = encoded(make(), ["a photo of a mat"], **options)
    assert call.readings is not None
    for word in ("user", "Improve", "system", "cat"):
        with pytest.raises(ConfigError, match="is not in the prompt 'a photo of a mat'"):
            words_in(call.readings[0], [word])


def test_uneven_prompts_of_a_batch_have_their_own_places() -> None:
    call, embeddings = encoded(
        cogview4(), ["a cat", "a photo of a photo of a photo of a cat on a mat"], do_classifier_free_guidance=False
    )
    assert call.readings is not None
    ends = [words_in(own, ["cat"])[0].positions for own in call.readings]
    length = embeddings.shape[1]
    assert ends[0] == (length - 1,)  # left padding: the short prompt ends where the long one does
    assert ends[1][0] == length - 4


def test_prompts_in_a_batch_with_several_pictures_and_negatives() -> None:
    pipe, _ = pipes.build("sd")
    call, _ = encoded(
        pipe,
        ["a cat", "a dog on a cat"],
        device="cpu",
        num_images_per_prompt=2,
        do_classifier_free_guidance=True,
        negative_prompt=["ugly dog", "dog"],
    )
    assert call.readings is not None
    assert call.negative_readings is not None
    for text, own in zip(("a cat", "a dog on a cat"), call.readings, strict=True):
        assert words_in(own, ["cat"]) == find_words(pipe, text, ["cat"])
    assert words_in(call.negative_readings[0], ["dog"]) == find_words(pipe, "ugly dog", ["dog"])
    rows = row_texts(call, 4, "x")
    assert [r.number for r in rows] == [0, 0, 1, 1]


def test_a_caption_is_found_as_it_was_cleaned() -> None:
    pipe = pipes.build("pixart")[0]
    pipe.tokenizer, pipe.text_encoder = bpe(start=False), tiny("t5")
    prompt = "A 1024x768  PHOTO of a cat"
    call, _ = encoded(pipe, [prompt], do_classifier_free_guidance=False, clean_caption=False)
    assert call.readings is not None
    ids = pipe.tokenizer("a 1024x768  photo of a cat")["input_ids"]
    (cat,) = words_in(call.readings[0], ["Cat"])
    assert [pipe.tokenizer.convert_ids_to_tokens(ids[p]) for p in cat.positions] == list(cat.tokens)

    def clean(text: Any, clean_caption: bool = False) -> list[str]:
        return ["photo of a cat"]  # what cleaning makes of a size in pixels, where its packages are installed

    pipe._text_preprocessing = clean
    call, _ = encoded(pipe, [prompt], do_classifier_free_guidance=False, clean_caption=True)
    assert call.readings is not None
    ids = pipe.tokenizer("photo of a cat")["input_ids"]
    (cat,) = words_in(call.readings[0], ["cat"])
    assert [pipe.tokenizer.convert_ids_to_tokens(ids[p]) for p in cat.positions] == list(cat.tokens)
    # Without a run the same cleaning is asked of the pipeline.
    assert find_words(pipe, prompt, ["cat"]) == (cat,)


def test_several_encoders_of_one_text() -> None:
    pipe = pipes.build("sd3")[0]
    parts = pipes.Parts(batch=1, dtype=torch.float32, seed=0)
    for n, name in enumerate(("", "_2")):
        text = parts.text()
        setattr(pipe, f"tokenizer{name}", text["tokenizer"])
        config = text["text_encoder"].config
        from transformers import CLIPTextModelWithProjection

        torch.manual_seed(n)
        setattr(pipe, f"text_encoder{name}", CLIPTextModelWithProjection(config).eval())
    pipe.tokenizer_3, pipe.text_encoder_3 = bpe(start=False), tiny("t5", width=96)
    call, embeddings = encoded(
        pipe, ["a cat"], prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=32
    )
    assert call.readings is not None
    (cat,) = words_in(call.readings[0], ["cat"])
    assert embeddings.shape[1] == 77 + 32
    assert cat.positions == (2, 78)


def test_connectors_move_padding_behind_the_text() -> None:
    pipe = diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        audio_vae=None,
        text_encoder=tiny("gemma"),
        tokenizer=bpe(),
        connectors=nn.Linear(1, 1),
        transformer=zoo.build("ltx", 1)[0],
        vocoder=None,
    )
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 32, "device": "cpu"}
    call, _ = encoded(pipe, [PROMPT], **options)
    assert call.readings is not None
    ids = pipe.tokenizer(PROMPT, padding=False)["input_ids"]
    (cat,) = words_in(call.readings[0], ["cat"])
    assert [pipe.tokenizer.convert_ids_to_tokens(ids[p]) for p in cat.positions] == list(cat.tokens) == ["Ġcat"]
