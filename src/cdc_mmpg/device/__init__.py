"""The device client: answers questions about clips, uploads a feature and downloads the weights of the last layer.

Does not need torch; depends on numpy, av, tokenizers, onnxruntime, cryptography and httpx2 only.
"""

from cdc_mmpg.device.client import Answer, Device

__all__ = ["Answer", "Device"]
