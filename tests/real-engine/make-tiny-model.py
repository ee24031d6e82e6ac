#!/usr/bin/env python3
"""A tiny language model of random weights that a real llama.cpp server loads: GGUF, about half a megabyte.

    usage: make-tiny-model.py OUT.gguf [--tokenizer-dir DIR]

Needs numpy and the `gguf` package; build-llama-server.sh leaves an environment with both in DEST_DIR/venv. No network,
no other model. The same call writes the same bytes.

The model is of the architecture qwen3: 2 layers, 64 wide, 4,096 tokens of context, a byte-level BPE vocabulary that
is trained below on a few lines of text, ChatML markers and template. What it says is nonsense with two properties that
tests may lean on: it is printable ASCII, and it never ends by itself, so that a request runs to its `max_tokens`
(unless a grammar leaves nothing but the end).

`--tokenizer-dir` also writes the same vocabulary as Hugging Face's tokenizer.json and tokenizer_config.json, for
whoever must see the tokens that the engine sees.
"""

import argparse
import collections
import json
import pathlib
import re
import sys

try:
    import gguf
    import numpy as np
except ImportError as error:
    sys.exit(f"make-tiny-model: {error.name} is missing; install it with: pip install 'gguf==0.19.0' 'numpy<3'")

NAME = "tiny-random"
SEED = 0
CONTEXT = 4096
LAYERS = 2
WIDTH = 64
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 32
FEED_FORWARD = 192
ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6

MERGES = 384
END_OF_TEXT, TURN_START, TURN_END = SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What the engine's pre-tokenizer "qwen2" splits by; the tokenizer.json must say the same.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Any English would do: it only decides which letters become one token.
CORPUS = """
The router reads a prompt, cuts it into blocks, and asks which worker already holds the first of them. A worker that
holds a long part of the prompt can begin to answer sooner, because it need not compute that part again. But a worker
that is busy is a bad choice even when it holds everything: the request would wait in its queue behind all the others.
So there is a cost for every worker, and the one with the lowest cost is chosen. When two are equal, chance decides.

A request has a life. It comes in, it is counted, it may wait, it is placed, and then the tokens begin to flow. If the
engine stops in the middle of a sentence, another engine is given the prompt and the words that were already said, and
goes on from there. The person who reads the answer should see nothing of this, except perhaps a short pause.

What do you want to know? Tell me about the weather, about the sea, about a small town in the north where the winter is
long and the summer is short. Write a story of one thousand words about a machine that counts. Please explain how this
works, step by step, and give an example with numbers. You are a helpful assistant. Hello, how are you today? I am
fine, thank you. Why is the sky blue? What is the name of the highest mountain in the world, and who was there first?

Some words are common: and, the, of, to, in, is, that, it, for, was, on, are, as, with, they, at, be, this, from, have,
or, by, one, had, not, but, what, all, were, when, we, there, can, an, your, which, their, said, if, do, will, each,
about, how, up, out, them, then, she, many, some, so, these, would, other, into, has, more, her, two, like, him, see,
time, could, no, make, than, been, its, now, people, my, made, over, did, down, only, way, find, use, may, water, long,
little, very, after, words, called, just, where, most, know. Zero, one, two, three, four, five, six, seven, eight, nine.
"""


