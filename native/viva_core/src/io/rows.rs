//! A file of one tensor whose rows come one after the other, nobody knows how many.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::entry::{Entry, EntryDType};
use super::shard_file::open_file;
use super::shards::WrittenShard;
use super::{Metadata, file_name, invalid};
use crate::error::{Error, Result};
use crate::tensor::{DType, element_count};

/// Writes a safetensors file of one tensor with a row, a vector or a number, for
/// each of so many things as there turn out to be. Threads share it.
///
/// Until [`finish`](Self::finish) returns, the file is not valid.
#[derive(Debug)]
pub struct RowsFile {
    path: PathBuf,
    file: File,
    name: String,
    dtype: DType,
    row: Vec<usize>,
    metadata: Metadata,
    data_start: usize,
}

impl RowsFile {
    /// Creates the file, or opens one that an earlier writer left, with room on the disk
    /// for as many `rows` as there will be, where that is known.
    ///
    /// # Errors
    /// [`Error::Io`] with code `enospc` when the disk has no room for it;
    /// [`Error::ShapeOverflow`].
    pub fn create(
        path: impl AsRef<Path>,
        (name, dtype, row): (&str, DType, &[usize]),
        metadata: BTreeMap<String, String>,
        rows: Option<usize>,
    ) -> Result<RowsFile> {
        let path = path.as_ref().to_path_buf();
        let mut made = RowsFile {
            file: open_file(&path, 0)?,
            path,
            name: name.into(),
            dtype,
            row: row.to_vec(),
            metadata: metadata.into(),
            data_start: 0,
        };
        // Numbers only get shorter when the rows are known.
        let most = isize::MAX as usize / 8 / made.row_bytes().max(1);
        made.data_start = made.header(most)?.len();
        if let Some(rows) = rows {
            let shape = made.shape(rows);
            let bytes = element_count(&shape)? * dtype.size();
            made.file = open_file(&made.path, (made.data_start + bytes) as u64)?;
        }
        Ok(made)
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row.iter().product::<usize>() * self.dtype.size()
    }

    /// Writes rows from the one of that number on. Writing them again replaces them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, self.at(first))
            .map_err(|e| self.io(&e))
    }

    /// Reads rows back, or says that there are none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, first: usize, bytes: &mut [u8]) -> Result<bool> {
        match self.file.read_exact_at(bytes, self.at(first)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(self.io(&e)),
        }
    }

    /// Syncs what is written so far to the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.io(&e))
    }

    /// Writes the header, cuts the file to its length and syncs it. Doing it again does
    /// no harm.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self, rows: usize) -> Result<WrittenShard> {
        let bytes = rows * self.row_bytes();
        let file_bytes = self.data_start + bytes;
        let header = self.header(rows)?;
        let written = (self.file.write_all_at(&header, 0))
            .and_then(|()| self.file.set_len(file_bytes as u64))
            .and_then(|()| self.file.sync_all());
        written.map_err(|e| self.io(&e))?;
        Ok(WrittenShard {
            file: file_name(&self.path),
            file_bytes,
            tensors: vec![(self.name.clone(), bytes)],
        })
    }

    fn shape(&self, rows: usize) -> Vec<usize> {
        std::iter::once(rows)
            .chain(self.row.iter().copied())
            .collect()
    }

    fn header(&self, rows: usize) -> Result<Vec<u8>> {
        let entry = Entry {
            name: self.name.clone(),
            dtype: EntryDType::Known(self.dtype),
            shape: self.shape(rows),
            range: 0..rows * self.row_bytes(),
        };
        self.metadata
            .header(vec![entry], self.data_start)
            .map_err(|message| invalid(&self.path, message))
    }

    fn at(&self, row: usize) -> u64 {
        (self.data_start + row * self.row_bytes()) as u64
    }

    fn io(&self, error: &std::io::Error) -> Error {
        Error::io(&self.path, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::TensorFile;

    #[test]
    fn rows_of_any_number_make_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let create = |rows| {
            let metadata = BTreeMap::from([("kind".into(), "test".into())]);
            RowsFile::create(&path, ("a", DType::F16, &[3]), metadata, rows).unwrap()
        };
        for (rows, known) in [(0, None), (1, Some(1)), (7, None), (7, Some(9))] {
            let file = create(known);
            assert_eq!(file.row_bytes(), 6);
            let bytes: Vec<u8> = (0..rows * 6).map(|i| i as u8).collect();
            for row in (0..rows).rev() {
                file.write(row, &bytes[row * 6..][..6]).unwrap();
            }
            file.sync().unwrap();
            let mut back = vec![0; 6];
            assert_eq!(
                file.read(rows.saturating_sub(1), &mut back).unwrap(),
                rows > 0 || known.is_some()
            );
            let written = file.finish(rows).unwrap();
            assert_eq!(written, create(None).finish(rows).unwrap(), "once more");
            let read = TensorFile::open(&path).unwrap();
            let tensor = read.tensor("a").unwrap();
            assert_eq!(
                (tensor.shape(), tensor.bytes()),
                (&[rows, 3][..], &bytes[..])
            );
            assert_eq!(read.metadata().strings().unwrap()["kind"], "test");
            assert_eq!(written.file_bytes, read.file_bytes());
            assert!(!create(None).read(rows, &mut back).unwrap());
        }
    }
}
