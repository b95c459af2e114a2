"""The datasets, one file each; they import `cdc_mmpg`'s batches, frames, video and text, but no method."""