def byte_characters():
    """The visible character that stands for each byte in a byte-level BPE vocabulary (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def train_merges(table):
    """The most frequent neighbour pairs of CORPUS, most frequent first; ties go by spelling, so that no run differs."""
    words = collections.Counter(re.findall(r" ?[A-Za-z]+|[^\sA-Za-z]+|\s", CORPUS))
    words = {tuple(table[byte] for byte in word.encode()): count for word, count in words.items()}
    merges = []
    while len(merges) < MERGES:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {merged(word, best): count for word, count in words.items()}
    return merges


def merged(word, pair):
    """`word` with every `pair` in it made one symbol."""
    out, at = [], 0
    while at < len(word):
        step = 2 if word[at : at + 2] == pair else 1
        out.append("".join(word[at : at + step]))
        at += step
    return tuple(out)


def random_weights(tokens, speakable):
    """Tensor name to array.

    Channel 0 is a constant that nothing but the embedding writes, so that the output layer has a bias: the tokens that
    the model must not say get a large negative one. All else is noise, with strong layers and sharp attention (the
    scale of 10 on the queries): then the next token hangs on the whole context, and not on the last token alone, which
    would end in a loop of one word that hides a lost or a doubled token.
    """
    rng = np.random.default_rng(SEED)

    def noise(rows, columns, scale=1.0):
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    def writes_back(columns):
        weights = noise(WIDTH, columns, 4.0)
        weights[0] = 0.0
        return weights

    def ones(size):
        return np.ones(size, dtype=np.float32)

    embedding = noise(len(tokens), WIDTH, np.sqrt(WIDTH))
    embedding[:, 0] = 4.0
    output = noise(len(tokens), WIDTH, 6.0)
    output[:, 0] = np.where(speakable, 0.0, -200.0)

    weights = {"token_embd.weight": embedding, "output_norm.weight": ones(WIDTH), "output.weight": output}
    for layer in range(LAYERS):
        weights |= {
            f"blk.{layer}.{name}.weight": value
            for name, value in {
                "attn_norm": ones(WIDTH),
                "attn_q": noise(HEADS * HEAD_WIDTH, WIDTH),
                "attn_k": noise(KV_HEADS * HEAD_WIDTH, WIDTH),
                "attn_v": noise(KV_HEADS * HEAD_WIDTH, WIDTH),
                "attn_q_norm": ones(HEAD_WIDTH) * 10.0,
                "attn_k_norm": ones(HEAD_WIDTH),
                "attn_output": writes_back(HEADS * HEAD_WIDTH),
                "ffn_norm": ones(WIDTH),
                "ffn_gate": noise(FEED_FORWARD, WIDTH),
                "ffn_up": noise(FEED_FORWARD, WIDTH),
                "ffn_down": writes_back(FEED_FORWARD),
            }.items()
        }
    return weights


def write_gguf(path, tokens, merges, weights):
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(NAME)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_vocab_size(len(tokens))

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokens.index(TURN_END))
    writer.add_eot_token_id(tokens.index(TURN_END))
    writer.add_pad_token_id(tokens.index(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(folder, tokens, merges):
    folder.mkdir(parents=True, exist_ok=True)
    plain = {token: id for id, token in enumerate(tokens) if token not in SPECIALS}
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens.index(token), "content": token, **special} for token in SPECIALS],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": plain,
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Write a tiny random model that llama.cpp loads.")
    parser.add_argument("out", metavar="OUT.gguf", type=pathlib.Path)
    parser.add_argument("--tokenizer-dir", metavar="DIR", type=pathlib.Path)
    arguments = parser.parse_args()

    table = byte_characters()
    merges = train_merges(table)
    tokens = [table[byte] for byte in range(256)] + ["".join(pair) for pair in merges]
    assert len(set(tokens)) == len(tokens), "two merges spell the same token"
    printable = {table[byte] for byte in range(ord(" "), ord("~") + 1)}
    speakable = [set(token) <= printable for token in tokens] + [False] * len(SPECIALS)
    tokens += SPECIALS

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that an interrupted run leaves no half model behind under the name that tests look for.
    unfinished = arguments.out.with_name(arguments.out.name + ".new")
    write_gguf(unfinished, tokens, merges, random_weights(tokens, speakable))
    unfinished.replace(arguments.out)
    if arguments.tokenizer_dir:
        write_tokenizer(arguments.tokenizer_dir, tokens, merges)
    print(f"make-tiny-model: {arguments.out}: {arguments.out.stat().st_size} bytes, {len(tokens)} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
