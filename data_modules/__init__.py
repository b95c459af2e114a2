"""The datasets, one file each; they know `cdc_mmpg`'s batches, frames, video and text, and no method."""
