//! What a unit writes, and the hashes by which it is known again.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_128;

use crate::error::{Error, Result};
use crate::io::{Checkpoint, Mapped, ShardWriter};
use crate::ops::{Cancel, pool};

/// Bytes that are written, read or hashed between two looks at the cancel flag.
const PIECE: usize = 1 << 20;

/// Bytes of a large tensor whose pages are held at a time: whole pieces.
pub(crate) const WINDOW: usize = 64 * PIECE;

/// A named tensor of the output, or a range of one, as a unit wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub name: String,
    /// Those of its bytes that were written.
    pub range: Range<usize>,
    /// Of these, in the file.
    pub sha256: [u8; 32],
    /// The content of a late entry, which is in no file until the shard is finished.
    pub late: Option<Vec<u8>>,
}

/// Writes the tensors of a unit to their places in a shard, and hashes them on the
/// way, while they are in the cache.
pub(crate) struct PartWriter<'a> {
    shard: &'a ShardWriter,
    cancel: &'a Cancel,
    parts: Vec<Part>,
    bytes: usize,
}

/// One tensor, or a range of it, that is written from its start to its end; others may
/// be written meanwhile.
pub(crate) struct Stream<'a> {
    shard: &'a ShardWriter,
    cancel: &'a Cancel,
    name: String,
    start: usize,
    offset: usize,
    hash: Sha256,
}

impl<'a> PartWriter<'a> {
    pub fn new(shard: &'a ShardWriter, cancel: &'a Cancel) -> PartWriter<'a> {
        PartWriter {
            shard,
            cancel,
            parts: Vec::new(),
            bytes: 0,
        }
    }

    pub fn cancel(&self) -> &'a Cancel {
        self.cancel
    }

    /// Starts a tensor.
    pub fn stream(&self, name: &str) -> Stream<'a> {
        self.stream_at(name, 0)
    }

    /// Starts a range of a tensor.
    pub fn stream_at(&self, name: &str, start: usize) -> Stream<'a> {
        Stream {
            shard: self.shard,
            cancel: self.cancel,
            name: name.into(),
            start,
            offset: start,
            hash: Sha256::new(),
        }
    }

    /// Writes a whole tensor.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut stream = self.stream(name);
        stream.write(bytes)?;
        self.end(stream);
        Ok(())
    }

    /// Ends a tensor.
    pub fn end(&mut self, stream: Stream) {
        let range = stream.start..stream.offset;
        self.bytes += range.len();
        self.parts.push(Part {
            name: stream.name,
            range,
            sha256: stream.hash.finalize().into(),
            late: None,
        });
    }

    /// Hands over a late entry.
    pub fn write_late(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.shard.write_late(name, bytes)?;
        self.bytes += bytes.len();
        self.parts.push(Part {
            name: name.into(),
            range: 0..bytes.len(),
            sha256: Sha256::digest(bytes).into(),
            late: Some(bytes.to_vec()),
        });
        Ok(())
    }

    /// All bytes that were written.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn into_parts(self) -> Vec<Part> {
        self.parts
    }
}

impl Stream<'_> {
    /// Writes what follows, piece by piece.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(PIECE) {
            self.cancel.check()?;
            self.shard.write_at(&self.name, self.offset, piece)?;
            self.hash.update(piece);
            self.offset += piece.len();
        }
        Ok(())
    }
}

/// Whether a shard holds these parts as they were written. If so they count as
/// written; otherwise none does.
pub fn verify(shard: &ShardWriter, parts: &[Part], cancel: &Cancel) -> Result<bool> {
    let mut buffer = vec![0; PIECE];
    for part in parts.iter().filter(|p| p.late.is_none()) {
        let mut hash = Sha256::new();
        let Range { start, end } = part.range;
        if end > shard.nbytes(&part.name)? {
            return Ok(false);
        }
        for offset in (start..end).step_by(PIECE) {
            cancel.check()?;
            let piece = &mut buffer[..PIECE.min(end - offset)];
            shard.read_at(&part.name, offset, piece)?;
            hash.update(piece);
        }
        if part.sha256 != <[u8; 32]>::from(hash.finalize()) {
            return Ok(false);
        }
    }
    for part in parts {
        accept(shard, part)?;
    }
    Ok(true)
}

/// Takes a part for written, as it is recorded.
pub fn accept(shard: &ShardWriter, part: &Part) -> Result<()> {
    match &part.late {
        Some(bytes) => shard.write_late(&part.name, bytes),
        None => shard.accept(&part.name, part.range.clone()),
    }
}

