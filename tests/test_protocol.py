"""The example bytes of the device's page are those of the code."""

import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cdc_mmpg.wire.messages import Layout, Versions, decode_layer, decode_upload, encode_layer, encode_upload

PAGE = Path(__file__).parents[1] / "src" / "cdc_mmpg" / "device" / "README.md"


def test_the_example_of_the_page_is_what_the_code_sends():
    layout, versions = Layout("low_rank", 2, 3, 1), Versions(bytes(range(16)), bytes(range(16, 32)))
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    feature = np.array([0.5, -0.25, *np.zeros(190)], np.float32)
    upload = encode_upload(feature, layout, versions, nonce=bytes(range(32, 48)))
    left, right = np.array([[1.0, -0.5]], np.float32), np.array([[0.25, 0.5, 1.0]], np.float32)
    layer = encode_layer([left, right], upload, layout, versions, key)
    shown = [bytes.fromhex(block) for block in re.findall(r"```hex\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    assert shown == [upload[:80], layer]
    assert np.array_equal(decode_upload(upload, [layout], versions).feature, feature)
    decoded = decode_layer(shown[1], upload, layout, versions, key.public_key())
    assert decoded[0][0] == pytest.approx([1, -0.504], abs=5e-4)
    assert decoded[1][0] == pytest.approx([0.252, 0.504, 1], abs=5e-4)
