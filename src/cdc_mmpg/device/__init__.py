"""The device: clips and questions become answers here; a feature goes up, the weights of the last layer come down.

No torch: numpy, av, tokenizers, onnxruntime, cryptography and httpx2 are all it needs.
"""

from cdc_mmpg.device.client import Answer, Device

__all__ = ["Answer", "Device"]
