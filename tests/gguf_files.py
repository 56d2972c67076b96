"""A writer of small GGUF files, and models to put into them."""

import struct

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
N, K, H, D, F, LAYERS = 2, 1, 16, 32, 64, 2  # rows of Q-types must be multiples of 32


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(thing):
    """A value of the metadata with its type before it."""
    if isinstance(thing, bool):
        return struct.pack("<I?", 7, thing)
    if isinstance(thing, int):
        return struct.pack("<II", 4, thing)
    if isinstance(thing, float):
        return struct.pack("<If", 6, thing)
    if isinstance(thing, list):
        if isinstance(thing[0], int):
            return struct.pack("<IIQ", 9, 5, len(thing)) + b"".join(struct.pack("<i", x) for x in thing)
        return struct.pack("<IIQ", 9, 8, len(thing)) + b"".join(map(string, thing))
    return struct.pack("<I", 8) + string(thing)


def file(metadata, tensors, *, magic=b"GGUF", version=3, alignment=32, offsets=None, pairs=None):
    """Bytes of a file.

    metadata: by key; tensors: {name: (NumPy shape, type, raw bytes)}; offsets: other than the right ones, by name;
    pairs: metadata as a list of pairs, in which a key may come twice.
    """
    pairs = list(metadata.items()) if pairs is None else pairs
    head = magic + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(string(key) + value(thing) for key, thing in pairs)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        offset = (offsets or {}).get(name, len(data))
        head += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        head += struct.pack("<IQ", TYPES.get(kind, kind), offset)
        data += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def byte_tokens():
    """The 256 characters that byte-level BPE writes for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) if b in printable else chr(256 + n) for b, n in zip(range(256), numbered(printable), strict=True)]


def numbered(printable):
    n = -1
    for b in range(256):
        n += b not in printable
        yield n


def metadata(architecture="llama", pre="smollm", **changes):
    """Of two layers with a byte-level tokenizer; keys of `changes` have __ for a dot; None leaves one out."""
    tokens = [*byte_tokens(), "Ġt", "he", "Ġthe", "12", "<|end|>", "<think>"]
    pairs = {
        "general.architecture": architecture,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": D,
        f"{architecture}.feed_forward_length": F,
        f"{architecture}.attention.head_count": N,
        f"{architecture}.attention.head_count_kv": K,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 1e5,
        f"{architecture}.rope.dimension_count": H,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 260 + [3, 4],
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2"],
        "tokenizer.ggml.eos_token_id": 260,
    }
    pairs |= {name.replace("__", "."): thing for name, thing in changes.items()}
    return {name: thing for name, thing in pairs.items() if thing is not None}


def tensors(seed=0, kind="Q4_1", vocabulary=262):
    """Of a Llama with tied embeddings: matrices of a quantised type, norms in F32."""
    rng = np.random.default_rng(seed)
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

    def matrix(rows, columns):
        blocks = rng.integers(0, 256, (rows * columns // 32, sizes[kind]), dtype=np.uint8)
        scale = rng.uniform(-1, 1, (len(blocks), 2 if kind == "Q4_1" else 1)).astype("<f2")
        blocks[:, : 2 * scale.shape[1]] = scale.view(np.uint8)
        return (rows, columns), kind, blocks.tobytes()

    def norm():
        return (D,), "F32", rng.standard_normal(D).astype("<f4").tobytes()

    found = {"token_embd.weight": matrix(vocabulary, D)}
    for i in range(LAYERS):
        found |= {
            f"blk.{i}.attn_norm.weight": norm(),
            f"blk.{i}.attn_q.weight": matrix(N * H, D),
            f"blk.{i}.attn_k.weight": matrix(K * H, D),
            f"blk.{i}.attn_v.weight": matrix(K * H, D),
            f"blk.{i}.attn_output.weight": matrix(D, N * H),
            f"blk.{i}.ffn_norm.weight": norm(),
            f"blk.{i}.ffn_gate.weight": matrix(F, D),
            f"blk.{i}.ffn_up.weight": matrix(F, D),
            f"blk.{i}.ffn_down.weight": matrix(D, F),
        }
    return found | {"output_norm.weight": norm()}


def damaged(data, rng):
    """The bytes with one damage: cut off, flipped, overwritten with a large number, or a piece moved or left out."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    if rng.random() < 0.7:
        at = int(rng.integers(min(6000, len(data))))  # where the header is
    match rng.integers(5):
        case 0:
            return bytes(data[:at])
        case 1:
            data[at] ^= 1 << int(rng.integers(8))
        case 2:
            data[at : at + 8] = struct.pack("<Q", (2**63, 2**40, 2**31, 2**64 - 1, 0, 3)[rng.integers(6)])
        case 3:
            del data[at : at + int(rng.integers(1, 40))]
        case 4:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
    return bytes(data)
