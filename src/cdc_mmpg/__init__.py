"""CDC-MMPG: adapting a device's video-language model by generating its last layer in the cloud."""
