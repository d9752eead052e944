"""Damaged, foreign and old records: noticed always, and called by their kind."""

from __future__ import annotations

import base64
import os
import random
import struct

import numpy as np
import pytest

pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

import zstandard
from codec_kit import KEY, namespace, normal
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from hicache.tier.codec import HEADER_BYTES, Codec, Kind, PageCodec, decode
from hicache.tier.codec.forms import Form
from hicache.types import Outcome


def page_records() -> dict[str, tuple[bytes, bytes]]:
    """By codec: a record, and the page that it decodes to."""
    found = {}
    for name, data, dtype, codec in (
        ("exponents bf16", normal(1024), "bfloat16", "lossless"),
        ("exponents fp16", normal(1024, "float16"), "float16", "lossless"),
        ("exponents fp32", normal(512, "float32"), "float32", "lossless"),
        ("zstd", np.arange(4096, dtype=np.int64).tobytes(), "int8", "lossless"),
        ("raw", os.urandom(1500), "bfloat16", "lossless"),
        ("tiny", b"abc", "bfloat16", "lossless"),
        ("fp8", normal(1024), "bfloat16", "fp8-e4m3"),
        ("int8", normal(1024), "bfloat16", "int8-g64"),
        ("int4", normal(1000), "float16", "int4-g64"),
    ):
        made = bytes(PageCodec(namespace(len(data), dtype, codec)).encode(memoryview(data), KEY).record)
        into = bytearray(len(data))
        assert decode(memoryview(made), KEY, memoryview(into)).kind is Kind.GOOD
        found[name] = (made, bytes(into))
    return found


RECORDS = page_records()
each_record = pytest.mark.parametrize("name", RECORDS)
any_record = st.sampled_from(sorted(RECORDS))


def read(data: bytes | bytearray | memoryview, size: int, key: bytes = KEY) -> Kind:
    found = decode(memoryview(data), key, memoryview(bytearray(size)))
    assert (found.outcome is Outcome.OK) == (found.kind is Kind.GOOD)
    assert found.kind is Kind.GOOD or (found.reason and not found.checksum)
    return found.kind


def test_every_codec_is_here() -> None:
    assert {made[6] for made, _ in RECORDS.values()} == set(Codec) - {Codec.PLANES}


