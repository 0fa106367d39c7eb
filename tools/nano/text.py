"""The two text encoders: tokenizers made from the captions, and networks that learn first what captions say.

    python tools/nano/text.py WORK      # -> WORK/tokenizer, tokenizer_2, text_encoder, text_encoder_2

The encoders learn to tell thing, style and background from captions alone (a minute); trained with the transformer from
the start they learn next to nothing in ten. `flow.py` trains them on.
"""

import collections
import json
import math

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

from common import Stage, arguments, draws, warm_then_fall
from drawings import BACKGROUNDS, NAMES, STYLES, caption

T5_LENGTH = 16  # tokens of a caption, padding included: FLUX attends to padding, so sampling must use the same
WIDTH = 128
MORE_WORDS = "black ink drawing, line art, a sketch, a picture, a photo, an icon, a sticker, red, orange, purple, brown, grey, small, big, happy, with, and, of, the, in, style"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as OpenAI's


def corpus():
    rng, _ = draws("corpus", 0)
    lines = [caption(name, style, background, rng) for name in NAMES for style in STYLES for background in BACKGROUNDS]
    return lines + [MORE_WORDS] * 20


def clip_tokenizer(lines, folder):
    """Lower-case byte-level BPE in CLIP's two files: every byte, alone and at a word's end, and the end token last."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys(letters + [c + "</w>" for c in letters] + [left + right for left, right in merges] + [start, end])
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_tokenizer(lines, folder):
    """Unigram, a piece a word by frequency, and every letter at a price: a trainer would cut so few words to pieces."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[,.]"), "isolated"), pre_tokenizers.Metaspace()])
    counts = collections.Counter(piece for line in lines for piece, _ in split.pre_tokenize_str(line.lower()))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, math.log(count / counts.total())) for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    known = {piece for piece, _ in pieces}
    pieces += [(c, -15.0) for c in "▁" + "".join(map(chr, range(33, 127))) if c not in known]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.Lowercase()
    unigram.pre_tokenizer = split
    unigram.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=T5_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


class TextEncoders(nn.Module):
    """The tokenizers of `work`, and both encoders: those of `folder`, or new ones."""

    def __init__(self, work, folder=None):
        super().__init__()
        self.clip_tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(work / "tokenizer_2")
        if folder:
            self.clip = CLIPTextModel.from_pretrained(f"{folder}/text_encoder")
            self.t5 = T5EncoderModel.from_pretrained(f"{folder}/text_encoder_2")
            return
        n, m = len(self.clip_tokenizer), len(self.t5_tokenizer)
        self.clip = CLIPTextModel(CLIPTextConfig(
            vocab_size=n, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH,
            bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1,
        ))  # fmt: skip
        self.t5 = T5EncoderModel(T5Config(
            vocab_size=m, d_model=WIDTH, d_kv=32, d_ff=256, num_heads=4, num_layers=3, feed_forward_proj="gated-gelu", dropout_rate=0.0,
            is_encoder_decoder=False, use_cache=False,
        ))  # fmt: skip

    def forward(self, captions):
        """T5's states [batch, 16, 128] and CLIP's pooled vectors [batch, 128]; no mask, as in diffusers' FluxPipeline."""
        ids = self.clip_tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
        pooled = self.clip(input_ids=ids).pooler_output
        ids = self.t5_tokenizer(captions, padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt").input_ids
        return self.t5(input_ids=ids).last_hidden_state, pooled

    def save(self, folder):
        self.clip.save_pretrained(folder / "text_encoder")
        self.t5.save_pretrained(folder / "text_encoder_2")


def main():
    args = arguments(__doc__, steps=1000, batch=64, lr=2e-3)
    lines = corpus()
    clip, t5 = clip_tokenizer(lines, args.work / "tokenizer"), t5_tokenizer(lines, args.work / "tokenizer_2")
    longest = max(len(ids) for ids in t5(lines[:-20], truncation=False).input_ids)
    print(f"text: CLIP {len(clip)} tokens, T5 {len(t5)}, longest caption {longest}: {t5.tokenize(lines[0])}, {clip.tokenize(lines[0])}")
    assert longest <= T5_LENGTH

    encoders = TextEncoders(args.work)
    sizes = (len(NAMES), len(STYLES), len(BACKGROUNDS))
    heads = nn.ModuleList(nn.Linear(WIDTH, size) for _ in range(2) for size in sizes)  # of CLIP, of T5
    both = nn.ModuleList([encoders, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
    stage = Stage(args.work, "text", args.steps, both=both, optimizer=optimizer)
    for step in stage:
        rng, _ = draws("text", step)
        said = torch.tensor([[rng.randrange(size) for size in sizes] for _ in range(args.batch)])
        captions = [caption(NAMES[t], STYLES[s], list(BACKGROUNDS)[b], rng) for t, s, b in said.tolist()]
        states, pooled = encoders(captions)
        guesses = [head(vector) for vector, part in ((pooled, heads[:3]), (states.mean(1), heads[3:])) for head in part]
        loss = sum(F.cross_entropy(guess, said[:, i % 3]) for i, guess in enumerate(guesses))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_then_fall(step, args.steps, 50, 0.7)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        right = [(guess.argmax(1) == said[:, i % 3]).float().mean() for i, guess in enumerate(guesses)]
        stage.note(loss=loss, clip_thing=right[0], clip_style=right[1], t5_thing=right[3], t5_style=right[4])
    encoders.save(args.work)


if __name__ == "__main__":
    main()
