//! A matrix with a row for each vector, in a file of its own or among other tensors.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::mapped::Mapped;
use super::{Checkpoint, Entry, EntryDType, file_name, invalid, npy};
use crate::error::Result;
use crate::tensor::{Buffer, Tensor};
use crate::vectors::jittered;

/// A matrix of floats in a mapped file, read row by row.
#[derive(Debug)]
pub struct Matrix {
    map: Arc<Mapped>,
    /// Where in the file its elements are.
    range: Range<usize>,
    tensor: Tensor,
}

impl Matrix {
    /// Opens a `.npy` file, or whatever holds tensors: then `name` says which, unless
    /// only one is a matrix of floats.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io),
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) when there is no such matrix, and
    /// [`Error::UnknownTensor`](crate::Error::UnknownTensor).
    pub fn open(path: impl AsRef<Path>, name: Option<&str>) -> Result<Matrix> {
        let path = path.as_ref();
        match file_name(path).ends_with(".npy") {
            true => Matrix::open_npy(path),
            false => Matrix::open_tensor(path, name),
        }
    }

    fn open_npy(path: &Path) -> Result<Matrix> {
        let map = Mapped::open(path)?;
        if !map.as_ref().starts_with(npy::MAGIC) {
            return Err(invalid(path, "is no .npy file: it does not begin as one"));
        }
        let header = npy::Header::read(map.as_ref()).map_err(|m| invalid(path, m))?;
        let range = header.data_start..map.len();
        Matrix::new(map, range, |map, range| {
            Tensor::new(header.dtype, vec![header.rows, header.columns], map, range)
        })
    }

    fn open_tensor(path: &Path, name: Option<&str>) -> Result<Matrix> {
        let checkpoint = Checkpoint::open(path)?;
        let name = match name {
            Some(name) => name.to_string(),
            None => only_matrix(&checkpoint).map_err(|m| invalid(path, m))?,
        };
        let entry = checkpoint.entry(&name)?;
        if !is_matrix(entry) {
            let what = format!("{} {:?}", entry.dtype.name(), entry.shape);
            return Err(invalid(
                path,
                format!("tensor {name:?} is {what}, and a matrix of floats is needed"),
            ));
        }
        let tensor = checkpoint.tensor(&name)?;
        let (map, range) = checkpoint.mapping(&name)?;
        Ok(Matrix { map, range, tensor })
    }

    fn new(
        map: Mapped,
        range: Range<usize>,
        tensor: impl FnOnce(Arc<Mapped>, Range<usize>) -> Result<Tensor>,
    ) -> Result<Matrix> {
        let map = Arc::new(map);
        Ok(Matrix {
            tensor: tensor(Arc::clone(&map), range.clone())?,
            map,
            range,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// All of it.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Those rows, in place.
    ///
    /// # Errors
    /// [`Error::InvalidFile`](crate::Error::InvalidFile) when the file has another length
    /// than when it was opened.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        self.map.check_unchanged()?;
        self.tensor.rows(rows)
    }

    /// At most so many rows from all over it, and their numbers.
    ///
    /// # Errors
    /// Those of [`rows`](Self::rows).
    pub fn sample(&self, most: usize) -> Result<(Tensor, Vec<u64>)> {
        self.map.check_unchanged()?;
        let n = self.tensor.shape()[0];
        let count = n.min(most);
        let row = self.tensor.row_len() * self.tensor.dtype().size();
        let mut sample = Buffer::zeroed(count * row);
        let mut ids = Vec::new();
        let mut seen = 0;
        for (i, out) in sample.bytes_mut().chunks_exact_mut(row.max(1)).enumerate() {
            let id = jittered(i, count, n);
            out.copy_from_slice(&self.tensor.bytes()[id * row..(id + 1) * row]);
            ids.push(id as u64);
            // With what is mapped around it.
            self.give_back(seen..id + 1);
            seen = id + 1;
        }
        let shape = vec![count, self.tensor.row_len()];
        Ok((
            Tensor::from_buffer(self.tensor.dtype(), shape, sample)?,
            ids,
        ))
    }

    /// Drops the resident pages of those rows; see [`Mapped::give_back`].
    pub fn give_back(&self, rows: Range<usize>) {
        let row = self.tensor.row_len() * self.tensor.dtype().size();
        let start = self.range.start;
        self.map
            .give_back(start + rows.start * row..start + rows.end * row);
    }
}

fn is_matrix(entry: &Entry) -> bool {
    let floats = matches!(entry.dtype, EntryDType::Known(dtype) if dtype.is_float());
    floats && entry.shape.len() == 2
}

fn only_matrix(checkpoint: &Checkpoint) -> std::result::Result<String, String> {
    let matrices: Vec<&Entry> = checkpoint.entries().filter(|e| is_matrix(e)).collect();
    match matrices.as_slice() {
        [only] => Ok(only.name.clone()),
        [] => Err("holds no matrix of floats".into()),
        [first, ..] => Err(format!(
            "holds {} matrices of floats; say which tensor is meant, for example {}",
            matrices.len(),
            first.name
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{FixedEntry, ShardWriter};
    use crate::tensor::DType;
    use std::collections::BTreeMap;

    fn write(path: &Path, entries: &[(&str, DType, &[usize])]) {
        let fixed = (entries.iter())
            .map(|(name, dtype, shape)| FixedEntry {
                name: name.to_string(),
                dtype: EntryDType::Known(*dtype),
                shape: shape.to_vec(),
            })
            .collect();
        let shard = ShardWriter::create(path, fixed, vec![], BTreeMap::new()).unwrap();
        for (name, dtype, shape) in entries {
            let n = shape.iter().product::<usize>() * dtype.size();
            let bytes: Vec<u8> = (0..n).map(|i| i as u8).collect();
            shard.write(name, &bytes).unwrap();
        }
        shard.finish().unwrap();
    }

    #[test]
    fn the_only_matrix_is_found_and_others_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write(
            &path,
            &[
                ("x", DType::F16, &[5, 3]),
                ("bias", DType::F32, &[3]),
                ("ids", DType::I64, &[5, 1]),
            ],
        );
        let matrix = Matrix::open(&path, None).unwrap();
        assert_eq!(matrix.tensor().shape(), [5, 3]);
        let rows = matrix.rows(2..4).unwrap();
        assert_eq!(rows.bytes(), &matrix.tensor().bytes()[12..24]);
        matrix.give_back(0..5);
        assert_eq!(rows.bytes()[0], 12);
        assert!(matrix.rows(4..6).is_err());
        for (name, said) in [("bias", "[3]"), ("ids", "i64"), ("y", "no tensor")] {
            let error = Matrix::open(&path, Some(name)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let two = dir.path().join("b.safetensors");
        write(
            &two,
            &[("x", DType::F16, &[5, 3]), ("y", DType::F32, &[2, 3])],
        );
        let error = Matrix::open(&two, None).unwrap_err().to_string();
        assert!(error.contains("2 matrices"), "{error}");
        assert_eq!(Matrix::open(&two, Some("y")).unwrap().tensor().len(), 6);
    }

    #[test]
    fn a_npy_file_is_a_matrix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        let mut file = npy::MAGIC.to_vec();
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n";
        file.extend([1, 0, text.len() as u8, 0]);
        file.extend(text.as_bytes());
        file.extend([1f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()));
        std::fs::write(&path, &file).unwrap();
        let matrix = Matrix::open(&path, None).unwrap();
        assert_eq!(matrix.rows(1..2).unwrap().to_f32_vec(), [3.0, 4.0]);
        std::fs::write(&path, b"no").unwrap();
        assert!(matrix.rows(0..1).is_err(), "it was cut");
        assert!(
            Matrix::open(&path, None)
                .unwrap_err()
                .to_string()
                .contains("no .npy")
        );
    }
}