@each_record
def test_every_flipped_bit_is_noticed(name: str, rng: random.Random) -> None:
    """All bits of the header and of the payload's own header, and many of the rest."""
    good, page = RECORDS[name]
    damaged = bytearray(good)
    bits = range(len(good) * 8)
    for bit in sorted({*bits[: (HEADER_BYTES + 32) * 8], *rng.sample(bits, min(len(bits), 1500))}):
        damaged[bit // 8] ^= 1 << bit % 8
        kind = read(damaged, len(page))
        in_header = bit < HEADER_BYTES * 8
        assert kind in ({Kind.HEADER} if in_header else {Kind.STORED, Kind.PAGE}), bit
        damaged[bit // 8] ^= 1 << bit % 8
    assert read(damaged, len(page)) is Kind.GOOD


@each_record
def test_every_byte_set_to_anything_in_the_header_is_noticed(name: str) -> None:
    good, page = RECORDS[name]
    for at in range(HEADER_BYTES):
        for value in {0, 255, 1, good[at] ^ 0x55} - {good[at]}:
            assert read(good[:at] + bytes([value]) + good[at + 1 :], len(page)) is Kind.HEADER


@each_record
def test_every_truncation_and_extension_is_noticed(name: str) -> None:
    good, page = RECORDS[name]
    cuts = {*range(0, len(good), max(1, len(good) // 300)), *range(HEADER_BYTES + 30), len(good) - 1}
    for wrong in (*(good[:cut] for cut in cuts if cut < len(good)), good + b"\0", good + good):
        assert read(wrong, len(page)) is Kind.SIZE


@given(name=any_record, data=st.data())
def test_any_region_overwritten_is_noticed(name: str, data: st.DataObject) -> None:
    good, page = RECORDS[name]
    start = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(st.binary(min_size=1, max_size=64))[: len(good) - start]
    wrong = good[:start] + new + good[start + len(new) :]
    if wrong != good:
        assert read(wrong, len(page)) is not Kind.GOOD


@given(name=any_record, data=st.data())
def test_regions_swapped_are_noticed(name: str, data: st.DataObject) -> None:
    good, page = RECORDS[name]
    size = data.draw(st.integers(1, min(64, len(good) // 2)))
    one = data.draw(st.integers(0, len(good) - 2 * size))
    two = data.draw(st.integers(one + size, len(good) - size))
    wrong = bytearray(good)
    wrong[one : one + size], wrong[two : two + size] = good[two : two + size], good[one : one + size]
    if wrong != good:
        assert read(wrong, len(page)) is not Kind.GOOD


@given(one=any_record, two=any_record)
def test_the_header_of_one_page_on_the_payload_of_another_is_noticed(one: str, two: str) -> None:
    head, body = RECORDS[one][0][:HEADER_BYTES], RECORDS[two][0][HEADER_BYTES:]
    if one != two:
        assert read(head + body, len(RECORDS[one][1])) in {Kind.SIZE, Kind.STORED, Kind.PAGE}


@each_record
def test_another_pages_record_is_foreign(name: str) -> None:
    good, page = RECORDS[name]
    assert read(good, len(page), key=bytes(32)) is Kind.FOREIGN
    assert read(good, len(page) + 2) is Kind.SIZE


@given(st.binary(max_size=3000))
def test_garbage_never_raises(garbage: bytes) -> None:
    assert read(garbage, 100) in {Kind.SIZE, Kind.HEADER}


# -- records whose checksums hold, and that lie all the same


def forged(payload: bytes, raw_bytes: int, codec: int, form: int = Form.BFLOAT16, version: int = 2) -> bytes:
    head = struct.pack(
        "<4sHBBQQQQ32s",
        *(b"HKVP", version, codec, form, raw_bytes, len(payload), 0, xxh3_64_intdigest(payload), KEY),
    )
    return head + struct.pack("<Q", xxh3_64_intdigest(head)) + payload


@given(
    payload=st.binary(max_size=400),
    size=st.integers(0, 700),
    codec=st.sampled_from(list(Codec)),
    form=st.sampled_from(list(Form)),
    version=st.sampled_from([1, 2]),
)
def test_payloads_of_garbage_never_raise(
    payload: bytes, size: int, codec: Codec, form: Form, version: int
) -> None:
    assert read(forged(payload, size, codec, form, version), size) is not Kind.GOOD or not size


@given(name=any_record, data=st.data())
def test_damage_under_checksums_that_hold_never_raises(name: str, data: st.DataObject) -> None:
    """As a forger would do it: the decoders' own checks are reached."""
    good, page = RECORDS[name]
    payload = bytearray(good[HEADER_BYTES:])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, min(len(payload) - 1, 200)))] = data.draw(st.integers(0, 255))
    wrong = forged(bytes(payload), len(page), good[6], good[7])
    assert read(wrong, len(page)) in {Kind.PAYLOAD, Kind.PAGE}


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """A frame that claims 8 MiB in a page of 1000 bytes: nothing is allocated for it."""
    frame = zstandard.compress(bytes(8 << 20))
    assert read(forged(frame, 1000, Codec.ZSTD), 1000) is Kind.PAYLOAD


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("value", [1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_counts_that_lie_are_refused(at: int, value: int) -> None:
    good, page = RECORDS["exponents bf16"]
    payload = bytearray(good[HEADER_BYTES:])
    struct.pack_into("<I", payload, 4 * at, value)
    wrong = forged(bytes(payload), len(page), good[6], good[7])
    assert read(wrong, len(page)) in {Kind.PAYLOAD, Kind.PAGE}


@pytest.mark.parametrize(
    ("codec", "form", "version"),
    [(0, 0, 3), (0, 0, 0), (Codec.PLANES, 1, 2), (Codec.EXPONENTS, 1, 1), (99, 0, 2), (0, 99, 2)],
)
def test_what_another_release_may_have_written_is_told_apart_from_damage(
    codec: int, form: int, version: int
) -> None:
    assert read(forged(b"page", 4, codec, form, version), 4) is Kind.VERSION


# -- version 1

VERSION_1 = {
    "raw": (
        b"a page of format version 1",
        "NJ~~w0RR918UO$Q000008UO$Q00000_;W|5^foAQ0000000000009C61O)~M2nh-c3=Iws5D^j+6crX17#SKH9337X^(*`oy"
        "_)+rVIXi}XJsI7W*}y7a&2LBAa-SPb7^mGATa",
    ),
    "zstd": (
        bytes(1000) + b"tail",
        "NJ~~w0RRC2>;nJ*000007XSbN00000iO&du?n2q-1R=+n?RWS@009C61O)~M2nh-c3=Iws5D^j+6crX17#SKH9337X0y>55Y"
        "D!ucD77#BVC({I001xm0CZt#Yykk{D}V(",
    ),
    "planes": (
        (np.random.default_rng(1).standard_normal(512, dtype=np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        .tobytes(),
        "NJ~~w0RRF300aO400000)&c+k00000BI9a%`ms5Drgs-lmVUtt009C61O)~M2nh-c3=Iws5D^j+6crX17#SKH9337XR2@&1o"
        "MIl7D77#BU;qJS1_0)sE)UQZh65?>2LOO`NRkVnMJNC$04M;zB}n{zYq9*2(z4!92#*e3b*5M_-))RsM8WfxpqZ-%A*Hp`33"
        "UO-QUvXMk4l%8bUFdejNQ)RFHe!)F9Ws;P|+`pGl_oWNOb)NYgB3Fgj+q<A!pTJ2>`Tx?nkgX`K!Sgw#ktXr28_Z@9St0etG"
        "ksFZ=<9iugn*l3E%7TKwhe!bedImB3j}SN1T7pPV543m5+R0^<B;F>-%NaT@^y015%2TsUd0vLlUFMFHKmgYcQv=;P@Ofc0@"
        "w3-=cx>fT^Cz-)1`b+-?O@`DNgIgp~K-eNqDsyl)X4m-17dLN<a;tOuQVa?ntBlJB^f>EZu=VUL=5(p6eq{Atbfl6{WB<IUO"
        "Jw5QaiW$)qp$BSGiK~Bj>8;!)NRP`eaj#tf4uGIw#<1U~K`UUJ&9;@g<q@Qgf_5h+gV=f+RFege6yu5#I2-Tm#9Xjrxdj2un"
        "hjW9hHmBsyCD$cx55Zm(}EDv%*s&DA4VA!sxs<2M{ER7qB36Z=Hp+7)2mmPBBhv4y9fm2)=PmZWEMCk2*NZ~X<b=}cO9p##4"
        "?v;#*Zq@vvFe;l%_WU1&zYi=b8vB)vQM7qjTo&QKW(w+VYjQX+wfZ0H2Q}uISQ}tG5u0^+1?4UA$`;q@Y_Q@8y>o*G2{>5DN"
        "RL4pVA2p-vubIfkf(H&6_YQ^k2AIP)~6-MFo4B(usL9A|}svutt5>SWt0qP&ENlu*+@y9PTD?Z{cij2!3(QOb};=A*xD%8)i"
        "SE*f3l1@7&iPGXSjwUI{`bXC$BE*vKNZ-(&jsB~a<y_e&YC+n5AI5&C3PJZ9r7nb0bjA9;sAS7`!y|~>EplzWM7?=>#6I`W$"
        "9u9&90ZFDk${@<l>nDW9zE=60a(Xk4S|iiOJfjf-gVAd6?qd",
    ),
}


@pytest.mark.parametrize("name", VERSION_1)
def test_records_of_version_1_are_read(name: str) -> None:
    """Records as the first release wrote them, in base 85."""
    page, text = VERSION_1[name]
    old = base64.b85decode(text)
    into = bytearray(len(page))
    found = decode(memoryview(old), KEY, memoryview(into))
    assert (found.kind, bytes(into), found.checksum) == (Kind.GOOD, page, xxh3_64_intdigest(page))
    for bit in range(len(old) * 8):
        damaged = bytearray(old)
        damaged[bit // 8] ^= 1 << bit % 8
        assert read(damaged, len(page)) is not Kind.GOOD
