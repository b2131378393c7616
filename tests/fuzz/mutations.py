"""Ways to break a video file: of its bytes, and of its boxes (mp4), elements (EBML) or chunks (AVI)."""

import random
from collections.abc import Callable
from typing import NamedTuple


class Part(NamedTuple):
    """A box, element or chunk: its size field lies at `size_at` to `body`, its content from there to `end`."""

    start: int
    size_at: int
    body: int
    end: int


MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"moof", b"traf", b"mvex"}
EBML_PARENTS = {0x18538067, 0x114D9B74, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB, 0xB7}


def mp4_boxes(data: bytes, start: int = 0, end: int | None = None) -> list[Part]:
    parts, end = [], len(data) if end is None else end
    while start + 8 <= end:
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8 or start + size > end:
            break
        parts.append(Part(start, start, start + 8, start + size))
        if data[start + 4 : start + 8] in MP4_PARENTS:
            parts += mp4_boxes(data, start + 8, start + size)
        start += size
    return parts


def ebml_elements(data: bytes, start: int = 0, end: int | None = None) -> list[Part]:
    parts, end = [], len(data) if end is None else end
    while start + 2 <= end and data[start]:
        id_length = 9 - data[start].bit_length()
        at = start + id_length
        if at >= end or not data[at]:
            break
        length = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
        body = at + length
        if size == (1 << 7 * length) - 1:  # unknown: to the end
            size = end - body
        if body + size > end:
            break
        parts.append(Part(start, at, body, body + size))
        if int.from_bytes(data[start:at], "big") in EBML_PARENTS:
            parts += ebml_elements(data, body, body + size)
        start = body + size
    return parts


def avi_chunks(data: bytes, start: int = 0, end: int | None = None) -> list[Part]:
    parts, end = [], len(data) if end is None else end
    while start + 8 <= end:
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if start + 8 + size > end:
            break
        parts.append(Part(start, start + 4, start + 8, start + 8 + size))
        if data[start : start + 4] in (b"RIFF", b"LIST"):
            parts += avi_chunks(data, start + 12, start + 8 + size)
        start += 8 + size + size % 2
    return parts


def parts_of(data: bytes) -> list[Part]:
    """By the file's first bytes; of other containers none."""
    if data[4:8] == b"ftyp":
        return mp4_boxes(data)
    if data[:4] == b"\x1aE\xdf\xa3":
        return ebml_elements(data)
    return avi_chunks(data) if data[:4] == b"RIFF" else []


def flip_bits(data: bytes, other: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 8, 64, 512))):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def flip_header_bits(data: bytes, other: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 4, 16))):
        found[draw.randrange(min(len(found), 1024))] ^= 1 << draw.randrange(8)
    return bytes(found)


def truncate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def zero(data: bytes, other: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    count = min(draw.choice((4, 64, 4096)), len(data) - start)
    return data[:start] + bytes(count) + data[start + count :]


def splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The head of one file and the tail of another."""
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def insert_noise(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.choice((1, 3, 1000))) + data[at:]


def delete_part(data: bytes, other: bytes, draw: random.Random) -> bytes:
    part = draw.choice(parts_of(data))
    return data[: part.start] + data[part.end :]


def repeat_part(data: bytes, other: bytes, draw: random.Random) -> bytes:
    part = draw.choice(parts_of(data))
    return data[: part.end] + data[part.start : part.end] * draw.choice((1, 10, 100)) + data[part.end :]


def resize_part(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Another number in the size field."""
    part = draw.choice(parts_of(data))
    count = min(4, part.body - part.size_at)
    value = draw.choice((0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, draw.randrange(2**16))) % 256**count
    order = "little" if data[:4] == b"RIFF" else "big"
    return data[: part.size_at] + value.to_bytes(count, order) + data[part.size_at + count :]


def extreme_number(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """An extreme number at the head of a part: counts, offsets, sizes of frames."""
    part = draw.choice(parts_of(data))
    at = part.body + 2 * draw.randrange(1 + min(40, (part.end - part.body) // 2))
    value = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\x7f", b"\x00\x01"))
    return data[:at] + value + data[at + len(value) :]


def swap_streams(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The content of the largest part, the frames, from the other file."""
    mine, theirs = (max(parts_of(file), key=lambda p: p.end - p.body, default=None) for file in (data, other))
    content = other if theirs is None else other[theirs.body : theirs.end]
    size = mine.end - mine.body
    return data[: mine.body] + content[:size].ljust(size, b"\0") + data[mine.end :]


ANY: tuple[Callable, ...] = (flip_bits, flip_header_bits, truncate, zero, splice, insert_noise)
STRUCTURED: tuple[Callable, ...] = (delete_part, repeat_part, resize_part, extreme_number, swap_streams)


def mutate(files: list[bytes], draw: random.Random) -> tuple[bytes, str]:
    """A broken version of one of the files, small ones more often, and what was done to it."""
    data, other = draw.choices(files, [1 / max(len(file), 10_000) for file in files], k=2)
    names = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not data:
            break
        act = draw.choice(ANY + STRUCTURED if parts_of(data) else ANY)
        data = act(data, other, draw)[: 2**22]
        names.append(act.__name__)
    return data, "+".join(names)
