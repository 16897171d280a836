//! Checkpoint files: reading in place, writing in a stream.