/// A hash by which these tensors of a source are known again. All threads work on
/// it: it has to keep up with the memory, not with an adversary. The pages of large ones
/// are given back on the way.
pub fn source_hash<'a>(
    source: &Checkpoint,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<[u8; 16]> {
    let mut digests = Vec::new();
    for name in names {
        let bytes = source.bytes(name)?;
        for (i, window) in bytes.chunks(WINDOW).enumerate() {
            digests.extend(piece_digests(window)?);
            if bytes.len() > WINDOW {
                source.give_back_part(name, i * WINDOW..(i + 1) * WINDOW)?;
            }
        }
        digests.extend((bytes.len() as u64).to_le_bytes());
    }
    Ok(XxHash3_128::oneshot(&digests).to_le_bytes())
}

/// The same of some bytes of a tensor.
pub fn source_part_hash(source: &Checkpoint, name: &str, part: Range<usize>) -> Result<[u8; 16]> {
    let bytes = source.bytes(name)?;
    let bytes = bytes.get(part.clone()).ok_or_else(|| Error::SizeMismatch {
        what: format!("bytes of tensor {name:?}"),
        expected: part.end,
        actual: bytes.len(),
    })?;
    Ok(XxHash3_128::oneshot(&content_digests(bytes)?).to_le_bytes())
}

/// The same of a whole file.
pub fn file_hash(path: impl AsRef<Path>) -> Result<[u8; 16]> {
    let map = Mapped::open(path.as_ref())?;
    Ok(XxHash3_128::oneshot(&content_digests(map.as_ref())?).to_le_bytes())
}

fn content_digests(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut digests = piece_digests(bytes)?;
    digests.extend((bytes.len() as u64).to_le_bytes());
    Ok(digests)
}

fn piece_digests(bytes: &[u8]) -> Result<Vec<u8>> {
    // One piece is hashed sooner than another thread wakes up.
    if bytes.len() <= PIECE {
        return Ok(bytes
            .chunks(PIECE)
            .flat_map(|p| XxHash3_128::oneshot(p).to_le_bytes())
            .collect());
    }
    pool::run(|| {
        let pieces = bytes.par_chunks(PIECE).map(XxHash3_128::oneshot);
        Ok(pieces.flat_map_iter(u128::to_le_bytes).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{EntryDType, FixedEntry, LateEntry};
    use crate::tensor::DType;
    use std::collections::BTreeMap;

    fn shard(path: &Path) -> ShardWriter {
        let fixed = |name: &str, len| FixedEntry {
            name: name.into(),
            dtype: EntryDType::Known(DType::U8),
            shape: vec![len],
        };
        let fixed = vec![fixed("a", PIECE + 3), fixed("none", 0)];
        let late = vec![LateEntry {
            name: "state".into(),
            max_len: 9,
        }];
        ShardWriter::create(path, fixed, late, BTreeMap::new()).unwrap()
    }

    #[test]
    fn what_was_written_is_known_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let content: Vec<u8> = (0..PIECE + 3).map(|i| (i % 251) as u8).collect();
        let cancel = Cancel::new();
        let first = shard(&path);
        let mut writer = PartWriter::new(&first, &cancel);
        let mut stream = writer.stream("a");
        stream.write(&content[..7]).unwrap();
        stream.write(&content[7..]).unwrap();
        writer.end(stream);
        writer.write("none", &[]).unwrap();
        writer.write_late("state", b"{}").unwrap();
        assert_eq!(writer.bytes(), content.len() + 2);
        let parts = writer.into_parts();
        assert_eq!(parts[0].sha256, <[u8; 32]>::from(Sha256::digest(&content)));
        first.finish().unwrap();
        let finished = std::fs::read(&path).unwrap();
        drop(first);

        // Opened again, finished or not, it is what it was.
        let again = shard(&path);
        assert!(again.finish().is_err(), "nothing is taken on trust");
        assert!(verify(&again, &parts, &cancel).unwrap());
        again.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), finished);

        let damaged = shard(&path);
        damaged.write_at("a", PIECE, b"x").unwrap();
        assert!(!verify(&damaged, &parts, &cancel).unwrap());
        assert!(damaged.finish().is_err());

        let stopped = Cancel::new();
        stopped.cancel();
        let stopped = verify(&shard(&path), &parts, &stopped);
        assert_eq!(stopped.unwrap_err(), Error::Cancelled);
    }

    #[test]
    fn every_byte_of_the_source_counts() {
        let mut bytes = vec![1u8; 2 * PIECE + 1];
        let whole = content_digests(&bytes).unwrap();
        assert_eq!(whole, content_digests(&bytes.clone()).unwrap());
        assert_ne!(whole, content_digests(&bytes[1..]).unwrap());
        bytes[PIECE] = 2;
        assert_ne!(whole, content_digests(&bytes).unwrap());
    }
}
