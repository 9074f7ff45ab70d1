"""Tells by a file's first bytes that it is no text, whatever its name, even where all of them are valid UTF-8."""

import io
import pickletools
import re

START = 1 << 16  # bytes of a file that are looked at
MOST_CONTROLS = 0.1  # share of control characters in a text: UTF-16 of ASCII has a half of them
CONTROLS = bytes({*range(0x20), 0x7F} - set(b"\b\t\n\v\f\r\x1b"))
FORMATS = {
    "tar archive": rb".{257}ustar",
    "zip archive (or one of the formats that are one: docx, xlsx, jar, pt)": rb"PK(\x03\x04|\x05\x06|\x07\x08)",
    "7z archive": rb"7z\xbc\xaf",
    "rar archive": rb"Rar!\x1a",
    "ar archive": rb"!<arch>\n",
    "cpio archive": rb"07070[12][0-9A-Fa-f]{104}|070707[0-7]{70}",
    "gzip file": rb"\x1f\x8b",
    "bzip2 file": rb"BZh[1-9]1AY&SY",
    "xz file": rb"\xfd7zXZ\0",
    "zstd file": rb"\x28\xb5\x2f\xfd",
    "PDF": rb"%PDF-",
    "picture": rb"\x89PNG|GIF8[79]a|\xff\xd8\xff",
    "SQLite data base": rb"SQLite format 3\0",
    "Parquet file": rb"PAR1",
    "Arrow file": rb"ARROW1",
    "Avro file": rb"Obj\x01",
    "ORC file": rb"ORC[\n\x08]",
    "HDF5 file": rb"\x89HDF",
    "numpy file": rb"\x93NUMPY",
    "safetensors file": rb".{3}\0{5}\{",
    "GGUF file": rb"GGUF[\1-\x09]\0\0\0",
    "program": rb"\x7fELF|\0asm",
}
PATTERNS = {name: re.compile(pattern, re.DOTALL) for name, pattern in FORMATS.items()}
UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff")


def kind(start: bytes) -> str | None:
    """What a file is that begins with ``start`` (`START` bytes of it, or all) and is no text; None if it may be one."""
    if UTF16.match(start):
        return "is UTF-16 or UTF-32"
    for name, pattern in PATTERNS.items():
        if pattern.match(start):
            return f"begins as a {name} does"
    controls = len(start) - len(start.translate(None, CONTROLS))
    if controls > MOST_CONTROLS * len(start):
        share = f"{controls / len(start):.0%}"
        return f"has {share} control characters, as binary data has, or text in another encoding such as UTF-16"
    return "is a pickle" if _is_pickle(start) else None


def _is_pickle(start: bytes) -> bool:
    """Protocol 0 is ASCII (and 1 nearly). A longer file is one if it goes on as it began, to half of ``start``."""
    file, position = io.BytesIO(start), 0
    try:
        while file.tell() < len(start):  # one may follow another
            depth = 0
            marks: list[int] = []
            for code, _, at in pickletools.genops(file):
                position = at or 0
                needs = code.stack_before
                if pickletools.markobject in needs:
                    depth = marks.pop() - needs.index(pickletools.markobject)
                else:
                    depth -= len(needs)
                least = (marks[-1] if marks else 0) + ("PUT" in code.name)  # what is put into the memo stays
                if depth < least:
                    return False
                for made in code.stack_after:
                    if made is pickletools.markobject:
                        marks.append(depth)
                    else:
                        depth += 1
            if depth or marks:
                return False
        return len(start) > 3  # a few letters are a program that makes nothing
    except Exception:  # of many kinds: what is no pickle was read as one
        return len(start) == START and position > START // 2 and b"p0\n" in start
