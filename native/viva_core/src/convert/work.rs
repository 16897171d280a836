//! The work of one tensor of a conversion.

use super::{Becomes, Conversion, Piece};
use crate::content::Read;
use crate::error::Result;
use crate::io::{Checkpoint, EntryDType, ShardWriter};
use crate::layout::gguf::RowOrder;
use crate::ops::{Cancel, cast, pool};
use crate::tensor::{Buffer, DType, Tensor};
use crate::transcode::{self, Change};
use crate::unit::{self, Part, PartWriter};

/// What came of one tensor.
pub struct Done {
    pub input_bytes: usize,
    pub output_bytes: usize,
    pub elements: usize,
    pub change: Change,
    /// Of what was read.
    pub source_hash: [u8; 16],
    /// What was written.
    pub parts: Vec<Part>,
}

impl Conversion {
    /// Converts one tensor and writes it; its mapped pages are given back.
    pub fn run(
        &self,
        source: &Checkpoint,
        name: &str,
        shard: &ShardWriter,
        cancel: &Cancel,
    ) -> Result<Done> {
        let piece = self.piece(name)?;
        for tensor in &piece.tensors {
            source.check_unchanged(tensor)?;
        }
        let mut out = PartWriter::new(shard, cancel);
        let done = pool::run(|| self.work(source, piece, &mut out));
        let source_hash = self.source_hash(source, name);
        piece.give_back(source)?;
        let change = done?;
        Ok(Done {
            input_bytes: piece.input_bytes,
            output_bytes: out.bytes(),
            elements: piece.elements(),
            change,
            source_hash: source_hash?,
            parts: out.into_parts(),
        })
    }

    /// A hash of the tensors that the one of this name is read from.
    ///
    /// # Errors
    /// `UnknownTensor`.
    pub fn source_hash(&self, source: &Checkpoint, name: &str) -> Result<[u8; 16]> {
        let tensors = &self.piece(name)?.tensors;
        unit::source_hash(source, tensors.iter().map(String::as_str))
    }

    fn work(&self, source: &Checkpoint, piece: &Piece, out: &mut PartWriter) -> Result<Change> {
        let cancel = out.cancel();
        let order = match self.goal.whole_file() {
            Some(whole) => whole.row_order(source, &piece.entry(piece.dtype))?,
            None => None,
        };
        match (&piece.becomes, self.goal.layout()) {
            (Becomes::Quantized(spec), Some(layout)) => {
                let Read::Quantized(q) = piece.read(source)? else {
                    return Ok(Change::NONE);
                };
                let (made, mut change) = transcode::transcode(&q, spec, cancel)?;
                if let Some(read) = layout.read_back(&made)? {
                    change = transcode::difference(&q, &read, cancel)?;
                }
                drop(q);
                piece.give_back(source)?;
                unit::spell_into(layout, &piece.name, made, order, out)?;
                Ok(change)
            }
            (Becomes::Dense(dtype), _) => {
                let Some(entry) = self.stored(source, piece, EntryDType::Known(*dtype))? else {
                    return Ok(Change::NONE);
                };
                let EntryDType::Known(dtype) = entry.dtype else {
                    return Ok(Change::NONE);
                };
                let (tensor, change) = dense(piece.read(source)?, dtype, cancel)?;
                write(out, &entry.name, &tensor, order)?;
                Ok(change)
            }
            (Becomes::Kept, _) => {
                let Some(entry) = self.stored(source, piece, piece.dtype)? else {
                    return Ok(Change::NONE);
                };
                let bytes = match &piece.tensors[..] {
                    [only] if *only == piece.name && order.is_none() => source.bytes(only)?,
                    _ => {
                        let Read::Dense(tensor) = piece.read(source)? else {
                            return Ok(Change::NONE);
                        };
                        write(out, &entry.name, &tensor, order)?;
                        return Ok(Change::NONE);
                    }
                };
                out.write(&entry.name, bytes)?;
                Ok(Change::NONE)
            }
            _ => Ok(Change::NONE),
        }
    }
}

/// A tensor in that dtype, and what that did to its values.
fn dense(read: Read, dtype: DType, cancel: &Cancel) -> Result<(Tensor, Change)> {
    match read {
        Read::Quantized(q) => {
            let tensor = transcode::dequantized(&q, dtype, cancel)?;
            let decoder = q.spec.format()?.decoder(&q)?;
            let change = transcode::change(&*decoder, &tensor, cancel)?;
            Ok((tensor, change))
        }
        Read::Dense(from) => {
            let mut buffer = Buffer::zeroed(from.len() * dtype.size());
            cast::cast_into(&from, dtype, buffer.bytes_mut(), cancel)?;
            let tensor = Tensor::from_buffer(dtype, from.shape().to_vec(), buffer)?;
            let change = transcode::change(&transcode::Dense(&from), &tensor, cancel)?;
            Ok((tensor, change))
        }
    }
}

fn write(out: &mut PartWriter, name: &str, tensor: &Tensor, order: Option<RowOrder>) -> Result<()> {
    match order {
        None => out.write(name, tensor.bytes()),
        Some(order) => out.write(name, order.tensor(tensor)?.bytes()),
    }
}
